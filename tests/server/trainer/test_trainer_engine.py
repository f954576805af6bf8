"""The engine: what it saves it finds again, bit for bit; what it writes, an edge accepts; what is broken, it names."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors

from clawloop_server.errors import TrainerError
from clawloop_server.trainer.base import load_base
from clawloop_server.trainer.engine import PoisonedSamples, TrainEngine
from clawloop_server.trainer.generation import Sampling
from clawloop_server.trainer.settings import TrainSettings, check_settings
from clawloop_shared.errors import ConfigError, StorageError
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, check_tensors, parse_config
from clawloop_shared.model_line import read_shape
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample
from clawloop_shared.safetensors_header import read_header
from clawloop_shared.whole_step import WholeStep

Session = Callable[..., list[Sample]]
LOSS = LossSettings(veto=0.0)


def train(engine: TrainEngine, session: Session, *, seeds: range) -> None:
    for seed in seeds:
        engine.forward_backward(session(seed), LOSS)
        engine.optim_step(1e-2)


def same(one: TrainEngine, other: TrainEngine) -> bool:
    mine, theirs = one.adapter(), other.adapter()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_training_goes_on_from_a_checkpoint_bit_for_bit(
    engine: TrainEngine, tiny_folder: Path, session: Session, tmp_path: Path
) -> None:
    train(engine, session, seeds=range(2))
    engine.save_state(tmp_path / "state.safetensors", text="two updates")
    train(engine, session, seeds=range(2, 4))
    drawn = torch.rand(1)
    other = TrainEngine.open(tiny_folder, replace_seed(engine.settings, 99))
    assert not same(engine, other)
    assert other.load_state(tmp_path / "state.safetensors") == "two updates"
    train(other, session, seeds=range(2, 4))
    assert same(engine, other)
    assert torch.equal(torch.rand(1), drawn)
    engine.load_state(tmp_path / "state.safetensors")
    train(engine, session, seeds=range(2, 4))
    assert same(engine, other)


def replace_seed(settings: TrainSettings, seed: int) -> TrainSettings:
    return TrainSettings(rank=settings.rank, warmup_updates=1, seed=seed)


def test_a_checkpoint_is_one_private_file_without_pickle(engine: TrainEngine, session: Session, tmp_path: Path) -> None:
    train(engine, session, seeds=range(1))
    path = tmp_path / "state.safetensors"
    engine.save_state(path, text="{}")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o600
    names = read_header(path.read_bytes(), max_bytes=1 << 24)
    assert {name.split("/")[0] for name in names} == {"adapter", "exp_avg", "exp_avg_sq", "step", "rng"}


def test_other_files_are_not_taken_for_checkpoints(engine: TrainEngine, tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(StorageError, match="torn"):
        engine.load_state(tmp_path / "torn")
    with pytest.raises(StorageError, match="missing"):
        engine.load_state(tmp_path / "missing")
    (tmp_path / "adapter").write_bytes(engine.adapter_files()[WEIGHTS_FILE])
    with pytest.raises(StorageError, match="not a checkpoint"):
        engine.load_state(tmp_path / "adapter")


def test_the_adapter_passes_the_checks_of_an_edge_and_holds_the_trained_numbers(
    engine: TrainEngine, tiny_folder: Path, session: Session, tmp_path: Path
) -> None:
    train(engine, session, seeds=range(1))
    engine.save_adapter(tmp_path)
    config = parse_config((tmp_path / CONFIG_FILE).read_bytes())
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    check_tensors(read_header(data, max_bytes=1 << 20), config, shape=read_shape(tiny_folder))
    tensors, mine = load_tensors(data), engine.adapter()
    assert all(torch.equal(tensors[name], mine[name]) for name in mine)
    assert (config.r, config.scale) == (4, 4.0)


def test_peft_itself_loads_the_adapter_with_the_same_result(
    engine: TrainEngine, tiny_folder: Path, session: Session, tmp_path: Path
) -> None:
    from peft import PeftModel

    train(engine, session, seeds=range(2))
    engine.save_adapter(tmp_path)
    samples = session(7, trajectories=1, turns=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        loaded = PeftModel.from_pretrained(load_base(tiny_folder), tmp_path)
    ids = torch.tensor([list(samples[0].token_ids)])
    scores = (loaded(input_ids=ids).logits[0] / samples[0].temperature).log_softmax(-1)
    wanted = [float(scores[at - 1, ids[0, at]]) for at in samples[0].trained]
    assert engine.logprobs(samples)[0] == pytest.approx(wanted, abs=1e-5)


def test_a_fresh_adapter_is_the_base_and_a_trained_one_is_not(engine: TrainEngine, session: Session) -> None:
    samples = session(0)
    assert engine.logprobs(samples) == engine.logprobs(samples, adapter=False)
    base = engine.logprobs(samples, adapter=False)
    assert engine.forward_backward(samples, LOSS).metrics()["k2_base"] == 0.0
    assert engine.optim_step(1e-2) > 0
    assert engine.logprobs(samples) != base
    assert engine.logprobs(samples, adapter=False) == base
    assert engine.forward_backward(samples, LOSS).metrics()["k2_base"] > 0.0


def test_logprobs_come_back_in_the_order_of_the_samples(engine: TrainEngine, session: Session) -> None:
    samples = session(2)
    whole = engine.logprobs(samples)
    assert [len(one) for one in whole] == [len(s.trained) for s in samples]
    for sample, found in zip(samples, whole, strict=True):
        assert found == pytest.approx(engine.logprobs([sample])[0], abs=1e-5)


def test_rows_add_up_to_the_same_step(engine: TrainEngine, tiny_folder: Path, session: Session) -> None:
    small = TrainEngine.open(tiny_folder, TrainSettings(rank=4, warmup_updates=1, row_tokens=40))
    samples = session(5, turns=1)
    one, other = (each.forward_backward(samples, LOSS).metrics() for each in (engine, small))
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert engine.optim_step(1e-2) == pytest.approx(small.optim_step(1e-2), rel=1e-4)


def test_samples_that_are_not_finite_are_named_and_leave_no_gradient(engine: TrainEngine, session: Session) -> None:
    samples = session(0, trajectories=3, turns=1)
    poisoned = [replace(s, temperature=1e-45) if s.trajectory == 1 else s for s in samples]
    with pytest.raises(PoisonedSamples) as caught:
        engine.forward_backward(poisoned, LOSS)
    assert caught.value.trajectories == [1]
    before = engine.adapter()
    assert engine.optim_step(1.0) == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.adapter().items())


@pytest.mark.parametrize("attention", ["dense", "flex"])
def test_of_a_row_only_the_trajectory_is_named_whose_hidden_states_are_not_finite(
    tiny_folder: Path, session: Session, attention: str
) -> None:
    engine = TrainEngine.open(tiny_folder, TrainSettings(rank=4, attention=attention))
    samples = session(0, trajectories=3, turns=1)
    assert len(engine._pack(samples)) == 1
    token = next(t for s in samples if s.trajectory == 1 for t in s.token_ids if only_in(samples, t, trajectory=1))

    def spoil(module: torch.nn.Module, ids: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.where(ids[0][..., None] == token, torch.nan, output)

    hook = engine.model.get_base_model().get_input_embeddings().register_forward_hook(spoil)
    with pytest.raises(PoisonedSamples) as caught:
        engine.forward_backward(samples, LOSS)
    hook.remove()
    assert caught.value.trajectories == [1]


def only_in(samples: list[Sample], token: int, *, trajectory: int) -> bool:
    return all(token not in s.token_ids for s in samples if s.trajectory != trajectory)


def test_a_base_whose_logprobs_are_not_finite_is_noticed(
    engine: TrainEngine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = session(0, trajectories=2, turns=1)
    monkeypatch.setattr(engine, "_reference", lambda row: torch.full_like(row.behaviour_P, torch.nan))
    with pytest.raises(PoisonedSamples):
        engine.forward_backward(samples, LOSS)


def test_no_trajectory_has_more_than_its_share_of_a_step_however_long_it_is(
    engine: TrainEngine, session: Session
) -> None:
    honest = session(0, trajectories=12, turns=1)
    long = [replace(s, trajectory=99) for seed in range(1, 9) for s in session(seed, trajectories=2, turns=2)]
    step = WholeStep.of([*honest, *long], LOSS, normalizer=None, split={})
    counted = {s.trajectory: 0.0 for s in [*honest, *long]}
    for sample in [*honest, *long]:
        counted[sample.trajectory] += step.caps[sample.trajectory] * len(sample.trained)
    assert step.normalizer == pytest.approx(sum(counted.values()))
    assert max(counted.values()) <= LOSS.max_trajectory_share * step.normalizer * (1 + 1e-9)
    assert counted[99] < 0.5 * sum(len(s.trained) for s in long)


def test_another_adapter_is_used_for_the_time_of_a_with(engine: TrainEngine, session: Session) -> None:
    first = engine.adapter()
    train(engine, session, seeds=range(1))
    samples = session(3)
    trained = engine.logprobs(samples)
    with engine.with_adapter(first):
        assert engine.logprobs(samples) == engine.logprobs(samples, adapter=False)
    assert engine.logprobs(samples) == trained
    with pytest.raises(TrainerError, match="change the settings back"):
        engine.set_adapter({"other": torch.zeros(1)})


def greedy(engine: TrainEngine, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(engine.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generation_in_a_batch_is_generation_alone(engine: TrainEngine, session: Session) -> None:
    train(engine, session, seeds=range(1))
    prompts = [list(s.token_ids)[: 20 + 3 * n] for n, s in enumerate(session(8, trajectories=4, turns=1))]
    wanted = [greedy(engine, prompt, 12) for prompt in prompts]
    end = wanted[1][4]  # so that one reply ends early
    replies = engine.generate(prompts, sampling=Sampling(max_tokens=12, eos_ids=frozenset({end}), temperature=0.0))
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in wanted]
    assert [reply.ids for reply in replies] == cut
    assert [reply.stopped for reply in replies] == [end in ids for ids in wanted]


def test_the_same_seed_samples_the_same_replies(engine: TrainEngine, session: Session) -> None:
    prompts = [list(s.token_ids) for s in session(8, turns=1)]
    found = [
        engine.generate(prompts, sampling=Sampling(max_tokens=8, eos_ids=frozenset({1}), seed=seed))
        for seed in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]
    assert engine.generate([], sampling=Sampling(max_tokens=8, eos_ids=frozenset({1}))) == []


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(rank=0),
        TrainSettings(lr=0.0),
        TrainSettings(target_modules=("lm_head",)),
        TrainSettings(threads=0),
    ],
)
def test_settings_out_of_bounds_are_named(settings: TrainSettings) -> None:
    with pytest.raises(ConfigError, match=r"\[train\] (rank|lr|target_modules|threads)"):
        check_settings(settings)


def test_the_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    settings = TrainSettings(lr=1.0, warmup_updates=10, planned_updates=100, decay_to=0.2)
    assert [settings.lr_at(u) for u in (0, 9, 50, 100, 500)] == pytest.approx([0.1, 0.928, 0.6, 0.2, 0.2])
    assert TrainSettings(lr=1.0, warmup_updates=0).lr_at(10_000) == 1.0

"""Rows fit the memory: reckoned beforehand, and made smaller when it runs out all the same, with the same gradients."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from clawloop_server.trainer.base import attach_adapter
from clawloop_server.trainer.device import Placement, prepare
from clawloop_server.trainer.engine import OversizedSamples, PoisonedSamples, TrainEngine
from clawloop_server.trainer.memory import (
    DENSE_NODES,
    LEAST_NODES,
    MOST_NODES,
    Need,
    _free_ram,
    estimate,
    fitted,
    free_bytes,
    is_out_of_memory,
    row_budget,
)
from clawloop_server.trainer.packing import PackedRow, pack
from clawloop_server.trainer.scorer import bare, score_row
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.lora import LINEARS
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample

Session = Callable[..., list[Sample]]
LOSS = LossSettings(veto=0.0)
Errors = Callable[[], Exception]
ERRORS: dict[str, Errors] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    "python": MemoryError,
}


@given(st.floats(0, 1e9), st.floats(1, 1e6), st.floats(0, 100), st.floats(0, 1e12))
def test_the_nodes_that_fit_do_fit_and_a_few_more_do_not(
    fixed: float, per_token: float, per_pair: float, free: float
) -> None:
    nodes = Need(fixed, per_token, per_pair).nodes(free)
    assert nodes == 0 or fixed + per_token * nodes + per_pair * nodes**2 <= free * (1 + 1e-9)
    more = 1.001 * nodes + 2
    assert fixed + per_token * more + per_pair * more**2 > free * (1 - 1e-9)


def test_a_budget_is_in_blocks_and_within_bounds() -> None:
    flex, dense = Need(0.0, 1e6), Need(0.0, 1e3, 4.0)
    assert row_budget(flex, free_bytes=10e9) == 9984
    assert row_budget(flex, free_bytes=1e15) == MOST_NODES
    assert row_budget(flex, free_bytes=0) == LEAST_NODES
    assert row_budget(dense, free_bytes=1e15) == DENSE_NODES
    assert row_budget(dense, free_bytes=4e6 + 1e6) == 896


def test_two_trials_give_the_line_through_them() -> None:
    need = fitted((1000, 3000), [2e9, 5e9], per_pair=4.0)
    assert (need.fixed, need.per_token, need.per_pair) == (0.5e9, 1.5e6, 4.0)
    hidden = fitted((1000, 3000), [5e9, 5e9], per_pair=0.0)  # what loads first is the peak of both
    assert hidden.per_token * 3000 >= 2.5e9


def shaped(checkpointing: bool) -> Any:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
    )
    base = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model = attach_adapter(base, rank=4, alpha=8.0, target_modules=LINEARS, seed=0)
    return prepare(model, Placement(torch.device("cpu"), torch.float32, checkpointing=checkpointing))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_what_is_reckoned_is_what_the_layers_keep(checkpointing: bool) -> None:
    model = shaped(checkpointing)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    nodes = 512
    ids = list(range(2, 34)) * (nodes // 32)
    (row,) = pack([Sample("s", 0, ids, range(1, nodes), [0.0] * 511, [1.0] * 511)], row_tokens=nodes)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = score_row(model, row)[0]
    assert output.requires_grad
    need = estimate(bare(model), checkpointing=checkpointing, flex=True)
    found = sum(held.values()) / nodes
    # While a checkpointed layer is computed again, what it keeps is there, too; it is in the estimate, not in `held`.
    within = 4 * (6 * 128 + 6 * 128 + 6 * 64 + 4 * 384) if checkpointing else 0
    assert 0.9 < need.per_token / (found + within) < 1.8


def test_the_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert _free_ram(tmp_path / "meminfo") == 65536
    assert _free_ram(tmp_path / "none") > 1 << 28
    assert 0 < free_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("name", ERRORS)
def test_running_out_of_memory_is_told_from_other_errors(name: str) -> None:
    assert is_out_of_memory(ERRORS[name]())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


class Failing:
    """Lets rows be scored until one is chosen, and then runs out of memory, before or after its forward pass."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, chosen: Callable[[int, PackedRow], bool], error: Errors
    ) -> None:
        self.rows = 0
        self.failed: list[int] = []

        def score(model: Any, row: PackedRow, **options: Any) -> Any:
            found = score_row(model, row, **options)
            if torch.is_grad_enabled():
                self.rows += 1
                if chosen(self.rows, row):
                    self.failed.append(len(row.token_ids_T))
                    raise error()
            return found

        monkeypatch.setattr("clawloop_server.trainer.engine.score_row", score)


def gradients(engine: TrainEngine) -> list[Tensor]:
    return [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]


def opened(folder: Path, row_tokens: int = 64) -> TrainEngine:
    engine = TrainEngine.open(folder, TrainSettings(rank=4, warmup_updates=1, row_tokens=row_tokens))
    generator = torch.Generator().manual_seed(3)
    engine.set_adapter({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in engine.adapter().items()})
    return engine


@pytest.mark.parametrize(("name", "at_row"), [("cuda", 1), ("cpu", 3), ("mps", 3), ("python", 2)])
def test_after_running_out_of_memory_the_gradients_are_those_of_a_run_with_smaller_rows(
    tiny_folder: Path, session: Session, monkeypatch: pytest.MonkeyPatch, name: str, at_row: int
) -> None:
    # A trajectory has one weight, wherever its calls are.
    first, samples = (
        [replace(s, weight=1.0) for s in each]
        for each in (session(7, trajectories=2, turns=1), session(5, trajectories=6, turns=2))
    )
    engine, small = opened(tiny_folder), opened(tiny_folder)
    for each in (engine, small):
        each.forward_backward(first, LOSS)  # gradients that must survive
    failing = Failing(monkeypatch, lambda number, row: number == at_row, ERRORS[name])
    sums = engine.forward_backward(samples, LOSS)
    assert len(failing.failed) == 1
    assert engine.row_tokens == failing.failed[0] // 2
    small.row_tokens = engine.row_tokens
    assert small.forward_backward(samples, LOSS) == sums
    assert all(torch.equal(a, b) for a, b in zip(gradients(engine), gradients(small), strict=True))
    # Where rows are cut changes no more than the last bits of an undisturbed run's gradients.
    whole = opened(tiny_folder)
    whole.forward_backward(first, LOSS)
    monkeypatch.undo()
    whole.forward_backward(samples, LOSS)
    for mine, theirs in zip(gradients(engine), gradients(whole), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_errors_at_random_rows_change_nothing_but_the_budget(
    tiny_folder: Path, session: Session, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng, samples = random.Random(seed), session(seed, trajectories=8, turns=3)
    limit = rng.randrange(45, 90)
    engine, small = opened(tiny_folder, 400), opened(tiny_folder, 400)
    failing = Failing(monkeypatch, lambda _, row: len(row.token_ids_T) > limit, ERRORS["cuda"])
    sums = engine.forward_backward(samples, LOSS)
    assert failing.failed
    assert failing.failed == sorted(failing.failed, reverse=True)
    small.row_tokens = engine.row_tokens
    assert small.forward_backward(samples, LOSS) == sums
    assert all(torch.equal(a, b) for a, b in zip(gradients(engine), gradients(small), strict=True))


def test_a_step_that_never_fits_is_named_and_the_gradients_are_as_before(
    tiny_folder: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = session(2, trajectories=4, turns=2)
    engine = opened(tiny_folder, 400)
    engine.forward_backward(session(1, trajectories=1), LOSS)
    before = gradients(engine)
    large = replace(samples[5], token_ids=[*samples[5].token_ids, *([7] * 200)])
    samples[5] = large
    Failing(monkeypatch, lambda _, row: len(row.token_ids_T) > 150, ERRORS["cuda"])
    with pytest.raises(OversizedSamples, match="does not fit the memory by itself") as caught:
        engine.forward_backward(samples, LOSS)
    assert caught.value.trajectories == [large.trajectory]
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(engine), strict=True))
    rest = [s for s in samples if s.trajectory != large.trajectory]
    assert engine.forward_backward(rest, LOSS).tokens == sum(len(s.trained) for s in rest)


def test_logprobs_are_found_in_smaller_rows_too(
    tiny_folder: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = session(2, trajectories=4, turns=2)
    engine = opened(tiny_folder, 400)
    wanted = engine.logprobs(samples)

    def score(model: Any, row: PackedRow, **options: Any) -> Any:
        if len(row.token_ids_T) > 60:
            raise ERRORS["cpu"]()
        return score_row(model, row, **options)

    monkeypatch.setattr("clawloop_server.trainer.engine.score_row", score)
    for found, plain in zip(engine.logprobs(samples), wanted, strict=True):
        assert found == pytest.approx(plain, abs=1e-5)
    assert engine.row_tokens <= 60
    with engine.model.disable_adapter():
        bare_logprobs = engine.logprobs(samples)
    assert engine.logprobs(samples, adapter=False) == bare_logprobs


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tiny_folder: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(tiny_folder, 400)
    Failing(monkeypatch, lambda *_: True, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        engine.forward_backward(session(2), LOSS)
    assert engine.row_tokens == 400
    monkeypatch.undo()
    with pytest.raises(PoisonedSamples):
        opened(tiny_folder).forward_backward([replace(s, temperature=1e-45) for s in session(1, turns=1)], LOSS)


def test_the_budget_is_found_once_and_can_be_set(tiny_folder: Path) -> None:
    engine = TrainEngine.open(tiny_folder, TrainSettings(rank=4))
    assert engine.row_tokens == DENSE_NODES  # a tiny model fits any row that the dense mask allows
    engine.row_tokens = 300
    assert engine.row_tokens == 300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_measured_budget_fits_and_a_row_beyond_the_memory_is_made_smaller(tiny_folder: Path) -> None:
    engine = TrainEngine.open(tiny_folder, TrainSettings(rank=4, device="cuda"))
    assert LEAST_NODES <= engine.row_tokens <= MOST_NODES
    engine._trial(engine.row_tokens)
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    samples = [
        Sample(f"{t}", t, [2 + (t * 31 + i) % 300 for i in range(2000)], range(1, 2000), [-6.0] * 1999, [1.0] * 1999)
        for t in range(64)
    ]
    assert engine.forward_backward(samples, LOSS).tokens == 64 * 1999
    del held

"""scripts/bench-trainer's own arithmetic, and that a short run of it works. No timing is judged."""

import gc
import weakref
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.packing import pack
from clawloop_server.trainer.settings import TrainSettings
from trainer_bench import gpu, sharing, vocabulary
from trainer_bench.engines import OPEN_LOSS, counted, gradients, open_engine, random_folder, save_random_model, settings
from trainer_bench.flops import matmul_rate, useful_flops
from trainer_bench.measure import Times, in_turns, peak_of
from trainer_bench.report import Memory, Report, Row, Section, Target, Use, equality, faster
from trainer_bench.shapes import (
    APPEND_ONLY,
    LONG,
    OPENCLAW,
    QUICK,
    QWEN3_4B,
    WIDE_HEAD,
    Requests,
    SessionShape,
    Work,
    call_work,
    multi_turn_batch,
    session,
    shared_work,
    shorter,
)

_4B = 4.02e9


def test_a_session_that_only_grows_has_the_lengths_that_were_asked_for() -> None:
    samples = session(APPEND_ONLY, vocab=512)
    assert [len(sample.token_ids) for sample in samples] == [352 + 160 * turn for turn in range(8)]
    assert all(list(sample.trained) == list(range(len(sample.token_ids)))[-64:] for sample in samples)
    assert call_work(samples).tokens == 7296
    assert shared_work(samples) == Work(tokens=1472, pairs=1472 * 1473 // 2, trained=512)
    assert shared_work(session(LONG, vocab=151_936)).tokens == 16_384


def test_the_last_message_of_a_request_of_openclaw_is_not_in_the_next_one() -> None:
    samples, passing = session(OPENCLAW, vocab=8192), Requests().context
    for part, one, other in zip(OPENCLAW.parts, samples, samples[1:], strict=False):
        same = sum(
            1 for _ in takewhile(lambda two: two[0] == two[1], zip(one.token_ids, other.token_ids, strict=False))
        )
        assert len(one.token_ids) - part.sampled - part.passing <= same < len(one.token_ids) - part.sampled
    assert all(part.passing * 4 >= passing for part in OPENCLAW.parts)
    assert len(samples[0].token_ids) > OPENCLAW.system > 1800


@pytest.mark.parametrize("shape", [APPEND_ONLY, OPENCLAW, shorter(LONG, 64)], ids=lambda shape: shape.name)
def test_the_least_work_is_what_a_packed_row_has(shape: SessionShape) -> None:
    samples = session(shape, vocab=8192)
    (row,) = pack(samples, row_tokens=1 << 15)
    work = shared_work(samples)
    assert (work.tokens, work.trained) == (len(row.token_ids_T), len(row.target_P))
    assert work.pairs == int(row.sees_TT().sum())


def test_a_batch_for_trl_has_trained_and_other_tokens_and_is_the_same_each_time() -> None:
    samples = multi_turn_batch(vocab=8192)
    assert [list(s.token_ids) for s in samples] == [list(s.token_ids) for s in multi_turn_batch(vocab=8192)]
    for sample in samples:
        assert 0 < sample.trained[0] < sample.trained[-1] == len(sample.token_ids) - 1
        assert len(sample.trained) == len(set(sample.trained)) < len(sample.token_ids) - sample.trained[0]


def test_useful_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """On rows without sharing or recomputing, where eager attention computes every pair."""
    size, shape = 64, QUICK
    save_random_model(shape, tmp_path)
    engine = open_engine(tmp_path, settings(device="cpu", row_tokens=2 * size))
    engine.model.get_base_model().set_attn_implementation("eager")
    ids_T = torch.arange(2, 2 + size)
    with FlopCounterMode(display=False) as counter:
        engine.model(input_ids=ids_T[None], use_cache=False).logits.sum().backward()
    expected = useful_flops(shape, Work(tokens=size, pairs=size * size, trained=size), rank=engine.settings.rank)
    assert counter.get_total_flops() == expected


def test_the_shape_of_4b_has_so_many_weights_and_costs_four_a_token_and_weight() -> None:
    shape = QWEN3_4B
    body = shape.layers * sum(wide * narrow for wide, narrow in shape.linears)
    assert body + shape.vocab * shape.hidden == pytest.approx(_4B, rel=0.01)
    a_token = useful_flops(shape, Work(tokens=1, pairs=0, trained=0), rank=16)
    assert a_token == pytest.approx(4 * body, rel=0.02)


def test_a_matrix_rate_is_positive_however_short_the_time() -> None:
    assert matmul_rate(torch.device("cpu"), size=32, seconds=0.0) > 0


def test_contenders_take_turns_in_both_orders() -> None:
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert [len(each.wall) for each in times.values()] == [len(each.cpu) for each in times.values()] == [2, 2]


def test_a_peak_is_what_was_taken_on_the_way() -> None:
    assert 0.24 < peak_of(lambda: torch.ones(1 << 26).sum()).over < 0.3


def test_targets_are_met_from_one_side() -> None:
    assert Target(name="", found=3.0, at_least=3.0).met
    assert not Target(name="", found=2.99, at_least=3.0).met
    assert Target(name="", found=0.5, at_most=0.5).met
    assert not Target(name="", found=0.51, at_most=0.5).met
    found = faster("", Times([4.0, 6.0], [3.0, 3.0]), Times([2.0, 1.0], [1.5, 2.0]), at_least=3.0)
    assert [(target.found, target.met) for target in found] == [(4.0, True), (2.0, False)]


def test_other_gradients_are_noticed_and_make_a_run_unsound() -> None:
    one = {"a": torch.tensor([1.0, -4.0])}
    assert equality("", one, {"a": torch.tensor([1.0, -4.00001])}).holds
    found = [
        equality("", one, {"a": torch.tensor([1.0, -4.001])}),
        equality("", one, {"b": one["a"]}),
        equality("", {"a": torch.zeros(2)}, {"a": torch.zeros(2)}),
        equality("", {}, {}),
        equality("", one, {"a": torch.tensor([1.0, float("nan")])}),
    ]
    assert not any(each.holds for each in found)
    for each in found:
        report = Report(
            machine="", versions={}, threads=1, load_averages=[], found=Section() + Section(equalities=[each])
        )
        assert not report.sound


def test_rates_and_use_are_quotients() -> None:
    row = Row(section="", contender="", tokens=600, computed=100, wall_s=[3.0, 2.0], cpu_s=[1.0, 1.0])
    assert row.rate == 300
    used = Use(section="", contender="", useful_flops=8e12, wall_s=2.0, matrix_rate=16e12)
    assert (used.rate, used.part) == (4e12, 0.25)


def test_a_short_run_compares_sharing_with_none() -> None:
    found = sharing.measure(rounds=1, threads=1, quick=True)
    assert all(each.holds for each in found.equalities)
    assert len(found.equalities) == 2 * len(sharing.CASES)
    for shared, unshared in zip(found.rows[::2], found.rows[1::2], strict=True):
        forwards = 2 if shared.section.endswith(sharing.AND_BASE) else 1
        assert unshared.computed == forwards * unshared.tokens == forwards * shared.tokens > 4 * shared.computed


def test_the_gpus_part_runs_on_a_cpu_when_it_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[object]] = []

    def opening(folder: Path, given: TrainSettings) -> TrainEngine:
        gc.collect()
        assert [each for each in opened if each()] == [], "a model of before is still in memory"
        engine = open_engine(folder, given)
        opened.append(weakref.ref(engine.model))
        return engine

    monkeypatch.setattr(gpu, "open_engine", opening)
    found = gpu.use(gpu.TINY, "cpu")
    monkeypatch.undo()
    assert len(opened) == 2
    found += gpu.same_gradients(gpu.TINY, "cpu")
    assert len(found.equalities) == 2
    assert all(each.holds for each in found.equalities)
    assert [used.contender for used in found.uses] == [gpu.FLEX, gpu.CALLS]
    for first, then in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert (then.contender, then.computed) == (first.contender + sharing.AND_BASE, 2 * first.computed)
    assert [each.contender for each in found.memory] == [each.contender for each in found.rows]
    assert all(used.part > 0 for used in found.uses)


def test_every_way_through_the_vocabulary_finds_the_same_gradient() -> None:
    shape, positions = vocabulary.sizes(quick=True)
    samples, found = vocabulary.samples_of(shape, positions), {}
    with random_folder(shape) as folder:
        engine = open_engine(folder, settings(device="cpu", row_tokens=2 * positions))
    for name, step in vocabulary.STEPS.items():
        engine.model.zero_grad(set_to_none=True)
        step(engine, samples)
        found[name] = gradients(engine.model)
    assert all(equality(name, each, found[vocabulary.OURS]).holds for name, each in found.items())
    assert len(samples[0].trained) == positions
    assert vocabulary.sizes(quick=False) == (WIDE_HEAD, 4096)


def test_positions_are_counted_once_each_with_padding() -> None:
    with random_folder(QUICK) as folder:
        engine = open_engine(folder, settings(device="cpu", row_tokens=64))
    samples = session(shorter(APPEND_ONLY, 32), vocab=QUICK.vocab)
    with counted(engine.model) as positions:
        engine.forward_backward(samples, OPEN_LOSS)
    assert positions.count == shared_work(samples).tokens


def test_memory_targets_are_of_ours_alone() -> None:
    found = [
        Memory(section="", contender=vocabulary.OURS, over_gib=0.4),
        Memory(section="", contender=vocabulary.SOFTMAX, over_gib=7.0),
    ]
    assert [(target.found, target.met) for target in vocabulary.targets(found)] == [(0.4, True)]

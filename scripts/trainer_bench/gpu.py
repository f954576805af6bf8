"""A model of four billion parameters on a GPU: sharing by FlexAttention beside no sharing, and how busy the GPU was.

Without sharing each call is a row of its own under torch's plain causal attention, the fastest there is for it. With
`tiny` sizes all of it runs on a CPU too, FlexAttention in eager mode: that shows that it works and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clawloop_server.trainer.attention import uses_flex
from clawloop_server.trainer.memory import release
from clawloop_server.trainer.scorer import bare
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.rows import Sample
from trainer_bench.engines import (
    OPEN_LOSS,
    RANK,
    TRAINED_LOSS,
    counted,
    gradients,
    open_engine,
    random_folder,
    settings,
)
from trainer_bench.flops import matmul_rate, useful_flops
from trainer_bench.measure import Peak, Times, in_turns, peak_of
from trainer_bench.report import Memory, Section, Target, Use, equality, row
from trainer_bench.shapes import (
    LONG,
    OPENCLAW,
    QUICK,
    QWEN3_4B,
    ModelShape,
    SessionShape,
    Work,
    call_work,
    session,
    shared_work,
    shorter,
)
from trainer_bench.sharing import AND_BASE, step

LEAST_USE = 0.4
FLEX, CALLS = "FlexAttention, shared", "causal, a row a call"
CHECKED = ModelShape(1024, hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=512)
FORKED = shorter(OPENCLAW, 2)
_CLOSE = 1e-4
"""float32 on a GPU: sums in another order, in kernels that were written for speed"""


@dataclass(frozen=True)
class Plan:
    """What is measured: `matrix` is the size of the products whose rate is the measure of use."""

    model: ModelShape = QWEN3_4B
    shape: SessionShape = LONG
    checked: ModelShape = CHECKED
    checked_shape: SessionShape = FORKED
    sessions: int = 2
    matrix: int = 8192
    rounds: int = 3

    @property
    def name(self) -> str:
        """What the rows are called."""
        tokens = self.shape.system + sum(part.new + part.sampled for part in self.shape.parts)
        return f"{self.sessions} sessions of {len(self.shape.parts)} turns, {tokens:,} tokens"


TINY = Plan(
    model=QUICK,
    shape=shorter(LONG, 64),
    checked=QUICK,
    checked_shape=shorter(OPENCLAW, 16),
    matrix=256,
    rounds=1,
)


def measure(*, tiny: bool) -> Section:
    """Everything, on CUDA if it is there."""
    plan = TINY if tiny else Plan()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return same_gradients(plan, kind) + use(plan, kind)


def same_gradients(plan: Plan, kind: str) -> Section:
    """FlexAttention, dense masks and no sharing at all, in float32, on a session whose calls fork."""
    samples = session(plan.checked_shape, vocab=plan.checked.vocab)
    found = {}
    with random_folder(plan.checked) as folder:
        for attention, share in (("flex", True), ("dense", True), ("dense", False)):
            given = settings(device=kind, dtype="float32", attention=attention, row_tokens=1 << 15)
            engine = open_engine(folder, given)
            if uses_flex(bare(engine.model)) != (attention == "flex"):
                raise RuntimeError(f"the engine does not attend as it was told to: {attention}")
            step(engine, samples, share=share)()
            found[attention, share] = gradients(engine.model)
    one = found.pop(("flex", True))
    names = {True: "FlexAttention and a dense mask", False: "FlexAttention and a row a call"}
    return Section(
        equalities=[
            equality(f"{names[share]}, {kind}", one, other, close=_CLOSE) for (_, share), other in found.items()
        ]
    )


def use(plan: Plan, kind: str) -> Section:
    """Tokens a second, memory, and the part of the matrix rate that was of use (that without the distance to the base:
    the operations of its forward are not counted). One engine after the other, so that memory is of one model."""
    device = torch.device(kind)
    sessions = [
        session(plan.shape, vocab=plan.model.vocab, seed=number, trajectory=number) for number in range(plan.sessions)
    ]
    samples = [sample for each in sessions for sample in each]
    longest = max(shared_work(each).tokens for each in sessions)
    rate = matmul_rate(device, size=plan.matrix)
    taken: dict[str, Taken] = {}
    with random_folder(plan.model, device=kind, dtype=torch.bfloat16) as folder:
        for name, attention in ((FLEX, "flex"), (CALLS, "dense")):
            given = _settings(kind, attention=attention, row_tokens=longest)
            taken |= _taken(folder, given, samples, plan=plan, name=name)
            release()  # so that what was there before the next is not the weights of this one
    rate = max(rate, matmul_rate(device, size=plan.matrix))  # the faster: use is not to look better than it is
    works = {FLEX: sum(map(shared_work, sessions), Work(0, 0, 0)), CALLS: call_work(samples)}
    uses = [_use(plan, name, taken[name].times, work, rate=rate) for name, work in works.items()]
    tokens = works[CALLS].tokens
    return Section(
        rows=[row(plan.name, name, one.times, tokens=tokens, computed=one.computed) for name, one in taken.items()],
        memory=[
            Memory(section=plan.name, contender=name, base_gib=one.peak.base, over_gib=one.peak.over)
            for name, one in taken.items()
        ],
        uses=uses,
        targets=[Target(name=f"part of the matrix rate, {plan.name}", found=uses[0].part, at_least=LEAST_USE)],
    )


@dataclass(frozen=True)
class Taken:
    """What a contender took: times, memory, and positions that went through the model."""

    times: Times
    peak: Peak
    computed: int


def _taken(folder: Path, given: TrainSettings, samples: Sequence[Sample], *, plan: Plan, name: str) -> dict[str, Taken]:
    """What an engine takes, without and with the distance to the base. Nothing of it is left in memory after."""
    device = torch.device(given.device)
    engine = open_engine(folder, given)
    runs = {
        named: step(engine, samples, share=name == FLEX, loss=loss)
        for loss, named in ((OPEN_LOSS, name), (TRAINED_LOSS, f"{name}{AND_BASE}"))
    }
    times = in_turns(runs, rounds=plan.rounds, device=device)
    found = {}
    for named, run in runs.items():
        with counted(engine.model) as positions:
            peak = peak_of(run, device=device)
        found[named] = Taken(times[named], peak, positions.count)
    return found


def _settings(kind: str, *, attention: str, row_tokens: int) -> TrainSettings:
    return settings(
        device=kind, dtype="bfloat16", attention=attention, activation_checkpointing="on", row_tokens=row_tokens
    )


def _use(plan: Plan, name: str, times: Times, work: Work, *, rate: float) -> Use:
    return Use(
        section=plan.name,
        contender=name,
        useful_flops=useful_flops(plan.model, work, rank=RANK),
        wall_s=times.best,
        matrix_rate=rate,
    )

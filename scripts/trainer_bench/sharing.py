"""A session's calls in one packed row beside each call in a row of its own: tokens, time, and equal gradients.

Both are the engine's own step. A call by itself is the fairest there is without sharing: no padding, plain causal
attention, its head on its trained tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clawloop_server.trainer.engine import TrainEngine
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample
from trainer_bench.engines import (
    OPEN_LOSS,
    TRAINED_LOSS,
    as_sampled,
    counted,
    gradients,
    open_engine,
    random_folder,
    settings,
)
from trainer_bench.measure import Times, in_turns
from trainer_bench.report import CLOSE, Equality, Row, Section, Target, equality, faster, row
from trainer_bench.shapes import APPEND_ONLY, OPENCLAW, QUICK, SMALL, SessionShape, call_work, session, shorter

SHARED, UNSHARED = "shared", "a row a call"
AND_BASE = ", kl_beta as trained"
"""what is added to a name where the base computes its logprobs too"""


@dataclass(frozen=True)
class Case:
    """A session, and how many times fewer tokens and less time sharing is to take."""

    shape: SessionShape
    fewer: float
    faster: float


CASES = (Case(APPEND_ONLY, 4.9, 4.0), Case(OPENCLAW, 3.0, 2.0))


def step(
    engine: TrainEngine, samples: Sequence[Sample], *, share: bool, loss: LossSettings = OPEN_LOSS
) -> Callable[[], None]:
    """A forward and backward of all samples: together, or each call by itself."""
    total = float(sum(len(sample.trained) for sample in samples))
    parts = [list(samples)] if share else [[sample] for sample in samples]

    def run() -> None:
        engine.model.zero_grad(set_to_none=True)
        for part in parts:
            engine.forward_backward(part, loss, normalizer=total)

    return run


@dataclass(frozen=True)
class Compared:
    """What sharing changed: times and positions of both, and whether the gradients are the same."""

    times: dict[str, Times]
    positions: dict[str, int]
    gradients: Equality


def compare(
    engine: TrainEngine,
    samples: Sequence[Sample],
    *,
    rounds: int,
    name: str,
    device: torch.device | None = None,
    close: float = CLOSE,
    loss: LossSettings = OPEN_LOSS,
) -> Compared:
    """Both in turns on the same engine."""
    runs = {
        SHARED: step(engine, samples, share=True, loss=loss),
        UNSHARED: step(engine, samples, share=False, loss=loss),
    }
    positions, found = {}, {}
    for contender, run in runs.items():
        with counted(engine.model) as seen:
            run()
        positions[contender], found[contender] = seen.count, gradients(engine.model)
    equal = equality(f"{name}: shared and a row a call", found[SHARED], found[UNSHARED], close=close)
    return Compared(in_turns(runs, rounds=rounds, device=device), positions, equal)


def rows_of(name: str, compared: Compared, *, tokens: int) -> list[Row]:
    """The rows of a comparison."""
    return [
        row(name, contender, times, tokens=tokens, computed=compared.positions[contender])
        for contender, times in compared.times.items()
    ]


def measure(*, rounds: int, threads: int, quick: bool) -> Section:
    """Every case, and again with the distance to the base; if `quick`, on a smaller model and eight times shorter.
    Targets are those of the first."""
    model, found = QUICK if quick else SMALL, Section()
    with random_folder(model) as folder:
        engine = open_engine(folder, settings(threads=threads, device="cpu"))
    for case in CASES:
        shape = shorter(case.shape, 8) if quick else case.shape
        samples = as_sampled(engine, session(shape, vocab=model.vocab))
        tokens = call_work(samples).tokens
        for loss, name in ((OPEN_LOSS, shape.name), (TRAINED_LOSS, f"{shape.name}{AND_BASE}")):
            compared = compare(engine, samples, rounds=rounds, name=name, loss=loss)
            found += Section(
                rows=rows_of(name, compared, tokens=tokens),
                equalities=[compared.gradients],
                targets=targets(case, compared) if loss is OPEN_LOSS else [],
            )
    return found


def targets(case: Case, compared: Compared) -> list[Target]:
    """How many times fewer positions and less time, by the fastest rounds."""
    fewer, times = compared.positions[UNSHARED] / compared.positions[SHARED], compared.times
    return [
        Target(name=f"{case.shape.name}: times fewer tokens", found=fewer, at_least=case.fewer),
        *faster(f"{case.shape.name}: times less time", times[UNSHARED], times[SHARED], at_least=case.faster),
    ]

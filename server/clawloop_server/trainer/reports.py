"""What is told and kept of a round: when it begins, when it ends, and what the database has of it. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from clawloop_server.release.gate import Decision, Verdict
from clawloop_server.release.records import RoundState
from clawloop_server.trainer.delta_round import DeltaRound
from clawloop_server.trainer.loop import Plan, RoundResult, TrainState
from clawloop_server.trainer.running import RunningRound

AnyRound = RunningRound | DeltaRound
NOTHING_LEARNED = "nothing was learned from: all of it was forgotten meanwhile, or set aside"


class RoundBegan(msgspec.Struct, frozen=True, kw_only=True):
    """What a round starts with; one line of the trainer's output. `updates` is what it will be unless groups or what is
    set aside make it another number; each update says it."""

    round_id: str
    base_version: int
    trajectories: int
    steps: int
    updates: int
    done: int = 0
    """updates that were made before a crash"""
    learned: int = 0
    """trajectories that these learned from"""
    deltas: int = 0
    """that wait to join it"""


class RoundReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a round came to; one line of the trainer's output."""

    round_id: str
    state: RoundState
    verdict: str
    reason: str
    version: int | None
    trajectories: int
    steps: int
    updates: int
    reward: float
    evaluated: float
    evaluated_before: float
    set_aside: int
    seconds: float
    deltas: int = 0
    """that are in the adapter"""


def nothing_joined(result: RoundResult) -> str:
    """Why a round of deltas alone made nothing."""
    reasons = sorted(set(result.deltas.values()))
    return f"none of {len(result.deltas)} deltas could be joined: {'; '.join(reasons)}" if reasons else NOTHING_LEARNED


def round_state(result: RoundResult, decision: Decision) -> RoundState:
    """What a round came to."""
    if not result.lineage:
        return RoundState.FAILED
    return RoundState.REFUSED if decision.verdict is Verdict.REFUSED else RoundState.PASSED


def began_of(running: AnyRound, *, deltas: int) -> RoundBegan:
    """What a round starts with."""
    return RoundBegan(
        round_id=running.round_id,
        base_version=running.under_way.base_version,
        trajectories=running.under_way.trajectories,
        steps=running.under_way.steps,
        updates=len(running.plan.batches),
        done=running.progress.at_update,
        learned=len(running.progress.learned),
        deltas=deltas,
    )


def no_result(state: TrainState, plan: Plan) -> RoundResult:
    """A round that learned from nothing."""
    return RoundResult(
        state=state,
        updates=[],
        trajectory_ids=[],
        steps=0,
        reward=0.0,
        set_aside=plan.set_aside,
        rejected_steps=plan.rejected_steps,
    )


def metrics_of(result: RoundResult, decision: Decision) -> dict[str, Any]:
    """What the database keeps of a round."""
    return {
        "verdict": decision.verdict,
        "evaluation": msgspec.structs.asdict(decision.evaluation),
        "reward": result.reward,
        "updates": result.updates,
        "set_aside": result.set_aside,
        "rejected_steps": result.rejected_steps,
        **({"joined": result.joined, "deltas": result.deltas} if result.deltas else {}),
        **({"conflict": result.conflict} if result.conflict else {}),
        **({"split": result.split} if result.split else {}),
    }

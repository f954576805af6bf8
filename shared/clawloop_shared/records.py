"""The records: step, signal, trajectory and what they are made of. Frozen values, checked once at the border.

Law 1 lives here: a step's ids and logprobs are those that the engine consumed and sampled. A logprob that is
missing or not finite makes the step untrainable; it is never replaced by a number. What redaction took out has none
(None), and its position is not learned from.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise

import msgspec

from clawloop_shared.errors import LogprobError, RecordError

SCHEMA = 1
MAX_STEP_TOKENS = 1 << 20
MAX_HINT_TOKENS = 4096


class Channel(StrEnum):
    """Which use a step is for. The two are never mixed."""

    TRAIN = "train"
    """may be learned from"""
    VAL = "val"
    """only evaluates"""


class Target(StrEnum):
    """What a signal judges."""

    STEP = "step"
    """one model call"""
    RUN = "run"
    """one user turn and its tool loop"""
    SESSION = "session"
    """one conversation"""
    TRAJECTORY = "trajectory"
    """steps that a caller grouped by itself"""


class Policy(msgspec.Struct, frozen=True):
    """A model line at an adapter version. Version 0 is the base without an adapter, and has no adapter hash."""

    line: str
    version: int = 0
    adapter_sha256: str = ""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the response was sampled. The logprobs of a step are those of this distribution (temperature applied)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    @property
    def truncates(self) -> bool:
        """Whether the sampler cut the distribution, which the logprobs do not show."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class Step(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One model call, token-exact. All lists of the response have one entry a sampled token, end token included.

    `group_size` is how many trajectories its group will have; 0: not known.
    `redacted` are spans (start, length) of prompt and response ids whose tokens were replaced before the step left its
    device. A logprob is None where the token was replaced, or where what came before it was and it could not be scored
    anew. A step that its device keeps has every logprob and no such span.
    """

    step_id: str
    session_id: str
    run_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_logprobs: Sequence[float | None]
    policy: Policy
    sampling: Sampling
    finish_reason: str
    created_ms: int
    parent_id: str = ""
    trajectory_id: str = ""
    group_id: str = ""
    group_size: int = 0
    channel: Channel = Channel.TRAIN
    untrainable: str = ""
    redacted: list[tuple[int, int]] = []

    @property
    def trainable(self) -> bool:
        """Whether the server may learn from it; `untrainable` holds the reason if not."""
        return not self.untrainable

    @property
    def logprobs(self) -> list[float]:
        """The logprobs of a step that has every one.

        Raises:
            RecordError: one is masked.
        """
        found = [logprob for logprob in self.response_logprobs if logprob is not None]
        if len(found) < len(self.response_logprobs):
            raise RecordError(f"step {self.step_id}: {len(self.response_logprobs) - len(found)} logprobs are masked")
        return found

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response in one list."""
        return self.prompt_ids + self.response_ids


class Hint(msgspec.Struct, frozen=True):
    """What a step should have known, as tokens: with `token_ids` put before position `at` of its prompt ids, the policy
    is its own teacher. Text that reached no model before; the step's own ids stay as they are."""

    step_id: str
    at: int
    token_ids: list[int]


class Signal(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One judgement. Rewards are computed from signals and never stored over them.

    `evidence` says what shows it (a rule, an exit code, the step that followed), `comment` what the judge said of it.
    """

    signal_id: str
    target: Target
    target_id: str
    source: str
    value: float
    created_ms: int
    weight: float = 1.0
    comment: str = ""
    evidence: str = ""
    hint: Hint | None = None


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """The owner's word on whether a step may be learned from; the latest counts. It never makes trainable what is not
    token-exact."""

    mark_id: str
    step_id: str
    trainable: bool
    created_ms: int


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """An ordered list of steps that is rewarded as one. `reward` and `weight` come from `signals`. `device_id` is the
    server's own name of the device that sent it; empty on a device."""

    trajectory_id: str
    steps: list[Step]
    signals: list[Signal]
    reward: float
    weight: float
    group_id: str = ""
    channel: Channel = Channel.TRAIN
    device_id: str = ""


class StepBatch(msgspec.Struct, frozen=True, tag="steps.v1"):
    """What an outbox item holds: steps, signals and marks in the order in which they were kept."""

    steps: list[Step] = []
    signals: list[Signal] = []
    marks: list[Mark] = []


def check_step(step: Step) -> Step:
    """Return `step` if it keeps the rules of its record.

    Raises:
        LogprobError: as many logprobs as ids are not there, one is not a finite number <= 0, one is masked without a
            reason, or all are.
        RecordError: an empty side, a negative id, a redacted span outside the ids, a temperature that samples nothing.
    """
    where = f"step {step.step_id}"
    if not step.prompt_ids or not step.response_ids:
        raise RecordError(
            f"{where}: {len(step.prompt_ids)} prompt and {len(step.response_ids)} response ids; needs both"
        )
    if len(step.prompt_ids) + len(step.response_ids) > MAX_STEP_TOKENS:
        raise RecordError(f"{where}: more than {MAX_STEP_TOKENS} tokens")
    if min(step.prompt_ids) < 0 or min(step.response_ids) < 0:
        raise RecordError(f"{where}: a token id is negative")
    if len(step.response_logprobs) != len(step.response_ids):
        raise LogprobError(f"{where}: {len(step.response_logprobs)} logprobs for {len(step.response_ids)} response ids")
    _check_spans(step, where)
    _check_logprobs(step, where)
    if not (math.isfinite(step.sampling.temperature) and step.sampling.temperature > 0):
        raise RecordError(f"{where}: temperature {step.sampling.temperature} gives no distribution to learn from")
    return step


def _check_spans(step: Step, where: str) -> None:
    size = len(step.prompt_ids) + len(step.response_ids)
    for start, length in step.redacted:
        if start < 0 or length < 1 or start + length > size:
            raise RecordError(f"{where}: redacted span {start}+{length} is not within its {size} tokens")
    if any(start + length > following for (start, length), (following, _) in pairwise(step.redacted)):
        raise RecordError(f"{where}: its redacted spans are not in order, or overlap")


def _check_logprobs(step: Step, where: str) -> None:
    prompt = len(step.prompt_ids)
    first = step.redacted[0][0] - prompt if step.redacted else len(step.response_ids)
    replaced = {at - prompt for start, length in step.redacted for at in range(max(start, prompt), start + length)}
    for position, logprob in enumerate(step.response_logprobs):
        if logprob is None:
            if position < first:
                raise LogprobError(f"{where}: no logprob at response position {position}, before anything was redacted")
        elif position in replaced:
            raise LogprobError(f"{where}: response position {position} was redacted, but still has a logprob")
        elif not math.isfinite(logprob) or logprob > 1e-4:
            raise LogprobError(
                f"{where}: logprob {logprob} at response position {position} is not a finite number <= 0"
            )
    if all(logprob is None for logprob in step.response_logprobs):
        raise LogprobError(f"{where}: redaction left no logprob of its response")


def check_signal(signal: Signal) -> Signal:
    """Return `signal` if it keeps the rules of its record.

    Raises:
        RecordError: a value outside [-1, 1], a weight outside (0, 1], no target, or a hint of no use.
    """
    where = f"signal {signal.signal_id}"
    if not math.isfinite(signal.value) or not -1.0 <= signal.value <= 1.0:
        raise RecordError(f"{where}: value {signal.value} is outside [-1, 1]")
    if not math.isfinite(signal.weight) or not 0.0 < signal.weight <= 1.0:
        raise RecordError(f"{where}: weight {signal.weight} is outside (0, 1]")
    if not signal.target_id:
        raise RecordError(f"{where}: no {signal.target} is named")
    if signal.hint is not None:
        _check_hint(signal.hint, where)
    return signal


def _check_hint(hint: Hint, where: str) -> None:
    if not hint.step_id or not 0 < hint.at <= MAX_STEP_TOKENS:
        raise RecordError(f"{where}: its hint is for position {hint.at} of step {hint.step_id!r}")
    if not 0 < len(hint.token_ids) <= MAX_HINT_TOKENS or min(hint.token_ids) < 0:
        raise RecordError(f"{where}: its hint has {len(hint.token_ids)} ids; 1 to {MAX_HINT_TOKENS}, none negative")

"""What the pool gives and takes, beside the records that both sides share. Frozen values, no storage."""

from typing import Any

import msgspec

from clawloop_shared.records import Channel, Signal, Step

Json = dict[str, Any]


class KeptStep(msgspec.Struct, frozen=True, kw_only=True, tag="kept.v1"):
    """One model call as the pool keeps it: its tokens, and what the client and the model said. Not changed after.

    `messages` and `tools` are those of the request as the client sent them, `reply` is the assistant message that was
    delivered, `text` the raw decoded response. Times are milliseconds since 1970. `trajectory_step` is its number in
    the trajectory that its caller named, if it named one.
    """

    step: Step
    messages: list[Json]
    reply: Json
    started_ms: int
    finished_ms: int
    tools: list[Json] = []
    text: str = ""
    kind: str = "main"
    app: str = ""
    first_token_ms: int = 0
    trajectory_step: int | None = None


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a list of sessions."""

    session_id: str
    app: str
    title: str
    steps: int
    trainable: int
    first_ms: int
    last_ms: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A step or a signal in the order in which the pool took it; `seq` never repeats, even after deletions."""

    seq: int
    step: Step | None = None
    signal: Signal | None = None


class StepLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a list of steps. `untrainable` says why nothing may be learned from it; empty: it may be.

    The numbers of tokens are 0 in steps that were kept before they were counted.
    """

    seq: int
    step_id: str
    session_id: str
    kind: str
    app: str
    untrainable: str
    at_ms: int
    policy_version: int
    prompt_tokens: int
    response_tokens: int
    run_id: str = ""
    parent_id: str = ""
    trajectory_id: str = ""
    group_id: str = ""
    channel: Channel = Channel.TRAIN


class StepLink(msgspec.Struct, frozen=True, kw_only=True):
    """A step's place in the tree of its session, without what was said. `seq` is its place among the changes."""

    seq: int
    step_id: str
    session_id: str
    run_id: str
    trajectory_id: str
    parent_id: str
    kind: str
    trainable: bool


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What a step adds to the transcript of its session: the messages that came since its base, and what was said."""

    step: StepLine
    messages: list[Json]
    reply: Json
    text: str


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What a signal is about, in numbers: its trajectory, how many steps, and how many tokens were sampled for them."""

    trajectory: str
    steps: int
    response_tokens: int


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts and sizes. `payload_bytes` is what is sealed, `file_bytes` what lies on disk (log included).

    `encryption` says what encrypts it, in words.
    """

    encryption: str
    sessions: int
    steps: int
    trainable: int
    signals: int
    payload_bytes: int
    file_bytes: int
    last_seq: int
    queued: int
    queued_bytes: int
    refused: int


class StepCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many steps there are of one kind from one app that may be learned from, or may not for one reason."""

    kind: str
    app: str
    untrainable: str
    steps: int


class PoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` read and what it found wrong; no problems means that everything opens and adds up."""

    sessions: int
    steps: int
    signals: int
    sealed: int
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

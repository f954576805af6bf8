"""Builds the record of one call and hands it to the pool's writer, off the hot path.

Keeping never delays a token and never fails a call: what could not be kept is counted and logged, without content. Only
the end of an answer waits until the disk has it, so that what a client has whole survives kill -9.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec

from clawloop_edge.errors import PoolFull
from clawloop_edge.gateway.call import Call
from clawloop_edge.gateway.idempotency import FINISHED
from clawloop_edge.gateway.reply import CUT, Reply
from clawloop_edge.gateway.source import Answer
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions.classify import Kind
from clawloop_edge.sessions.identity import Identity
from clawloop_edge.sessions.tracker import REPLY_INDEX, Placement, Tracker
from clawloop_shared.errors import RecordError
from clawloop_shared.records import Step, check_step

_LOG = logging.getLogger(__name__)
_LOG_EVERY_S = 60.0
SEAT_INDEX = "seat"
"""the pool's look-up from a trajectory and a step's number in it"""
KEPT_WITHIN_S = 1.0
"""how long the end of an answer waits for the disk"""
TRAJECTORY_COMPLETE = "trajectory complete"
Clock = Callable[[], float]


class KeepsSteps(Protocol):
    """The part of the pool that the recorder needs."""

    def keep_step(self, kept: KeptStep, *, index: dict[str, bytes]) -> "Future[None]": ...


class LiveCall(msgspec.Struct, kw_only=True):
    """One choice of a call in flight; complete once its last token is there. Times are ms since 1970."""

    step_id: str
    call: Call
    identity: Identity
    placed: Placement
    answer: Answer
    started_ms: int
    first_token_ms: int = 0
    finished_ms: int = 0
    lookups: dict[str, bytes] = {}
    """what its step is found by if it finishes"""
    kept: "Future[None] | None" = None
    """resolved when its step is on disk"""

    @property
    def reply(self) -> Reply:
        """What was answered so far."""
        return self.answer.reply


def reason_before(live: LiveCall) -> str:
    """Why nothing may be learned from a call, as far as is known before its first token; empty if it may."""
    sampling, kind = live.call.sampling, live.placed.kind
    if live.placed.unkept:
        return live.placed.unkept
    if live.answer.reason:
        return live.answer.reason
    if live.identity.seat is not None and live.identity.seat.closed:
        return TRAJECTORY_COMPLETE
    if kind is Kind.UNKNOWN:
        return "unknown traffic"
    if kind is not Kind.MAIN:
        return f"side request: {kind.value}"
    if sampling.temperature <= 0:
        return "temperature 0"
    if sampling.truncates:
        return "truncating sampler"
    if live.call.constrained:
        return "constrained decoding"
    return ""


def reason_after(live: LiveCall) -> str:
    """Why nothing may be learned from a call that is over; empty if it may."""
    ended = live.reply.ended
    if not live.placed.unkept and ended not in FINISHED:
        return ended
    return reason_before(live) or (CUT if live.reply.cut else "")


class Recorder:
    """Keeps steps."""

    def __init__(self, pool: KeepsSteps, tracker: Tracker, *, clock: Clock = time.monotonic) -> None:
        self._pool, self._tracker, self._clock = pool, tracker, clock
        self._logged_at = -_LOG_EVERY_S
        self.kept = 0
        self.failed = 0
        self.late = 0
        """answers that were ended before the disk had them"""

    def keep(self, live: LiveCall) -> "Future[None] | None":
        """Keep one call and let later calls continue it; the future is resolved when it is on disk.

        Nothing is kept of incognito calls, of those that continue what was forgotten, and of empty ones.
        """
        if live.placed.unkept or live.reply.empty:
            return None
        try:
            return self._keep(live)
        except Exception as error:  # noqa: BLE001 - the user is served first: whatever is wrong here, the call goes on
            self._failure(error)
            return None

    def _keep(self, live: LiveCall) -> "Future[None]":
        step = step_of(live)
        message, text = live.reply.message(), live.reply.text()
        prompt_text = live.answer.prompt.text
        # What was delivered verbatim comes back as text, whatever else it was told as.
        turn = {**message, "tool_calls": []} if live.call.verbatim else message
        chain = self._tracker.remember(live.placed, step, reply=turn, prompt_text=prompt_text, text=text)
        kept = KeptStep(
            step=step,
            messages=live.call.messages,
            tools=live.call.tools,
            reply=message,
            text=text,
            kind=live.placed.kind.value,
            app=live.placed.app,
            started_ms=live.started_ms,
            first_token_ms=live.first_token_ms,
            finished_ms=live.finished_ms,
            trajectory_step=live.identity.seat.index if live.identity.seat else None,
        )
        future = self._pool.keep_step(kept, index={REPLY_INDEX: chain, **_lookups(live)})
        future.add_done_callback(self._settled)
        return future

    async def on_disk(self, lives: Sequence[LiveCall]) -> None:
        """Wait until these are kept or cannot be, but no longer than `KEPT_WITHIN_S`: the user is served first."""
        writes = [asyncio.wrap_future(live.kept) for live in lives if live.kept is not None]
        for write in writes:
            write.add_done_callback(_seen)
        late = (await asyncio.wait(writes, timeout=KEPT_WITHIN_S))[1] if writes else ()
        self.late += len(late)

    def _settled(self, future: "Future[None]") -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None or future.cancelled():
            self._failure(error)
        else:
            self.kept += 1

    def _failure(self, error: BaseException | None) -> None:
        self.failed += 1
        if isinstance(error, PoolFull):  # it was said once what is full; nothing is lost by a fault
            return
        if self._clock() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = self._clock()
            _LOG.error("steps that could not be kept so far: %d; the latest: %s", self.failed, type(error).__name__)


def _seen(future: "asyncio.Future[None]") -> None:
    if not future.cancelled():
        future.exception()  # `_settled` has told of it


def seat_key(trajectory_id: str, index: int) -> bytes:
    """What the step with this number of a trajectory is found by, under `SEAT_INDEX`."""
    return f"{trajectory_id}\0{index}".encode()


def _lookups(live: LiveCall) -> dict[str, bytes]:
    seat = live.identity.seat
    seated = {SEAT_INDEX: seat_key(seat.trajectory_id, seat.index)} if seat else {}
    return {**seated, **(live.lookups if live.reply.ended in FINISHED else {})}


def step_of(live: LiveCall) -> Step:
    """The record of a call; one that breaks the rules of trainable steps says so."""
    seat = live.identity.seat
    step = Step(
        step_id=live.step_id,
        session_id=live.placed.session_id,
        run_id=live.placed.run_id,
        parent_id=live.placed.parent_id,
        prompt_ids=live.answer.prompt.ids,
        response_ids=live.reply.ids,
        response_logprobs=live.reply.logprobs,
        policy=live.answer.policy,
        sampling=live.call.sampling,
        finish_reason=live.reply.ended,
        created_ms=seat.created_ms if seat else live.started_ms,
        trajectory_id=seat.trajectory_id if seat else "",
        group_id=seat.group_id if seat else "",
        group_size=seat.group_size if seat else 0,
        channel=live.identity.channel,
        untrainable=reason_after(live),
    )
    if step.untrainable:
        return step
    try:
        return check_step(step)
    except RecordError:
        return msgspec.structs.replace(step, untrainable="no logprob for every token")

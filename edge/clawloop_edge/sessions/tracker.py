"""Puts each call into its session, run and tree, from the names it carries and from what was recorded before.

Remembers the steps of late in memory and asks the pool for older ones, so that a restart does not forget.
Knows no HTTP.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions import tree
from clawloop_edge.sessions.classify import Kind, Traffic
from clawloop_edge.sessions.identity import Identity
from clawloop_edge.sessions.memory import Known, StepMemory, known_ids
from clawloop_edge.sessions.splice import Sampled
from clawloop_edge.sessions.tree import Turn
from clawloop_shared.errors import ClawloopError
from clawloop_shared.ids import new_id
from clawloop_shared.records import Step

_LOG = logging.getLogger(__name__)
FindKept = Callable[[bytes, str | None], KeptStep | None]
"""the latest kept step whose reply ends this chain, in any session or in this one; blocking, run in a thread"""
Decode = Callable[[Sequence[int]], str]
_POOL_DEPTH = 4
REPLY_INDEX = "reply"
"""the pool's look-up from the chain that a step's reply ends"""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a call belongs. `reply_index` is the parent's reply among the call's messages, -1 if it is not there.

    `chain` is the hash of the conversation that the call sent.
    """

    session_id: str
    run_id: str
    kind: Kind
    app: str
    chain: bytes
    parent: Known | None = None
    reply_index: int = -1

    @property
    def parent_id(self) -> str:
        """The step that this one continues, or an empty string."""
        return self.parent.step_id if self.parent else ""


class Tracker:
    """Sessions as trees of steps, on the event loop's thread."""

    def __init__(self, memory: StepMemory, *, find_kept: FindKept, decode: Decode) -> None:
        self._memory, self._find_kept, self._decode = memory, find_kept, decode

    async def place(self, messages: Sequence[dict[str, Any]], *, identity: Identity, traffic: Traffic) -> Placement:
        """Find the session, the run and the parent of a call."""
        turns = tree.turns_of(messages)
        chain = tree.chain(turns)
        wanted = identity.session_id
        found = self._recent(turns, chain, wanted) or await self._kept(turns, chain, wanted)
        parent, position = found or (None, -1)
        session_id = self._session(identity, parent)
        placed = Placement(
            session_id=session_id,
            run_id=_run(identity, parent, turns[position + 1 :]),
            kind=traffic.kind,
            app=traffic.app,
            chain=chain[-1] if chain else tree.ROOT,
            parent=parent or self._memory.last_of(session_id),
            reply_index=turns[position].index if parent else -1,
        )
        if parent is not None:
            self._memory.mark_continued(parent.step_id)
        if identity.trace_id and not identity.incognito:
            self._memory.set_session_of(identity.trace_id, session_id)
        return placed

    def remember(self, placed: Placement, step: Step, *, reply: dict[str, Any], prompt_text: str, text: str) -> bytes:
        """Let later calls continue this step; returns the chain by which it is found."""
        chain = tree.reply_hash(placed.chain, reply)
        known = Known(
            step_id=step.step_id,
            session_id=step.session_id,
            run_id=step.run_id,
            kind=placed.kind,
            sampled=_sampled(step, prompt_text, text),
        )
        calls = reply.get("tool_calls") or []
        ids = tuple(tree.call_id_key(call["id"]) for call in calls)
        self._memory.add(known, chain=chain, call_ids=ids, main=placed.kind is Kind.MAIN)
        return chain

    def _recent(self, turns: list[Turn], chain: list[bytes], session_id: str) -> tuple[Known, int] | None:
        for position in _replies(turns):
            found = self._memory.find(chain[position], call_ids=turns[position].call_ids, session_id=session_id)
            if found is not None:
                return found, position
        return None

    async def _kept(self, turns: list[Turn], chain: list[bytes], session_id: str) -> tuple[Known, int] | None:
        positions = _replies(turns)[:_POOL_DEPTH]
        if not positions:
            return None
        try:
            return await asyncio.to_thread(self._search, positions, chain, session_id=session_id)
        except ClawloopError as error:  # the user is served first: without its parent a call is only encoded anew
            _LOG.warning("an earlier step could not be looked up, its ids are not reused: %s", type(error).__name__)
            return None

    def _search(self, positions: list[int], chain: list[bytes], *, session_id: str) -> tuple[Known, int] | None:
        for position in positions:
            kept = self._find_kept(chain[position], session_id or None)
            if kept is not None:
                return self._known(kept), position
        return None

    def _known(self, kept: KeptStep) -> Known:
        step = kept.step
        prompt_text, text = self._decode(step.prompt_ids), self._decode(step.response_ids)
        return Known(
            step_id=step.step_id,
            session_id=step.session_id,
            run_id=step.run_id,
            kind=kept.kind,
            sampled=_sampled(step, prompt_text, text),
        )

    def _session(self, identity: Identity, parent: Known | None) -> str:
        if identity.session_id:
            return identity.session_id
        by_trace = self._memory.session_of(identity.trace_id) if identity.trace_id else ""
        return by_trace or (parent.session_id if parent else new_id())


def _replies(turns: list[Turn]) -> list[int]:
    """Where the assistant speaks, last first."""
    return [position for position in range(len(turns) - 1, -1, -1) if turns[position].role == "assistant"]


def _run(identity: Identity, parent: Known | None, new: list[Turn]) -> str:
    if identity.trace_id:
        return identity.trace_id
    if parent is not None and all(turn.role == "tool" for turn in new):
        return parent.run_id
    return new_id()


def _sampled(step: Step, prompt_text: str, text: str) -> Sampled:
    ids = known_ids(step.token_ids)
    return Sampled(prompt_text + text, ids, reply_char=len(prompt_text), reply_id=len(step.prompt_ids))

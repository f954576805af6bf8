"""Puts each call into its session, run and tree, from the names it carries and from what was recorded before.

Remembers the steps of late in memory and asks the pool for older ones, so that a restart does not forget.
Knows no HTTP.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions import tree
from clawloop_edge.sessions.classify import Kind, Traffic
from clawloop_edge.sessions.hidden import Hidden
from clawloop_edge.sessions.identity import Identity
from clawloop_edge.sessions.memory import Known, StepMemory, known_ids
from clawloop_edge.sessions.splice import Sampled
from clawloop_edge.sessions.tree import Turn
from clawloop_shared.ids import new_id
from clawloop_shared.records import Step

_LOG = logging.getLogger(__name__)
FindKept = Callable[[bytes, str | None], KeptStep | None]
"""the latest kept step whose reply ends this chain, in any session or in this one; blocking, run in a thread"""
FindLast = Callable[[str], KeptStep | None]
"""the latest kept main-line step of a session; blocking, run in a thread"""
Forgot = Callable[[str, Sequence[bytes]], bool]
"""whether a session was forgotten, or a reply that ends one of these chains; blocking, run in a thread"""
FindRun = Callable[[str], Sequence[KeptStep]]
"""the latest kept step of a run in each of its sessions; blocking, run in a thread"""
Decode = Callable[[Sequence[int]], str]
_POOL_DEPTH = 4
REPLY_INDEX = "reply"
"""the pool's look-up from the chain that a step's reply ends"""
_INNER = frozenset({Kind.TITLE, Kind.COMPACTION, Kind.RECAP, Kind.SLUG, Kind.REVIEW, Kind.HELPER})
"""requests about a conversation, whose own messages are none"""


class Link(StrEnum):
    """What a call's parent is to it."""

    CHAIN = "chain"
    """its reply stands in the call's history, and so does all that was before it"""
    CALL = "call"
    """one of its tool calls stands in the call's history, but what was before it was rewritten"""
    SESSION = "session"
    """it is the latest main-line step of the session; nothing of the history is known"""
    NONE = "none"
    """there is none: the call begins a session"""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a call belongs. `reply_index` is the parent's reply among the call's messages, -1 if it is not there.

    `chain` is the hash of the conversation that the call sent. `incognito` says that nothing of the call may be kept,
    because it asked for that itself or has in its history what was said incognito; `forgotten` says so too, because the
    conversation that it continues was forgotten. `said` are the replies since the
    user last spoke, by their places among the messages, as they were sampled; `called` the arguments of all tool calls,
    as they were sampled, by the places of the replies that made them.
    """

    session_id: str
    run_id: str
    kind: Kind
    app: str
    chain: bytes
    parent: Known | None = None
    reply_index: int = -1
    link: Link = Link.NONE
    incognito: bool = False
    forgotten: bool = False
    said: tuple[tuple[int, Sampled], ...] = ()
    called: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def unkept(self) -> str:
        """Why nothing of the call may be kept; empty if it may."""
        return "incognito" if self.incognito else "forgotten" if self.forgotten else ""

    @property
    def parent_id(self) -> str:
        """The step that this one continues, or an empty string."""
        return self.parent.step_id if self.parent else ""


class _Talk(msgspec.Struct, frozen=True):
    """A call's conversation, its hash up to each turn, and where the assistant speaks, last first."""

    turns: list[Turn]
    chain: list[bytes]
    replies: list[int]

    @property
    def first(self) -> bytes:
        """The first turn, empty if there is none."""
        return self.turns[0].digest if self.turns else b""

    def after(self, position: int) -> list[bytes]:
        """The hashes up to each place where the assistant speaks after the turn at `position`, last first."""
        return [self.chain[each] for each in self.replies if each > position]


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """A parent, its reply's place among the turns (-1: not there), and the session, empty if it is a new one.

    `forgotten`: the session, or what was said after the parent's reply, was forgotten.
    """

    session_id: str = ""
    parent: Known | None = None
    position: int = -1
    link: Link = Link.NONE
    forgotten: bool = False


class Tracker:
    """Sessions as trees of steps, on the event loop's thread."""

    def __init__(
        self,
        memory: StepMemory,
        *,
        find_kept: FindKept,
        decode: Decode,
        find_last: FindLast = lambda session_id: None,
        find_run: FindRun = lambda run_id: (),
        forgot: Forgot = lambda session_id, chains: False,
    ) -> None:
        self._memory, self._hidden, self._decode = memory, Hidden(), decode
        self._find_kept, self._find_last, self._find_run = find_kept, find_last, find_run
        self._forgot = forgot

    async def place(
        self, messages: Sequence[dict[str, Any]], *, identity: Identity, traffic: Traffic, peek: bool = False
    ) -> Placement:
        """Find the session, the run and the parent of a call. With `peek` nothing is noted, as for a call that is only
        counted."""
        talk = _talk_of(messages)
        found = self._recent(talk, identity, kind=traffic.kind)
        if found.link is not Link.CHAIN or talk.after(found.position):
            found = await self._kept(talk, identity, kind=traffic.kind, recent=found)
        placed = Placement(
            session_id=found.session_id or new_id(),
            run_id=_run(identity, found, talk.turns[found.position + 1 :]),
            kind=traffic.kind,
            app=traffic.app,
            chain=talk.chain[-1] if talk.chain else tree.ROOT,
            parent=found.parent,
            reply_index=talk.turns[found.position].index if found.position >= 0 else -1,
            link=found.link,
            incognito=identity.incognito or self._continues_hidden(talk, found),
            forgotten=found.forgotten,
            said=self._said(talk, found),
            called=self._called(talk, found),
        )
        if not peek:
            self._note(placed, talk, identity)
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
            seated=bool(step.trajectory_id),
            arguments=_arguments(reply),
        )
        calls = reply.get("tool_calls") or []
        ids = tuple(tree.call_id_key(call["id"]) for call in calls)
        self._memory.add(known, chain=chain, call_ids=ids, main=placed.kind is Kind.MAIN)
        return chain

    def _said(self, talk: _Talk, found: _Found) -> tuple[tuple[int, Sampled], ...]:
        """What was sampled since the user last spoke, each with its place among the messages."""
        if found.link is not Link.CHAIN:
            return ()
        asked = max((at for at, turn in enumerate(talk.turns) if turn.role == "user"), default=-1)
        sessions = (found.session_id,)
        places = [position for position in reversed(talk.replies) if position > asked]
        known = (self._memory.find(talk.chain[p], call_ids=talk.turns[p].call_ids, sessions=sessions) for p in places)
        return tuple((talk.turns[p].index, step.sampled) for p, step in zip(places, known, strict=True) if step)

    def _called(self, talk: _Talk, found: _Found) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """The arguments of tool calls in the history as they were sampled, each with its reply's place."""
        if found.link is not Link.CHAIN:
            return ()
        known = {found.position: found.parent}
        for position in talk.replies:
            calls = talk.turns[position].call_ids
            if calls and position not in known:
                known[position] = self._memory.find(talk.chain[position], call_ids=calls, sessions=(found.session_id,))
        return tuple((talk.turns[p].index, step.arguments) for p, step in known.items() if step and step.arguments)

    def _note(self, placed: Placement, talk: _Talk, identity: Identity) -> None:
        if identity.trace_id and placed.kind not in _INNER:  # an incognito one too: what tells of it is in its session
            self._memory.join_trace(identity.trace_id, placed.session_id, first=talk.first)
        if placed.incognito:
            self._hidden.add(placed.chain, session_id=placed.session_id)
        elif placed.parent is not None and placed.link is not Link.SESSION:
            self._memory.mark_continued(placed.parent.step_id)

    def _continues_hidden(self, talk: _Talk, found: _Found) -> bool:
        if not self._hidden:
            return False
        if found.link is not Link.CHAIN and self._hidden.touches(found.session_id):
            return True  # its history is not what it was: it may tell in other words what was said incognito
        return self._hidden.holds(talk.chain) or self._hidden.holds(tree.shorter_hashes(talk.turns, talk.chain))

    def _recent(self, talk: _Talk, identity: Identity, *, kind: Kind) -> _Found:
        """By what is in memory: the history word for word, else a tool call in it, else the session's latest step."""
        named = identity.session_id
        traced = self._memory.sessions_of(identity.trace_id)
        for sessions in ((named,),) if named else (traced, None) if traced else (None,):
            for position in talk.replies:
                calls = talk.turns[position].call_ids
                known = self._memory.find(talk.chain[position], call_ids=calls, sessions=sessions)
                if known is not None:
                    return _Found(session_id=known.session_id, parent=known, position=position, link=Link.CHAIN)
        for position in talk.replies:
            known = self._memory.find_call(talk.turns[position].call_ids, sessions=(named,) if named else None)
            if known is not None:
                return _Found(session_id=known.session_id, parent=known, position=position, link=Link.CALL)
        session_id = named or _session_among(traced, talk, kind=kind)
        last = self._memory.last_of(session_id)
        return _Found(session_id=session_id, parent=last, link=Link.SESSION if last else Link.NONE)

    async def _kept(self, talk: _Talk, identity: Identity, *, kind: Kind, recent: _Found) -> _Found:
        """By what is in the pool, where memory did not know the history; `recent` if that knows no better."""
        if not talk.replies and (recent.parent or not (recent.session_id or identity.trace_id)):
            return recent
        try:
            return await asyncio.to_thread(self._look_up, talk, identity, kind=kind, recent=recent)
        except Exception as error:  # noqa: BLE001 - the user is served first: without its parent a call is encoded anew
            _LOG.warning("an earlier step could not be looked up, its ids are not reused: %s", type(error).__name__)
            return recent

    def _look_up(self, talk: _Talk, identity: Identity, *, kind: Kind, recent: _Found) -> _Found:
        found = recent
        if recent.link is not Link.CHAIN:
            found = self._search(talk, identity, kind=kind, recent=recent)
        unknown = "" if found.parent else found.session_id  # a session with steps was not forgotten
        forgotten = self._forgot(unknown, talk.after(found.position))
        return msgspec.structs.replace(found, forgotten=forgotten)

    def _search(self, talk: _Talk, identity: Identity, *, kind: Kind, recent: _Found) -> _Found:
        named = identity.session_id
        run = {} if named else self._kept_run(identity.trace_id)
        for position in talk.replies[:_POOL_DEPTH]:
            for session_id in (named,) if named else (*reversed(run), None):
                kept = self._find_kept(talk.chain[position], session_id)
                if kept is not None and (session_id is not None or not kept.step.trajectory_id):
                    known = self._known(kept)
                    return _Found(session_id=known.session_id, parent=known, position=position, link=Link.CHAIN)
        if recent.parent is not None:
            return recent
        session_id = recent.session_id or _session_among(run, talk, kind=kind)
        last = self._find_last(session_id) if session_id else None
        if last is None:
            return _Found(session_id=session_id)
        return _Found(session_id=session_id, parent=self._known(last), link=Link.SESSION)

    def _kept_run(self, trace_id: str) -> dict[str, bytes]:
        """The kept sessions of a trace, each with its first turn, latest last."""
        kept = self._find_run(trace_id) if trace_id else ()
        return {k.step.session_id: _talk_of(k.messages).first for k in reversed(kept)}

    def _known(self, kept: KeptStep) -> Known:
        step = kept.step
        prompt_text, text = self._decode(step.prompt_ids), self._decode(step.response_ids)
        return Known(
            step_id=step.step_id,
            session_id=step.session_id,
            run_id=step.run_id,
            kind=kept.kind,
            sampled=_sampled(step, prompt_text, text),
            seated=bool(step.trajectory_id),
            arguments=_arguments(kept.reply),
        )


def _talk_of(messages: Sequence[dict[str, Any]]) -> _Talk:
    turns = tree.turns_of(messages)
    replies = [position for position in range(len(turns) - 1, -1, -1) if turns[position].role == "assistant"]
    return _Talk(turns, tree.chain(turns), replies)


def _session_among(sessions: Mapping[str, bytes], talk: _Talk, *, kind: Kind) -> str:
    """The session of a trace (each with its first turn, latest last) that a call without names belongs to, or none.

    A trace may pass through several conversations: only one that begins like the call is the call's. A request about
    a conversation begins like none; it belongs to the trace's only one.
    """
    if kind in _INNER or not talk.turns:
        return next(iter(sessions)) if len(sessions) == 1 else ""
    return next((session_id for session_id, first in list(sessions.items())[::-1] if first == talk.first), "")


def _run(identity: Identity, found: _Found, new: list[Turn]) -> str:
    if identity.trace_id:
        return identity.trace_id
    if found.parent is not None and found.position >= 0 and all(turn.role == "tool" for turn in new):
        return found.parent.run_id
    return new_id()


def _arguments(reply: dict[str, Any]) -> tuple[str, ...]:
    return tuple(call["function"]["arguments"] for call in reply.get("tool_calls") or [])


def _sampled(step: Step, prompt_text: str, text: str) -> Sampled:
    ids = known_ids(step.token_ids)
    return Sampled(prompt_text + text, ids, reply_char=len(prompt_text), reply_id=len(step.prompt_ids))

"""The steps of late, bounded in number and bytes: what a next call may continue. The pool knows all the others.

Lives on the event loop; not for several threads.
"""

import sys
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from clawloop_edge.sessions.splice import Sampled

_ENTRY_BYTES = 600
_TRACES = 4096
_SESSIONS_A_TRACE = 256


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded step, as far as its successor needs it. `seated`: its session is a trajectory, which nobody
    continues without its name. `arguments` are those of its tool calls, as they were sampled."""

    step_id: str
    session_id: str
    run_id: str
    kind: str
    sampled: Sampled
    seated: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What it costs to remember, about."""
        text_bytes = sys.getsizeof(self.sampled.text) + sum(map(len, self.arguments))
        return _ENTRY_BYTES + text_bytes + 4 * len(self.sampled.ids)


def known_ids(ids: list[int]) -> "array[int]":
    """Token ids in 4 bytes each."""
    return array("I", ids)


class StepMemory:
    """Finds a step by the chain up to its reply, by the ids of its tool calls, or as the last of its session."""

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._steps: OrderedDict[str, tuple[Known, bytes, tuple[str, ...]]] = OrderedDict()
        self._bytes = 0
        self._by_chain: dict[bytes, list[str]] = {}
        self._by_call: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self._continued: set[str] = set()
        self._traces: OrderedDict[str, dict[str, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def size_bytes(self) -> int:
        """What all of them cost, about."""
        return self._bytes

    def add(self, known: Known, *, chain: bytes, call_ids: tuple[str, ...], main: bool) -> None:
        """Remember a step; the oldest ones go when there are too many."""
        self._forget(known.step_id)
        self._steps[known.step_id] = (known, chain, call_ids)
        self._bytes += known.size_bytes
        self._by_chain.setdefault(chain, []).append(known.step_id)
        self._by_call.update(dict.fromkeys(call_ids, known.step_id))
        if main:
            self._last[known.session_id] = known.step_id
        while self._steps and (len(self._steps) > self._max_entries or self._bytes > self._max_bytes):
            self._forget(next(iter(self._steps)))

    def find(self, chain: bytes, *, call_ids: tuple[str, ...], sessions: Collection[str] | None = None) -> Known | None:
        """The step whose reply ends this chain; with `sessions`, only one of these.

        Several conversations may be equal word for word; tool-call ids tell them apart, and else the latest one is
        taken that was not continued yet.
        """
        same = list(self._matching(reversed(self._by_chain.get(chain, [])), sessions))
        called = {self._by_call.get(call_id) for call_id in call_ids}
        fresh = (known for known in same if known.step_id not in self._continued)
        return next((known for known in same if known.step_id in called), next(fresh, same[0] if same else None))

    def find_call(self, call_ids: tuple[str, ...], *, sessions: Collection[str] | None = None) -> Known | None:
        """The step that made one of these tool calls, whatever its conversation was."""
        return next(self._matching(map(self._by_call.get, call_ids), sessions), None)

    def last_of(self, session_id: str) -> Known | None:
        """The latest main-line step of a session."""
        return next(self._matching([self._last.get(session_id)], (session_id,)), None)

    def sessions(self) -> set[str]:
        """The sessions of the steps in memory, and those that calls of a trace belong to."""
        return {known.session_id for known, _, _ in self._steps.values()}.union(*self._traces.values())

    def drop(self, sessions: Collection[str]) -> None:
        """Let go of the steps of these sessions. Their traces still lead to them, so that they are known by name."""
        for step_id in [step_id for step_id, (known, _, _) in self._steps.items() if known.session_id in sessions]:
            self._forget(step_id)

    def mark_continued(self, step_id: str) -> None:
        """A call has continued this step."""
        if step_id in self._steps:
            self._continued.add(step_id)
            self._steps.move_to_end(step_id)

    def sessions_of(self, trace_id: str) -> Mapping[str, bytes]:
        """The sessions that calls of this trace belong to, each with its conversation's first turn, latest last."""
        return MappingProxyType(self._traces.get(trace_id, {}))

    def join_trace(self, trace_id: str, session_id: str, *, first: bytes) -> None:
        """A call of this trace belongs to this session; known from the first call on, even while that is running."""
        sessions = self._traces.setdefault(trace_id, {})
        sessions.pop(session_id, None)
        sessions[session_id] = first
        if len(sessions) > _SESSIONS_A_TRACE:
            del sessions[next(iter(sessions))]
        self._traces.move_to_end(trace_id)
        if len(self._traces) > _TRACES:
            self._traces.popitem(last=False)

    def _matching(self, step_ids: Iterable[str | None], sessions: Collection[str] | None) -> Iterator[Known]:
        for step_id in step_ids:
            entry = self._steps.get(step_id or "")
            if entry is None:
                continue
            known = entry[0]
            if (not known.seated) if sessions is None else known.session_id in sessions:
                yield known

    def _forget(self, step_id: str) -> None:
        entry = self._steps.pop(step_id, None)
        if entry is None:
            return
        known, chain, call_ids = entry
        self._bytes -= known.size_bytes
        self._continued.discard(step_id)
        same = self._by_chain[chain]
        same.remove(step_id)
        if not same:
            del self._by_chain[chain]
        for call_id in call_ids:
            if self._by_call.get(call_id) == step_id:
                del self._by_call[call_id]
        if self._last.get(known.session_id) == step_id:
            del self._last[known.session_id]

"""What the tracker asks the pool about steps that memory does not know. Blocking: for a thread."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.tombstones import Tombstones, any_tombstone
from clawloop_edge.sessions.tracker import REPLY_INDEX

if TYPE_CHECKING:
    from sqlite_utils import Database


class StepSource(Protocol):
    """The part of the pool that is asked."""

    tombstones: Tombstones

    def read(self) -> AbstractContextManager["Database"]: ...
    def tag(self, name: str, value: bytes) -> bytes: ...
    def find_step_by(self, name: str, value: bytes, *, session_id: str | None = None) -> str | None: ...
    def get_step(self, step_id: str) -> KeptStep | None: ...
    def last_main_step(self, session_id: str) -> KeptStep | None: ...
    def run_steps(self, run_id: str) -> Sequence[KeptStep]: ...


class KeptSteps:
    """The look-ups of `Tracker`: `find_kept=by_reply`, `find_last=last_main`, `find_run=of_run`, `forgot=forgot`."""

    def __init__(self, pool: StepSource) -> None:
        self._pool = pool

    def by_reply(self, chain: bytes, session_id: str | None) -> KeptStep | None:
        """The latest step whose reply ends this chain, in any session or in this one."""
        step_id = self._pool.find_step_by(REPLY_INDEX, chain, session_id=session_id)
        return self._pool.get_step(step_id) if step_id else None

    def last_main(self, session_id: str) -> KeptStep | None:
        """The latest main-line step of a session."""
        return self._pool.last_main_step(session_id)

    def of_run(self, run_id: str) -> Sequence[KeptStep]:
        """The latest step of a run in each of its sessions, latest first."""
        return self._pool.run_steps(run_id)

    def forgot(self, session_id: str, chains: Sequence[bytes]) -> bool:
        """Whether this session was forgotten, or a step whose reply ends one of these chains."""
        stones = self._pool.tombstones
        with self._pool.read() as database:
            if not any_tombstone(database):
                return False
            by_reply = [self._pool.tag(REPLY_INDEX, chain) for chain in chains]
            return stones.forgot(database, session=session_id) or stones.forgot_lookup(database, by_reply)

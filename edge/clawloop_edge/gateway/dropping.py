"""Letting memory go of what was forgotten, by whichever process: steps, trajectories, answers, attention caches.

What is on its way through the gateway at that moment is answered; the pool itself refuses to keep it.
"""

import asyncio
import contextlib
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.errors import EngineGone
from clawloop_edge.gateway.idempotency import Retries
from clawloop_edge.gateway.trajectory_store import TrajectoryStore
from clawloop_edge.pool.tombstones import Tombstones
from clawloop_edge.sessions.memory import StepMemory

if TYPE_CHECKING:
    from sqlite_utils import Database


class ForgettingPool(Protocol):
    """The part of the pool that knows what was forgotten, and remembers steps itself."""

    tombstones: Tombstones

    def read(self) -> AbstractContextManager["Database"]: ...
    def drop_recent(self) -> "Future[None]": ...


class Dropper:
    """Drops from memory what the pool has forgotten; call it after something was. On the event loop's thread."""

    def __init__(
        self,
        pool: ForgettingPool,
        *,
        memory: StepMemory,
        trajectories: TrajectoryStore,
        retries: Retries,
        engine: Engine | TextEngine,
    ) -> None:
        self._pool, self._memory, self._trajectories = pool, memory, trajectories
        self._retries, self._engine = retries, None if isinstance(engine, TextEngine) else engine

    async def __call__(self) -> None:
        """Raises StorageError: the pool cannot be read."""
        names = self._memory.sessions().union(self._trajectories.names)
        forgotten = await asyncio.to_thread(self._forgotten, names)
        self._memory.drop(forgotten)
        self._trajectories.drop(forgotten)
        self._retries.drop()
        await asyncio.wrap_future(self._pool.drop_recent())
        if self._engine is not None:
            with contextlib.suppress(EngineGone):  # then nothing of it is left
                await self._engine.forget_prompts()

    def _forgotten(self, session_ids: Collection[str]) -> set[str]:
        with self._pool.read() as database:
            return self._pool.tombstones.forgotten_sessions(database, session_ids)

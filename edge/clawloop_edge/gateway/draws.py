"""What `/generate` sampled, until it comes back in a step: the proof that a submitted step was sampled here.

A draw is found by its prompt, and used once. One that never comes back is forgotten after a day, or with whatever else
is forgotten: no session names it. Knows no HTTP.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from clawloop_edge.gateway.schema import DRAW_SCOPE, prepare_draws
from clawloop_edge.gateway.trajectory_store import RoomPool
from clawloop_edge.pool.packing import pack_ints
from clawloop_shared.records import Policy, Sampling

if TYPE_CHECKING:
    from sqlite_utils import Database

T = TypeVar("T")
_KEPT_MS = 86_400_000
_EXPIRED_AT_ONCE = 64
_MOST_OF_A_PROMPT = 256


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """One response as it was sampled. `untrainable`: why nothing may be learned from it."""

    draw_id: str
    created_ms: int
    response_ids: list[int]
    logprobs: list[float]
    policy: Policy
    sampling: Sampling
    finish_reason: str
    untrainable: str = ""


class Draws:
    """The draws of a pool."""

    def __init__(self, pool: RoomPool) -> None:
        self._pool = pool
        prepare_draws(pool)

    async def keep(self, prompt_ids: Sequence[int], draw: Draw) -> None:
        """Keep a draw; returns once it is on disk."""
        tag = self._tag(prompt_ids)

        def operation(database: "Database") -> None:
            old = "SELECT draw_id FROM draws WHERE created_ms < ? LIMIT ?"
            expired = f"DELETE FROM draws WHERE draw_id IN ({old})"  # noqa: S608
            database.conn.execute(expired, (draw.created_ms - _KEPT_MS, _EXPIRED_AT_ONCE))
            scope = self._pool.keyring.ensure(database, DRAW_SCOPE)
            body = scope.seal("draws", draw.draw_id, column="body", plain=msgspec.msgpack.encode(draw))
            insert = "INSERT INTO draws (draw_id, tag, created_ms, body) VALUES (?, ?, ?, ?)"
            database.conn.execute(insert, (draw.draw_id, tag, draw.created_ms, body))

        await self._ask(operation)

    async def find(
        self, prompt_ids: Sequence[int], response_ids: list[int], *, but: Collection[str] = ()
    ) -> Draw | None:
        """The draw that begins with this response, the shortest one; not one of those named in `but`."""
        tag = self._tag(prompt_ids)

        def operation(database: "Database") -> list[Draw]:
            query = "SELECT draw_id, body FROM draws WHERE tag = ? ORDER BY created_ms DESC LIMIT ?"
            rows = database.conn.execute(query, (tag, _MOST_OF_A_PROMPT)).fetchall()
            if not rows:
                return []
            scope = self._pool.keyring.find(database, DRAW_SCOPE)
            plain = (scope.unseal("draws", draw_id, column="body", sealed=body) for draw_id, body in rows)
            return [msgspec.msgpack.decode(data, type=Draw) for data in plain]

        length = len(response_ids)
        same = [
            draw
            for draw in await self._ask(operation)
            if draw.draw_id not in but and draw.response_ids[:length] == response_ids
        ]
        return min(same, key=lambda draw: len(draw.response_ids), default=None)

    async def forget(self, draw_ids: Sequence[str]) -> None:
        """Forget draws that were used."""

        def operation(database: "Database") -> None:
            for draw_id in draw_ids:
                database.conn.execute("DELETE FROM draws WHERE draw_id = ?", (draw_id,))

        await self._ask(operation)

    def _tag(self, prompt_ids: Sequence[int]) -> bytes:
        return self._pool.tag("draw", pack_ints(list(prompt_ids)))

    async def _ask(self, operation: "Callable[[Database], T]") -> T:
        return await asyncio.shield(asyncio.wrap_future(self._pool.submit(operation)))

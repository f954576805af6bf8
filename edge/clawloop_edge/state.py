"""Small facts that `serve` and the other commands leave for each other in the pool, by name.

The pool keeps them sealed; each is one struct in the wire encoding, or absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.node.join import Membership
from clawloop_edge.pool.state import read_state, write_state
from clawloop_shared import wire

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

MEMBERSHIP = "membership"
WANTED = "adapter.wanted"
NODE_ID = "node.id"


class WantedAdapter(msgspec.Struct, frozen=True, tag="wanted.v1"):
    """The adapter version that the owner asked for by command; -1 asks for the one before the current."""

    version: int
    asked_ms: int


def membership(pool: Pool) -> Membership | None:
    """The server that this device joined, or None."""
    raw = pool.get_state(MEMBERSHIP)
    return wire.decode(raw, Membership) if raw else None


def keep_membership(pool: Pool, value: Membership) -> None:
    """Remember the server; returns when it is on disk."""
    pool.set_state(MEMBERSHIP, wire.encode(value)).result()


def forget_membership(pool: Pool) -> None:
    """Leave: the running edge stops talking to the server within a second. A wish for its adapters goes with it."""
    pool.set_state(WANTED, b"").result()
    pool.set_state(MEMBERSHIP, b"").result()


def wanted_adapter(pool: Pool) -> WantedAdapter | None:
    """What the owner asked for and did not get yet, or None."""
    raw = pool.get_state(WANTED)
    return wire.decode(raw, WantedAdapter) if raw else None


def want_adapter(pool: Pool, version: int, *, now_ms: int) -> None:
    """Ask the running edge for a version; returns when the wish is on disk."""
    pool.set_state(WANTED, wire.encode(WantedAdapter(version, now_ms))).result()


def done_wanting(pool: Pool, wish: WantedAdapter) -> None:
    """The wish was followed, or cannot be; a newer one stays. Returns when that is on disk."""

    def operation(database: Database) -> None:
        if read_state(database, pool.keyring, name=WANTED) == wire.encode(wish):
            write_state(database, pool.keyring, name=WANTED, value=b"")

    pool.submit(operation).result()


def node_id(pool: Pool) -> int:
    """The number that Flower last gave this device; 0 if it gave none."""
    return int.from_bytes(pool.get_state(NODE_ID) or b"", "big")


def keep_node_id(pool: Pool, number: int) -> None:
    """Remember Flower's number (unsigned 64 bits), so that a key left taken by a crash can be freed at once."""
    pool.set_state(NODE_ID, number.to_bytes(8, "big")).result()

"""Small facts that `serve` and the other commands leave for each other in the pool, by name.

The pool keeps them sealed; each is one struct in the wire encoding, or absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.adapters.log import KnownLog, LogBook
from clawloop_edge.node import leaving
from clawloop_edge.node.join import Membership
from clawloop_edge.node.standing import wall_clock_ms
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.privacy.deletions import Server
from clawloop_edge.privacy.device_keys import DeviceKeys, keep_in, keys_in, new_keys
from clawloop_shared import wire
from clawloop_shared.files import sha256
from clawloop_shared.membership import Stand
from clawloop_shared.signing import key_id

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

MEMBERSHIP = "membership"
JOINING = "membership.joining"
STAND = "membership.stand"
FORMER = "membership.former"
WANTED = "adapter.wanted"
NODE_ID = "node.id"
LOG = "adapter.log"


class Joining(msgspec.Struct, frozen=True, tag="joining.v1"):
    """The keys that an invitation (by its code's hash) is being used with."""

    code_sha256: str
    keys: DeviceKeys


class WantedAdapter(msgspec.Struct, frozen=True, tag="wanted.v1"):
    """The adapter version that the owner asked for by command; -1 asks for the one before the current."""

    version: int
    asked_ms: int


def membership(pool: Pool) -> Membership | None:
    """The server that this device joined, with the keys that it has there now; or None."""
    with pool.read() as database:
        raw = read_state(database, pool.keyring, name=MEMBERSHIP)
        member = wire.decode(raw, Membership) if raw else None
        keys = keys_in(database, pool).get(member.device_id) if member else None
    return member.with_keys(keys) if member and keys else member


def keep_membership(pool: Pool, value: Membership) -> None:
    """Remember the server, and the keys that this device has there; returns when it is on disk."""

    def operation(database: Database) -> None:
        write_state(database, pool.keyring, name=MEMBERSHIP, value=wire.encode(value))
        keep_in(database, pool, device_id=value.device_id, keys=value.keys)
        for name in (JOINING, STAND):
            write_state(database, pool.keyring, name=name, value=b"")

    pool.submit(operation).result()


def joining_keys(pool: Pool, code: str) -> DeviceKeys:
    """The keys to join with by this invitation: the same ones until it is used or another one is, so that joining may
    be cut short anywhere and done again. Waits for the disk."""
    name = sha256(code.encode())

    def operation(database: Database) -> DeviceKeys:
        raw = read_state(database, pool.keyring, name=JOINING)
        found = wire.decode(raw, Joining) if raw else None
        if found is None or found.code_sha256 != name:
            found = Joining(name, new_keys())
            write_state(database, pool.keyring, name=JOINING, value=wire.encode(found))
        return found.keys

    return pool.submit(operation).result()


def keep_stand(pool: Pool, device_id: str, stand: Stand) -> None:
    """Remember how the server said that this device stands; returns when it is on disk, at once if it was known."""
    value = msgspec.msgpack.encode((device_id, stand))
    if pool.get_state(STAND) != value:
        pool.set_state(STAND, value).result()


def waits(pool: Pool, member: Membership) -> bool:
    """Whether the operator has to approve this device first, as far as it was told."""
    raw = pool.get_state(STAND)
    device_id, stand = msgspec.msgpack.decode(raw, type=tuple[str, Stand]) if raw else ("", Stand.JOINED)
    return stand is Stand.WAITING if device_id == member.device_id else member.waiting


def forget_membership(pool: Pool, *, now_ms: int | None = None) -> None:
    """Leave: the running edge stops talking to the server within a second, but for its goodbye, which waits until the
    server has it. A wish for its adapters goes with it.

    Where the server is stays known, so that it can still be asked to delete what it got.
    """
    at_ms = wall_clock_ms() if now_ms is None else now_ms

    def operation(database: Database) -> None:
        raw = read_state(database, pool.keyring, name=MEMBERSHIP)
        if raw:
            left = server_of(wire.decode(raw, Membership))
            leaving.add_in(database, pool, left, now_ms=at_ms)
            others = [each for each in _former(database, pool) if each.root_key != left.root_key]
            former = msgspec.msgpack.encode([*others, left])
            write_state(database, pool.keyring, name=FORMER, value=former)
        for name in (WANTED, MEMBERSHIP):
            write_state(database, pool.keyring, name=name, value=b"")

    pool.submit(operation).result()


def server_of(member: Membership) -> Server:
    """What is needed to ask a server to delete something."""
    return Server(
        url=member.url,
        root_key=member.root_key,
        device_id=member.device_id,
        ca_pem=member.ca_pem,
        release_key=member.release_key,
    )


def known_servers(pool: Pool) -> list[Server]:
    """The server that this device has joined, and those that it left, the latest first."""
    member = membership(pool)
    with pool.read() as database:
        former = _former(database, pool)[::-1]
    return [server_of(member), *(each for each in former if each.root_key != member.root_key)] if member else former


def _former(database: Database, pool: Pool) -> list[Server]:
    found = read_state(database, pool.keyring, name=FORMER)
    return msgspec.msgpack.decode(found, type=list[Server]) if found else []


def known_log(pool: Pool, member: Membership) -> KnownLog:
    """What is known of that server's log of released adapters. It outlives the membership and the release key: a server
    that is joined anew is held to what it showed before."""
    raw = pool.get_state(_log_name(member))
    return wire.decode(raw, KnownLog) if raw else KnownLog()


def keep_log(pool: Pool, member: Membership, known: KnownLog) -> None:
    """Remember it; returns when it is on disk."""
    pool.set_state(_log_name(member), wire.encode(known)).result()


def log_book(pool: Pool, member: Membership) -> LogBook:
    """That server's log, as it is kept in the pool."""
    return LogBook(
        release_key=member.release_key,
        load=lambda: known_log(pool, member),
        keep=lambda known: keep_log(pool, member, known),
        now_ms=wall_clock_ms,
    )


def log_words(pool: Pool, member: Membership | None) -> str:
    """That log in words, for `status`; empty if no server was joined."""
    known = known_log(pool, member) if member else KnownLog()
    told = f"{known.size} entries, root {known.head.root[:16]}" if known.head else ""
    return f"adapters are refused: {known.stopped}" if known.stopped else told


def _log_name(member: Membership) -> str:
    return f"{LOG}.{key_id(member.root_key)}.{member.line.line_id}"


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

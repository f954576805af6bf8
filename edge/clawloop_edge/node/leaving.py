"""Saying goodbye to servers that were left, until each has signed that it noted it. Blocking: for a thread.

Leaving is the owner's own word, so the goodbye goes out at any level; it names the device and nothing else. A server
that does not know the device (any more) needs none.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.node.hub_api import HubBusy, HubRefused, post
from clawloop_edge.node.rotating import pending_of
from clawloop_edge.node.standing import wall_clock_ms
from clawloop_edge.node.transport import NodeError
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import LEFT, AuditLog, Proof
from clawloop_edge.privacy.deletions import FIRST_WAIT_MS, LONGEST_WAIT_MS, Server
from clawloop_edge.privacy.device_keys import GOODBYES, request_key
from clawloop_shared import wire
from clawloop_shared.errors import InvalidError
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.membership import (
    LEAVE_DOMAIN,
    LEAVE_PATH,
    LEFT_DOMAIN,
    MAX_MEMBER_BYTES,
    LeaveReceipt,
    LeaveRequest,
    open_answer,
    sign_request,
)
from clawloop_shared.messages import SignedAnswer

if TYPE_CHECKING:
    from sqlite_utils import Database

_log = logging.getLogger(__name__)

_FORBIDDEN = 403
GIVE_UP_MS = 90 * 86_400_000


class Goodbye(msgspec.Struct, frozen=True, kw_only=True):
    """A server that has not signed yet that this device left."""

    request_id: str
    server: Server
    asked_ms: int
    due_ms: int
    tries: int = 0
    problem: str = ""


def add_in(database: "Database", pool: Pool, server: Server, *, now_ms: int) -> None:
    """Have a goodbye said to a server. Needs a write transaction."""
    goodbye = Goodbye(request_id=new_id(), server=server, asked_ms=now_ms, due_ms=now_ms)
    _write(database, pool, [*_read(database, pool), goodbye])


def goodbyes(pool: Pool) -> list[Goodbye]:
    """Those that no server has signed for yet, oldest first."""
    with pool.read() as database:
        return _read(database, pool)


def say_due(pool: Pool, *, timeout_s: float = 10.0, now_ms: Callable[[], int] = wall_clock_ms) -> int:
    """Say the goodbyes that are due; gives how many are done with."""
    due = [goodbye for goodbye in goodbyes(pool) if goodbye.due_ms <= now_ms()]
    return sum(_say(pool, goodbye, timeout_s=timeout_s, now_ms=now_ms) for goodbye in due)


def _say(pool: Pool, goodbye: Goodbye, *, timeout_s: float, now_ms: Callable[[], int]) -> bool:
    server, device_id = goodbye.server, goodbye.server.device_id
    rotation = pending_of(pool, device_id)  # cut short: the server may have the new pair already
    keys = [request_key(pool, device_id), *([rotation.keys.device_key] if rotation else [])]
    try:
        answer = _asked(goodbye, keys, at_ms=now_ms(), timeout_s=timeout_s)
    except HubBusy as error:
        return _failed(pool, goodbye, str(error), now_ms=now_ms(), wait_ms=1000 * error.retry_after_s)
    except (NodeError, InvalidError) as error:
        return _failed(pool, goodbye, str(error), now_ms=now_ms())
    if answer is None:
        _log.info("%s does not know this device any more, so it was left", server.url)
    else:
        _log.info("%s has noted that this device left", server.url)
    return _done(pool, goodbye, answer)


def _asked(goodbye: Goodbye, keys: list[bytes], *, at_ms: int, timeout_s: float) -> SignedAnswer | None:
    """The server's word; None if it knows the device by none of these keys."""
    server = goodbye.server
    request = LeaveRequest(request_id=goodbye.request_id, device_id=server.device_id, at_ms=at_ms)
    for key in keys:
        body = wire.encode(sign_request(request, LEAVE_DOMAIN, private_key=key))
        try:
            data = post(
                server.url, LEAVE_PATH, ca_pem=server.ca_pem, body=body, max_bytes=MAX_MEMBER_BYTES, timeout_s=timeout_s
            )
        except HubRefused as error:
            if error.status != _FORBIDDEN:
                raise
            continue
        return _checked(data, goodbye)
    return None


def _checked(data: bytes, goodbye: Goodbye) -> SignedAnswer:
    answer = wire.decode(data, SignedAnswer, max_bytes=MAX_MEMBER_BYTES)
    said = open_answer(answer, LEFT_DOMAIN, kind=LeaveReceipt, public_key=goodbye.server.release_key)
    if (said.request_id, said.device_id) != (goodbye.request_id, goodbye.server.device_id):
        raise NodeError(f"{goodbye.server.url} signed for another goodbye ({said.request_id})")
    return answer


def _failed(pool: Pool, goodbye: Goodbye, problem: str, *, now_ms: int, wait_ms: int = 0) -> bool:
    if now_ms - goodbye.asked_ms > GIVE_UP_MS:
        _log.warning("%s was not told in 90 days that this device left, and is told no more", goodbye.server.url)
        return _done(pool, goodbye, None)
    backoff_ms = FIRST_WAIT_MS << min(goodbye.tries, 20)
    due_ms = now_ms + min(max(wait_ms, backoff_ms), LONGEST_WAIT_MS)
    later = msgspec.structs.replace(goodbye, tries=goodbye.tries + 1, problem=problem, due_ms=due_ms)

    def operation(database: "Database") -> None:
        kept = [later if each.request_id == goodbye.request_id else each for each in _read(database, pool)]
        _write(database, pool, kept)

    pool.submit(operation).result()
    return False


def _done(pool: Pool, goodbye: Goodbye, answer: SignedAnswer | None) -> bool:
    def operation(database: "Database") -> None:
        kept = _read(database, pool)
        left = [each for each in kept if each.request_id != goodbye.request_id]
        if len(left) == len(kept):
            return  # another process has said it
        _write(database, pool, left)
        if answer is not None:
            AuditLog(pool).append_in(
                database,
                LEFT,
                size_bytes=len(answer.payload),
                sha256=sha256(answer.payload),
                receipt_id="",
                item_id=goodbye.request_id,
                proof=Proof(answer.payload, answer.signature, goodbye.server.release_key),
            )

    pool.submit(operation).result()
    return True


def _read(database: "Database", pool: Pool) -> list[Goodbye]:
    raw = read_state(database, pool.keyring, name=GOODBYES)
    return msgspec.msgpack.decode(raw, type=list[Goodbye]) if raw else []


def _write(database: "Database", pool: Pool, kept: list[Goodbye]) -> None:
    write_state(database, pool.keyring, name=GOODBYES, value=msgspec.msgpack.encode(kept))

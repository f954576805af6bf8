"""New keys for this device at its server: both the request-signing key and the Flower node key, or neither.

The new pair is on the disk before it is sent, and takes the place of the old one only at the server's signed word. So
whatever is killed in between: until that word is here, the same request is sent again, and the server, whichever pair
it has by then, gives the same answer. Blocking: for a thread. Keys are changed at the owner's command, so at any level.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.node.hub_api import HubRefused, post
from clawloop_edge.node.join import Membership
from clawloop_edge.node.standing import wall_clock_ms
from clawloop_edge.node.transport import NodeError
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import ROTATED, AuditLog, Proof
from clawloop_edge.privacy.device_keys import ROTATING, DeviceKeys, keep_in, new_keys
from clawloop_shared import wire
from clawloop_shared.errors import ClawloopError
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.membership import (
    MAX_MEMBER_BYTES,
    ROTATE_PATH,
    ROTATED_DOMAIN,
    RotateReceipt,
    RotateRequest,
    open_answer,
    sign_rotation,
)
from clawloop_shared.messages import SignedAnswer

if TYPE_CHECKING:
    from sqlite_utils import Database

_log = logging.getLogger(__name__)

_CONFLICT = 409
"""these keys cannot be had, so they never were: the one answer at which a pair may be thrown away"""


class Rotation(msgspec.Struct, frozen=True, tag="rotation.v1"):
    """A pair of keys that was asked for, and perhaps got already."""

    device_id: str
    request_id: str
    keys: DeviceKeys
    begun_ms: int


def pending(pool: Pool, member: Membership) -> Rotation | None:
    """The rotation of this member that is not known to be done, or None."""
    return pending_of(pool, member.device_id)


def pending_of(pool: Pool, device_id: str) -> Rotation | None:
    """The same, also of a server that was left since."""
    raw = pool.get_state(ROTATING)
    found = wire.decode(raw, Rotation) if raw else None
    return found if found and found.device_id == device_id else None


def rotate(pool: Pool, member: Membership, *, now_ms: Callable[[], int] = wall_clock_ms) -> DeviceKeys:
    """Give this device new keys, or finish the rotation that was begun; gives its keys then.

    Raises:
        ServerAway, NodeError: it cannot be done now; running it again, or the edge, finishes it.
        StorageError: it cannot be noted here.
    """
    return _send(pool, member, pending(pool, member) or _begin(pool, member, now_ms()), now_ms=now_ms)


def finish(pool: Pool, member: Membership, *, after_ms: int = 0, now_ms: Callable[[], int] = wall_clock_ms) -> bool:
    """Finish the rotation that was begun more than `after_ms` ago; whether there was one.

    Raises:
        ServerAway, NodeError: it cannot be done now.
    """
    found = pending(pool, member)
    if found is None or now_ms() - found.begun_ms < after_ms:
        return False
    _send(pool, member, found, now_ms=now_ms)
    return True


def _begin(pool: Pool, member: Membership, now_ms: int) -> Rotation:
    made = Rotation(member.device_id, new_id(), new_keys(), now_ms)
    pool.set_state(ROTATING, wire.encode(made)).result()
    return made


def _send(pool: Pool, member: Membership, rotation: Rotation, *, now_ms: Callable[[], int]) -> DeviceKeys:
    keys = rotation.keys
    request = RotateRequest(
        request_id=rotation.request_id,
        device_id=member.device_id,
        at_ms=now_ms(),
        device_key=keys.public,
        node_key_pem=keys.node_public_pem,
    )
    body = wire.encode(sign_rotation(request, old_key=member.device_key, new_key=keys.device_key))
    try:
        data = post(member.url, ROTATE_PATH, ca_pem=member.ca_pem, body=body, max_bytes=MAX_MEMBER_BYTES)
    except HubRefused as error:
        if error.status == _CONFLICT:
            pool.set_state(ROTATING, b"").result()
        raise
    answer = _checked(data, member, rotation)
    pool.submit(lambda database: _commit(database, pool, member, rotation=rotation, answer=answer)).result()
    _log.info("this device has new keys at %s", member.url)
    return keys


def _checked(data: bytes, member: Membership, rotation: Rotation) -> SignedAnswer:
    try:
        answer = wire.decode(data, SignedAnswer, max_bytes=MAX_MEMBER_BYTES)
        said = open_answer(answer, ROTATED_DOMAIN, kind=RotateReceipt, public_key=member.release_key)
    except ClawloopError as error:
        raise NodeError(f"{member.url} did not sign that it took the new keys ({error}); run it again") from error
    if (said.request_id, said.device_id, said.device_key) != (
        rotation.request_id,
        member.device_id,
        rotation.keys.public,
    ):
        raise NodeError(f"{member.url} signed for other keys (request {said.request_id}); run it again")
    return answer


def _commit(database: "Database", pool: Pool, member: Membership, *, rotation: Rotation, answer: SignedAnswer) -> None:
    raw = read_state(database, pool.keyring, name=ROTATING)
    if not raw or wire.decode(raw, Rotation) != rotation:
        return  # another process was told the same, and has noted it
    keep_in(database, pool, device_id=member.device_id, keys=rotation.keys)
    write_state(database, pool.keyring, name=ROTATING, value=b"")
    AuditLog(pool).append_in(
        database,
        ROTATED,
        size_bytes=len(answer.payload),
        sha256=sha256(answer.payload),
        receipt_id="",
        item_id=rotation.request_id,
        proof=Proof(answer.payload, answer.signature, member.release_key),
    )

"""Joining a server: keys are made here and never leave; the server is trusted by the invitation's own certificate, and
its other keys by the root key's word.

Knows no pool: the caller keeps the `Membership` (it holds private keys), and the `DeviceKeys` before it asks.
"""

import time

import msgspec

from clawloop_edge.node.hub_api import post
from clawloop_edge.node.transport import NodeError, ServerAway
from clawloop_edge.privacy.device_keys import DeviceKeys, new_keys
from clawloop_shared import wire
from clawloop_shared.errors import InvalidError
from clawloop_shared.membership import RELEASE, open_statement, prove_join
from clawloop_shared.messages import (
    JOIN_PATH,
    MAX_JOIN_BYTES,
    Invitation,
    JoinReply,
    JoinRequest,
    SignedAnswer,
    read_invitation,
)
from clawloop_shared.model_line import ModelLine

_TRIES = 4
_PAUSE_S = 1.0


class Membership(msgspec.Struct, frozen=True, tag="membership.v1"):
    """What a device must keep to stay a member. Secret: it holds the device's private keys."""

    device_id: str
    url: str
    ca_pem: str
    root_key: bytes
    release_key: bytes
    line: ModelLine
    device_key: bytes
    node_key_pem: str
    node_id: int
    waiting: bool = False
    """as it was on joining: whether the operator had to approve it first"""
    statement: SignedAnswer | None = None
    """the root key's word for the release key, as it was on joining"""

    def __repr__(self) -> str:
        return f"Membership(device_id={self.device_id!r}, url={self.url!r})"

    @property
    def keys(self) -> DeviceKeys:
        """What this device proves itself with."""
        return DeviceKeys(self.device_key, self.node_key_pem)

    def same_as(self, other: "Membership | None") -> bool:
        """Whether it is the same device at the same server, whatever its keys."""
        return other is not None and (self.device_id, self.release_key) == (other.device_id, other.release_key)

    def with_keys(self, keys: DeviceKeys) -> "Membership":
        """The same member with other keys."""
        return msgspec.structs.replace(self, device_key=keys.device_key, node_key_pem=keys.node_key_pem)


def join(
    invitation_text: str, *, line: ModelLine, keys: DeviceKeys | None = None, timeout_s: float = 30.0
) -> Membership:
    """Become a member, or one that waits for the operator. `keys` are made here if there are none.

    The same keys are sent again if the server is not ready, so a lost answer does no harm.

    Raises:
        WireError: the invitation is damaged.
        ServerAway: the server cannot be reached or is not ready.
        NodeError: the server refuses, with its reason, or its root key does not vouch for its release key.
    """
    invitation, keys = read_invitation(invitation_text), keys or new_keys()
    request = JoinRequest(
        code=invitation.code,
        device_key=keys.public,
        node_key_pem=keys.node_public_pem,
        line=line,
    )
    reply = _ask(invitation, prove_join(request, keys.device_key), timeout_s=timeout_s)
    _check_release_key(invitation, reply)
    return Membership(
        device_id=reply.device_id,
        url=invitation.url,
        ca_pem=invitation.ca_pem,
        root_key=invitation.root_key,
        release_key=reply.release_key,
        line=reply.line,
        device_key=keys.device_key,
        node_key_pem=keys.node_key_pem,
        node_id=reply.node_id,
        waiting=reply.waiting,
        statement=reply.statement,
    )


def _check_release_key(invitation: Invitation, reply: JoinReply) -> None:
    """Raises NodeError: the root key of the invitation does not vouch for the release key of the answer."""
    try:
        found = open_statement(
            reply.statement, invitation.root_key, purpose=RELEASE, now_ms=time.time_ns() // 1_000_000
        )
    except InvalidError as error:
        raise NodeError(f"{invitation.url} has no release key that its root key vouches for: {error}") from error
    if found.key != reply.release_key:
        raise NodeError(f"{invitation.url} named a release key that its root key does not vouch for; ask its operator")


def _ask(invitation: Invitation, request: JoinRequest, *, timeout_s: float) -> JoinReply:
    for attempt in range(_TRIES):
        try:
            data = post(
                invitation.url,
                JOIN_PATH,
                ca_pem=invitation.ca_pem,
                body=wire.encode(request),
                max_bytes=MAX_JOIN_BYTES,
                timeout_s=timeout_s,
            )
            return wire.decode(data, JoinReply, max_bytes=MAX_JOIN_BYTES)
        except ServerAway:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE_S)
    raise AssertionError("unreachable")

"""Joining a server: keys are made here and never leave; the server is trusted by the invitation's own certificate.

Knows no pool: the caller keeps the `Membership` (it holds private keys).
"""

import time

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_edge.node.hub_api import post
from clawloop_edge.node.transport import ServerAway
from clawloop_shared import signing, wire
from clawloop_shared.messages import (
    JOIN_PATH,
    MAX_JOIN_BYTES,
    Invitation,
    JoinReply,
    JoinRequest,
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

    def __repr__(self) -> str:
        return f"Membership(device_id={self.device_id!r}, url={self.url!r})"


def join(
    invitation_text: str, *, line: ModelLine, device_key: bytes | None = None, timeout_s: float = 30.0
) -> Membership:
    """Become a member. `device_key` is the device's Ed25519 private key (32 bytes), made here if there is none.

    The same keys are sent again if the server is not ready, so a lost answer does no harm.

    Raises:
        WireError: the invitation is damaged.
        ServerAway: the server cannot be reached or is not ready.
        NodeError: the server refuses, with its reason.
    """
    invitation = read_invitation(invitation_text)
    device_key = device_key or signing.new_key()
    node_key = ec.generate_private_key(ec.SECP384R1())
    request = JoinRequest(
        code=invitation.code,
        device_key=signing.public_key(device_key),
        node_key_pem=_public_pem(node_key),
        line=line,
    )
    reply = _ask(invitation, request, timeout_s=timeout_s)
    return Membership(
        device_id=reply.device_id,
        url=invitation.url,
        ca_pem=invitation.ca_pem,
        root_key=invitation.root_key,
        release_key=reply.release_key,
        line=reply.line,
        device_key=device_key,
        node_key_pem=_private_pem(node_key),
        node_id=reply.node_id,
    )


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


def _private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )

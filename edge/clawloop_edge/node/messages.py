"""What each message of the server is answered with. A fixed table: what is not in it is refused, never run.

Knows no transport and no socket. Formats: docs/formats/messages.md.
"""

import logging
import traceback
from collections.abc import Sequence
from typing import Protocol

import msgspec

from clawloop_edge.node.transport import Answer
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.errors import WireError
from clawloop_shared.messages import (
    ADAPTER,
    LEARN,
    MAX_PAYLOAD_BYTES,
    SECURE,
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadReply,
    UploadRequest,
)

_log = logging.getLogger(__name__)

_REQUESTS: dict[str, type[msgspec.Struct]] = {
    STATUS: StatusRequest,
    UPLOAD: UploadRequest,
    ADAPTER: AdapterOffer,
    LEARN: LearnTask,
    SECURE: SecureRequest,
}


class NodeHandlers(Protocol):
    """What the edge does with each message. Called in the node's own thread, one at a time."""

    def status(self, request: StatusRequest) -> StatusReply:
        """How this device is."""
        ...

    def upload(self, request: UploadRequest) -> UploadReply:
        """Forget what was received, and give what may leave next."""
        ...

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        """Install an adapter, or say why not."""
        ...

    def learn(self, task: LearnTask) -> LearnReply:
        """Take on a task of learning at home, to be done when there is time for it, or say why not."""
        ...

    def secure(self, request: SecureRequest) -> SecureReply:
        """Take part in a phase of a secure sum, or say why not."""
        ...

    def may_leave(self, item_ids: Sequence[str]) -> bool:
        """Whether these items may go out now; none: whether anything may. Called from any thread, and often."""
        ...

    def stopped(self, item_ids: Sequence[str]) -> None:
        """The sending of these items was broken off."""
        ...


def answer(kind: str, payload: bytes, *, handlers: NodeHandlers) -> Answer:
    """The answer to one message. An error names its kind alone, never what was in the message or on this device."""
    wanted = _REQUESTS.get(kind)
    if wanted is None:
        _log.warning("refused a message of type %.64r: this clawloop does not know it", kind)
        return Answer(error="unknown message type", eager=True)
    try:
        request = wire.decode(payload, wanted, max_bytes=MAX_PAYLOAD_BYTES)
    except WireError as error:
        _log.warning("refused a message of type %s: %s", kind, error)
        return Answer(error="WireError", eager=True)
    try:
        return _handle(request, handlers)
    except Exception as error:  # noqa: BLE001  a handler's fault is the server's to hear of and must not end the node
        where = traceback.extract_tb(error.__traceback__)[-1]
        _log.error("%s failed with %s at %s:%s", kind, type(error).__name__, where.filename, where.lineno)
        return Answer(error=type(error).__name__)


def _handle(request: msgspec.Struct, handlers: NodeHandlers) -> Answer:
    if isinstance(request, UploadRequest):
        upload = handlers.upload(request)
        return _packed(upload, eager=upload.more, items=tuple(item.item_id for item in upload.items))
    if isinstance(request, AdapterOffer):
        return _packed(handlers.adapter(request), eager=True)
    if isinstance(request, LearnTask):
        return _packed(handlers.learn(request), eager=True)
    if isinstance(request, SecureRequest):
        part = handlers.secure(request)
        return _packed(part, eager=True, items=(part.item_id,) if part.item_id else ())
    assert isinstance(request, StatusRequest)
    return _packed(handlers.status(request), eager=True)


def _packed(reply: msgspec.Struct, *, eager: bool, items: tuple[str, ...] = ()) -> Answer:
    payload = wire.encode(reply)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise WireError(f"a reply of {len(payload)} bytes is over the limit {MAX_PAYLOAD_BYTES}")
    return Answer(payload=payload, eager=eager, items=items)

"""Our payloads as Flower messages: one record, one value. `flwr` is what `flower.load_flwr` gave. Knows no socket."""

from collections.abc import Callable
from typing import Any

from clawloop_edge.node.transport import Answer
from clawloop_shared.messages import RECORD, SMALL_PAYLOAD_BYTES

ERROR_CODE = 2
"""flwr's CLIENT_APP_RAISED_EXCEPTION"""
_STYPE = "clawloop.wire"


def record_of(flwr: Any, payload: bytes) -> Any:
    """A payload as the content of a message."""
    if len(payload) <= SMALL_PAYLOAD_BYTES:
        return flwr.RecordDict({RECORD: flwr.ConfigRecord({RECORD: payload})})
    array = flwr.Array("uint8", (len(payload),), _STYPE, payload)
    return flwr.RecordDict({RECORD: flwr.ArrayRecord({RECORD: array})})


def payload_of(message: Any) -> bytes:
    """The payload of a message; empty if it has none of ours."""
    if not message.has_content():
        return b""
    small, large = message.content.config_records.get(RECORD), message.content.array_records.get(RECORD)
    data = small.get(RECORD) if small is not None else large[RECORD].data if large and RECORD in large else None
    return data if isinstance(data, bytes) else b""


def reply_to(flwr: Any, original: Any, answer: Answer) -> Any:
    """The message that answers `original`, with its own id."""
    if answer.error:
        reply = flwr.Message(flwr.Error(ERROR_CODE, answer.error), reply_to=original)
    else:
        reply = flwr.Message(record_of(flwr, answer.payload), reply_to=original)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


class VersionHeaders:
    """Tells the other side our flwr version, without acting on what it answers: flwr's own may end the process."""

    def __init__(self, flwr: Any, component: str) -> None:
        self._headers = dict(flwr.RuntimeVersionMetadata.from_local_component(component).as_metadata())

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Add the headers."""
        context.request.headers.update(self._headers)
        return call_next(context)

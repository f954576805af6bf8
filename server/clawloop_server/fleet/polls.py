"""Answering a poll for which there is nothing, before it costs Flower anything.

Nine polls of ten find no message, and the SuperLink spends some milliseconds of its one core on each: TLS, a signature,
four hops between threads. The dispatcher knows for whom there is nothing. A stranger who asks in a device's place
learns that nothing waits for it, and no more; whatever is not known for certain is passed on, and checked there.
"""

from collections.abc import Callable

CALL = "pull-messages"
ANSWER = b""
"""a PullMessagesResponse without messages"""
MEDIA_TYPE = "application/protobuf"


def finds_nothing(body: bytes, nothing_for: Callable[[int], bool]) -> bool:
    """Whether this poll is of a node for which there is nothing."""
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from google.protobuf.message import DecodeError

    try:
        request = PullMessagesRequest.FromString(body)
    except DecodeError:
        return False
    return nothing_for(request.node.node_id)

"""What a node may announce that it will push, before it costs Flower anything: so many objects, and no more.

A message of ours with the largest payload is 17 objects: itself, its three records, and parts of 5 MiB. Whatever is
announced the SuperLink waits for and keeps in memory, and the bridge puts together.
"""

CALL = "push-messages"
MAX_BODY_BYTES = 1 << 20
MAX_OBJECTS = 32
MAX_OBJECT_BYTES = 8 << 20
"""a part is 5 MiB, and a little for what is around it"""


def why_not(body: bytes) -> str:
    """Why these messages are not passed on; empty if they are."""
    if len(body) > MAX_BODY_BYTES:
        return f"a request of {CALL} may have {MAX_BODY_BYTES} bytes"
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from google.protobuf.message import DecodeError

    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return "this is no PushMessagesRequest"
    trees, count = list(request.message_object_trees), 0
    while trees and count <= MAX_OBJECTS:
        count += 1
        trees += trees.pop().children
    if count > MAX_OBJECTS or len(request.messages_list) > MAX_OBJECTS:
        return f"one call may announce {MAX_OBJECTS} objects"
    return ""

"""How the edge reaches its server, as a small interface: connect, receive, send, close.

A transport moves bytes and knows no handler; `flower` is the one we have. What may go wrong is named here.
"""

from typing import Any, Protocol

import msgspec

from clawloop_shared.errors import ClawloopError


class NodeError(ClawloopError):
    """The server and this device cannot work together."""


class ServerAway(NodeError):
    """The server cannot be reached now. Trying again later may help."""


class NodeRefused(NodeError):
    """The server does not know this device's key (any more). Only joining again helps."""


class Incoming(msgspec.Struct, frozen=True):
    """One message of the server. `handle` is the transport's own, needed to answer."""

    kind: str
    payload: bytes
    handle: Any


class Answer(msgspec.Struct, frozen=True):
    """What goes back: bytes, or the short reason why there are none. `eager`: another message is likely soon."""

    payload: bytes = b""
    error: str = ""
    eager: bool = False


class Transport(Protocol):
    """One connection to the server. Used by one thread, but `close` may come from another."""

    def connect(self) -> None:
        """Become reachable. Raises ServerAway or NodeRefused."""
        ...

    def receive(self) -> Incoming | None:
        """The next message, or None if there is none now. Raises ServerAway or NodeRefused."""
        ...

    def send(self, incoming: Incoming, answer: Answer) -> None:
        """Answer a message. Raises ServerAway or NodeRefused."""
        ...

    def close(self) -> None:
        """Say goodbye as far as that is possible, and free what was held. May be called twice."""
        ...

"""How the edge reaches its server, as a small interface: connect, receive, send, close.

A transport moves bytes and knows no handler; `flower` is the one we have. What may go wrong is named here.
"""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from clawloop_shared.errors import ClawloopError


class NodeError(ClawloopError):
    """The server and this device cannot work together."""


class ServerAway(NodeError):
    """The server cannot be reached now. Trying again later may help."""


class NodeRefused(NodeError):
    """The server does not know this device's key (any more). Only joining again helps."""


class Waiting(NodeError):
    """The server's operator has not approved this device yet. It comes in by itself once that is done."""


class Taken(NodeError):
    """Another edge with this device's keys has come in after this one, so this one stays out."""


class ClockOff(NodeError):
    """The clock here is so far from the server's that nothing signed here is believed there."""


class Withdrawn(NodeError):
    """What was being sent may no longer leave, so it was broken off."""


class Incoming(msgspec.Struct, frozen=True):
    """One message of the server. `handle` is the transport's own, needed to answer."""

    kind: str
    payload: bytes
    handle: Any


class Answer(msgspec.Struct, frozen=True):
    """What goes back: bytes, or the short reason why there are none. `eager`: another message is likely soon.

    `items` are the outbox items in it.
    """

    payload: bytes = b""
    error: str = ""
    eager: bool = False
    items: tuple[str, ...] = ()


Permit = Callable[[], bool]
"""asked whether what is being sent may still leave"""


class Transport(Protocol):
    """One connection to the server. Used by one thread, but `close` and `cut` may come from another."""

    def connect(self) -> None:
        """Become reachable. Raises ServerAway or NodeRefused."""
        ...

    def receive(self) -> Incoming | None:
        """The next message, or None if there is none now. Raises ServerAway or NodeRefused."""
        ...

    def send(self, incoming: Incoming, answer: Answer, *, permit: Permit) -> None:
        """Answer a message; `permit` is asked before each part of it.

        Raises:
            Withdrawn: `permit` said no, or `cut` was called.
            ServerAway, NodeRefused: it cannot be sent.
        """
        ...

    def cut(self) -> None:
        """Break off whatever is being sent, at once: not one more byte of it leaves. Nothing can be sent until the next
        `connect`."""
        ...

    def close(self, *, goodbye: bool = True) -> None:
        """Free what was held; before that say goodbye, as far as that is possible. May be called twice."""
        ...

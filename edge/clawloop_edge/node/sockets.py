"""The sockets that an HTTP client has opened, so that another thread can cut them in the midst of a request.

httpx tells of each connection by its `trace` extension, httpcore gives the socket of a stream; both are documented.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

_OPENED = ("connect_tcp.complete", "start_tls.complete")
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing throws away what is not sent yet, and tells the other side by a reset"""


class Sockets:
    """Sits among the interceptors of flwr's client, and knows its open sockets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self.were_cut = False

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Have the request tell of the connections that are made for it."""
        context.request.extensions["trace"] = self._told
        return call_next(context)

    def cut(self) -> None:
        """Cut them all, and all that are opened after."""
        with self._lock:
            self.were_cut = True
            found, self._open = self._open, []
        for one in found:
            cut_socket(one)

    def _told(self, event: str, info: Mapping[str, Any]) -> None:
        if not event.endswith(_OPENED):
            return
        opened: socket.socket = info["return_value"].get_extra_info("socket")
        with self._lock:
            self._open = [one for one in self._open if one.fileno() >= 0] + [opened]
            late = self.were_cut
        if late:
            cut_socket(opened)


def cut_socket(one: socket.socket) -> None:
    """Wake up whoever uses a socket, with an error. Not by `SSLSocket.shutdown`: that takes the encryption off
    first, so that the other thread might write its next bytes in the clear."""
    with contextlib.suppress(OSError):  # it is closed already
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        socket.socket.shutdown(one, socket.SHUT_RDWR)

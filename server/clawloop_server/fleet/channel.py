"""The line between the hub and the bridge: frames over a loopback socket, opened with a secret from a 0600 file.

    length (4 bytes, big endian) | msgpack

The bridge asks (`Exchange`), the hub answers (`Orders`); the end of the connection is how the hub sees at once that
the bridge died. Knows no Flower and no message of ours: payloads are bytes. Both ends are here, so that they fit.
"""

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from clawloop_server.errors import FleetError
from clawloop_shared.files import publish_secret

_log = logging.getLogger(__name__)

VARIABLE = "CLAWLOOP_BRIDGE"
"""environment variable that names the file with the address and the secret"""
MAX_FRAME_BYTES = 512 << 20
_HELLO_BYTES = 4096
_HELLO_S = 5.0
_LENGTH = struct.Struct(">I")

T = TypeVar("T", bound=msgspec.Struct)


class Address(msgspec.Struct, frozen=True):
    """Where the hub listens, what opens the line, and where the bridge writes its log."""

    port: int
    secret: bytes
    log: str = ""


class NodeInfo(msgspec.Struct, frozen=True):
    """A device that is reachable now: its number and its name in Flower (its device id), and since when it is connected
    (in Flower's words; another one after each new start)."""

    node_id: int
    name: str
    since: str = ""


class Outgoing(msgspec.Struct, frozen=True):
    """One message to send: at most one a node and type is under way."""

    node_id: int
    type: str
    payload: bytes
    ttl_s: float = 120.0


class Reply(msgspec.Struct, frozen=True):
    """What came of a message: a payload, or the reason why there is none."""

    node_id: int
    type: str
    payload: bytes = b""
    error: str = ""


class Hello(msgspec.Struct, frozen=True):
    """The bridge's first frame."""

    secret: bytes
    run_id: int


class Exchange(msgspec.Struct, frozen=True):
    """The bridge hands over replies and asks for work, willing to wait `wait_s` for some. `online` is there when it
    has changed."""

    online: list[NodeInfo] | None
    replies: list[Reply]
    wait_s: float


class Orders(msgspec.Struct, frozen=True):
    """What to send now. That it arrives means that the replies before it are kept."""

    out: list[Outgoing]


class FleetPort(Protocol):
    """What the bridge serves: the hub's side."""

    async def connected(self) -> None:
        """A bridge is there; whatever an earlier one had under way is lost."""
        ...

    async def work(self, online: list[NodeInfo] | None) -> list[Outgoing]:
        """What to send now to devices that are online; None: they are the same as before."""
        ...

    async def reply(self, reply: Reply) -> None:
        """Keep a reply; when this returns, it is on disk."""
        ...

    async def wait(self, timeout_s: float) -> None:
        """Return when there may be new work, or after `timeout_s`."""
        ...


class Channel:
    """The hub's end. Serves one bridge at a time: a newer one takes over."""

    def __init__(self, port: FleetPort) -> None:
        self._port = port
        self._secret = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._current: asyncio.StreamWriter | None = None
        self._connected, self._lost = asyncio.Event(), asyncio.Event()
        self._last_s = 0.0
        self.run_id = 0

    async def start(self, file: Path, *, log: Path) -> None:
        """Listen on a free loopback port, and write where to `file` (0600)."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        publish_secret(file, msgspec.json.encode(Address(port, self._secret, str(log))))

    async def stop(self) -> None:
        """Close the line."""
        if self._server is not None:
            self._server.close()
        if self._current is not None:
            self._current.close()
        self._lost.set()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Whether a bridge is there within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        return self._connected.is_set()

    async def wait_lost(self, timeout_s: float) -> bool:
        """Whether the bridge is gone within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._lost.wait()
        return self._lost.is_set()

    @property
    def connected(self) -> bool:
        """Whether a bridge is there."""
        return self._connected.is_set()

    @property
    def silent_s(self) -> float:
        """Seconds since the bridge last asked for work."""
        return time.monotonic() - self._last_s

    def drop(self) -> None:
        """Hang up on the bridge, so that it ends."""
        if self._current is not None:
            self._current.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = await _read(reader, Hello, limit=_HELLO_BYTES)
            if not hmac.compare_digest(hello.secret, self._secret):
                _log.warning("someone without the secret called the bridge's port")
                return
            await self._take(writer, hello.run_id)
            while True:
                await self._turn(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError, msgspec.DecodeError, FleetError) as error:
            _log.info("the bridge's line ended: %s", type(error).__name__)
        finally:
            writer.close()
            if self._current is writer:
                self._current = None
                self._connected.clear()
                self._lost.set()

    async def _take(self, writer: asyncio.StreamWriter, run_id: int) -> None:
        self.drop()
        self._current, self.run_id, self._last_s = writer, run_id, time.monotonic()
        await self._port.connected()
        self._lost.clear()
        self._connected.set()

    async def _turn(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = await _read(reader, Exchange, limit=MAX_FRAME_BYTES)
        self._last_s = time.monotonic()
        for reply in exchange.replies:
            with _going_on("taking a reply"):
                await self._port.reply(reply)
        out = await self._work(exchange.online)
        if not out and exchange.wait_s > 0:
            await self._port.wait(exchange.wait_s)
            out = await self._work(None)
        frame = msgspec.msgpack.encode(Orders(out))
        writer.write(_LENGTH.pack(len(frame)) + frame)
        await writer.drain()

    async def _work(self, online: list[NodeInfo] | None) -> list[Outgoing]:
        with _going_on("looking for work"):
            return await self._port.work(online)
        return []


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """Whatever goes wrong is said, and does not end the line: one bridge serves all devices."""
    try:
        yield
    except Exception:  # noqa: BLE001
        _log.exception("%s for the bridge failed", what)


class Line:
    """The bridge's end (blocking: a ServerApp is synchronous)."""

    def __init__(self, file: Path, run_id: int) -> None:
        address = read_address(file)
        try:
            self._socket = socket.create_connection(("127.0.0.1", address.port), timeout=10)
        except OSError as error:
            raise FleetError(f"the hub does not listen on port {address.port}: {error}") from error
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send(Hello(address.secret, run_id))

    def exchange(self, online: list[NodeInfo] | None, replies: list[Reply], *, wait_s: float) -> list[Outgoing]:
        """Hand over replies and get what to send next.

        Raises:
            FleetError: the hub is gone, or wants this bridge to end.
        """
        self._send(Exchange(online, replies, wait_s))
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        return msgspec.msgpack.decode(self._receive(length), type=Orders).out

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _send(self, value: msgspec.Struct) -> None:
        frame = msgspec.msgpack.encode(value)
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise FleetError(f"the hub hung up: {error}") from error

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self._socket.recv(min(length - len(parts), 1 << 20))
            except OSError as error:
                raise FleetError(f"the hub hung up: {error}") from error
            if not part:
                raise FleetError("the hub hung up")
            parts += part
        return bytes(parts)


def read_address(file: Path) -> Address:
    """What the hub wrote.

    Raises:
        FleetError: the file is missing or broken.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Address)
    except (OSError, msgspec.DecodeError) as error:
        raise FleetError(f"cannot read {file}: {error}; the hub writes it at start") from error


async def _read(reader: asyncio.StreamReader, kind: type[T], *, limit: int) -> T:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > limit:
        raise FleetError(f"a frame of {length} bytes; the limit is {limit}")
    return msgspec.msgpack.decode(await reader.readexactly(length), type=kind)

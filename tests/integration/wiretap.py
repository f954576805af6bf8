"""A proxy between an edge and its server that sees every byte the edge sends: it ends TLS with the server's own key.

Whatever leaves the edge is kept as it was read from the connection, request by request; `Tap.payloads` gives the
messages in it. A tap can be told to take an edge's bytes slowly, as a bad line would.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Array, ConfigRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import PushObjectRequest

from clawloop_server.fleet.tls import TlsFiles
from clawloop_shared.messages import RECORD, Invitation, read_invitation, write_invitation

_BLOCK = 16 << 10
_BETWEEN = b"\r\n\r\n"
"""head and body"""


@dataclass
class Connection:
    """What an edge sent over one connection, and when its last byte came."""

    sent: bytearray = field(default_factory=bytearray)
    last_s: float = 0.0
    open: bool = True


@dataclass(frozen=True)
class Request:
    """One HTTP request of an edge."""

    method: str
    path: str
    headers: bytes
    body: bytes

    @property
    def size_bytes(self) -> int:
        """As it was sent."""
        return len(self.headers) + len(_BETWEEN) + len(self.body)


class Tap:
    """The proxy, on a thread of its own. Use it as a context."""

    def __init__(self, tls: TlsFiles, *, port: int, server_port: int) -> None:
        self.url = f"https://127.0.0.1:{port}"
        self.connections: list[Connection] = []
        self.bytes_per_s = 0
        """how fast an edge's bytes are taken; 0: at once"""
        self._port, self._server_port = port, server_port
        self._towards_edge = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._towards_edge.load_cert_chain(tls.certificate, tls.key)
        self._towards_server = ssl.create_default_context(cafile=str(tls.ca))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="wiretap", daemon=True)
        self._ready = threading.Event()
        self._stopped = asyncio.Event()

    def __enter__(self) -> "Tap":
        self._thread.start()
        assert self._ready.wait(10), "the tap does not listen"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    def invitation(self, text: str) -> str:
        """The same invitation, to the tap instead of the server."""
        found = read_invitation(text)
        return write_invitation(Invitation(url=self.url, ca_pem=found.ca_pem, root_key=found.root_key, code=found.code))

    @property
    def taken(self) -> int:
        """How many bytes edges have sent."""
        return sum(len(connection.sent) for connection in self.connections)

    @property
    def last_s(self) -> float:
        """When the last byte of an edge came (`time.monotonic`)."""
        return max((connection.last_s for connection in self.connections), default=0.0)

    def forget(self) -> None:
        """Keep only the requests that are not yet sent whole."""
        for connection in self.connections:
            del connection.sent[: sum(request.size_bytes for request in _requests(bytes(connection.sent)))]
        self.connections = [connection for connection in self.connections if connection.open]

    def requests(self) -> Iterator[Request]:
        """The whole requests that were sent, connection by connection."""
        for connection in self.connections:
            yield from _requests(bytes(connection.sent))

    def payloads(self) -> Iterator[bytes]:
        """Whatever edges put into Flower messages and sent to its end: the one value in each message's record."""
        pushed = [
            PushObjectRequest.FromString(request.body)
            for request in self.requests()
            if request.path.endswith("push-object")
        ]
        objects = {each.object_id: each.object_content for each in pushed}
        for content in objects.values():
            if content.startswith(b"ConfigRecord "):
                value = ConfigRecord.inflate(content).get(RECORD)
                if isinstance(value, bytes):
                    yield value
            elif content.startswith(b"Array "):
                children = content.partition(b"\0")[0].split(b" ")[1].decode().split(",")
                if all(child in objects for child in children):
                    chunks = {child: ArrayChunk.inflate(objects[child]) for child in children}
                    yield Array.inflate(content, chunks).data

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        listening = socket.create_server(("127.0.0.1", self._port))
        listening.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, _BLOCK
        )  # what is sent and not taken stays at the edge
        server = await asyncio.start_server(self._carry, sock=listening, ssl=self._towards_edge)
        self._ready.set()
        async with server:
            await self._stopped.wait()
            server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _carry(self, from_edge: asyncio.StreamReader, to_edge: asyncio.StreamWriter) -> None:
        connection = Connection()
        self.connections.append(connection)
        try:
            from_server, to_server = await asyncio.open_connection(
                "127.0.0.1", self._server_port, ssl=self._towards_server
            )
        except OSError:
            to_edge.close()
            connection.open = False
            return
        back = asyncio.create_task(_pump(from_server, to_edge))
        try:
            while block := await from_edge.read(self._block):
                connection.sent += block
                connection.last_s = time.monotonic()
                to_server.write(block)
                await to_server.drain()
                if self.bytes_per_s:
                    await asyncio.sleep(len(block) / self.bytes_per_s)
        except (OSError, ssl.SSLError):
            pass
        finally:
            connection.open = False
            back.cancel()
            for writer in (to_server, to_edge):
                writer.close()

    @property
    def _block(self) -> int:
        return max(1024, self.bytes_per_s // 20) if self.bytes_per_s else _BLOCK


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while block := await source.read(_BLOCK):
            target.write(block)
            await target.drain()
    target.close()


def _requests(data: bytes) -> Iterator[Request]:
    """HTTP/1.1 requests with a content length, as the edge's clients write them; a cut one at the end is left out."""
    while _BETWEEN in data:
        head, _, data = data.partition(_BETWEEN)
        line, *fields = head.split(b"\r\n")
        names = {name.strip().lower(): value.strip() for name, _, value in (f.partition(b":") for f in fields)}
        assert b"transfer-encoding" not in names, "this reader knows only bodies of a stated length"
        length = int(names.get(b"content-length", b"0"))
        if len(data) < length:
            return
        method, path, _ = line.decode().split(" ", 2)
        yield Request(method, path, head, data[:length])
        data = data[length:]


def tls_files(server_home: Path) -> TlsFiles:
    """The TLS files of a server's home."""
    return TlsFiles(server_home / "keys")

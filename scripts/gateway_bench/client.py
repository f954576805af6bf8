"""A client that costs little: HTTP/1.1 by hand over asyncio streams, one connection each. It checks every answer."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gateway_bench.upstream import CHUNKS, MODEL, PACED

_READ_LIMIT_BYTES = 4 << 20
_NANOSECOND = 1e-9
_NUMBERS = [str(number) for number in range(CHUNKS)]


class WrongReplyError(Exception):
    """An answer is not what the upstream said."""


@dataclass(frozen=True)
class Timing:
    """One answer, in seconds: until its last byte, until its first token, and how old each token was on arrival."""

    total_s: float
    first_s: float = 0.0
    ages_s: tuple[float, ...] = ()


def make_body(*, kib: int, stream: bool, paced: bool = False) -> bytes:
    """A chat completion's body with a prompt of `kib` KiB."""
    text = (PACED if paced else "fast") + " x" * (kib * 512 - 3)
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": MODEL, "stream": stream, "messages": messages}).encode()


class Connection:
    """One kept-alive connection to a gateway on loopback; `token` is sent as bearer."""

    def __init__(self, port: int, *, token: str) -> None:
        self._port = port
        self._head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {token}\r\nContent-Length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes, *, stream: bool) -> Timing:
        """One call, checked and timed.

        Raises:
            WrongReplyError: another status or text than the upstream's.
            OSError, asyncio.IncompleteReadError: the connection ended.
        """
        began = time.perf_counter()
        return await (self._listen(body, began) if stream else self._fetch(body, began))

    def close(self) -> None:
        """Close the connection; the next call makes a new one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _fetch(self, body: bytes, began: float) -> Timing:
        data = b"".join([piece async for piece in self._pieces(body)])
        total_s = time.perf_counter() - began
        if json.loads(data)["choices"][0]["message"]["content"].split()[::2] != _NUMBERS:
            raise WrongReplyError("another text than the upstream's")
        return Timing(total_s)

    async def _listen(self, body: bytes, began: float) -> Timing:
        rest, ages, first_s, ended = b"", list[float](), 0.0, False
        async for piece in self._pieces(body):
            arrived_ns = time.monotonic_ns()
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                sent_ns = _sent_ns(event, number=len(ages))
                if sent_ns:
                    first_s = first_s or time.perf_counter() - began
                    ages.append((arrived_ns - sent_ns) * _NANOSECOND)
                ended = ended or event == b"data: [DONE]"
        if len(ages) != CHUNKS or not ended:
            raise WrongReplyError(f"{len(ages)} of {CHUNKS} chunks, end mark: {ended}")
        return Timing(time.perf_counter() - began, first_s, tuple(ages))

    async def _pieces(self, body: bytes) -> AsyncIterator[bytes]:
        """Send one call; the body of its answer as it arrives."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=_READ_LIMIT_BYTES)
        reader, writer = self._streams
        writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if head[9:12] != b"200":
            raise WrongReplyError(f"status {head[9:12].decode()}")
        if b"transfer-encoding: chunked" in head:
            while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            yield await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        if b"connection: close" in head:
            self.close()


def _sent_ns(event: bytes, *, number: int) -> int:
    """When chunk `number` was sent; 0 if the event is none with text."""
    if not event.startswith(b"data: {"):
        return 0
    choices = json.loads(event[6:])["choices"]
    text = choices[0]["delta"].get("content") if choices else None
    if not text:
        return 0
    said, sent_ns = text.split()
    if int(said) != number:
        raise WrongReplyError(f"chunk {said} where {number} was due")
    return int(sent_ns)

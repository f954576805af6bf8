"""Requests that are no good HTTP, over raw sockets: each gets a 4xx or is cut off, and nothing of it is served.

aiohttp parses with llhttp in C here; the first test says so, since its Python parser differs in what it lets through.
"""

import asyncio
import gzip
import json
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import http_parser

from clawloop_edge.gateway.app import STATS

from .conftest import TOKEN, Serve, Served

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
SECRET = "sk-do-not-log-me"
WAIT_S = 30


@pytest.fixture
async def served(scripted: Serve) -> Served:
    """A gateway whose engine always says the same, and that waits for a second for what does not come."""
    return await scripted(lambda prompt: "Fine.", body_timeout_s=1)


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    port = int(served.base_url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def head(*lines: str, start: str = f"POST {CHAT} HTTP/1.1", token: str = TOKEN, last: bool = True) -> bytes:
    """The head of a request with the token; `lines` are further headers, `last` ends the connection."""
    named = ["Host: 127.0.0.1", f"Authorization: Bearer {token}", "Content-Type: application/json", *lines]
    if last:
        named.append("Connection: close")
    return "\r\n".join([start, *named, "", ""]).encode("latin-1")


async def answers(served: Served, data: bytes, *, then: bytes = b"") -> bytes:
    """All that comes back until the gateway ends the connection; `then` is sent once something came."""
    found = b""
    async with connected(served) as (reader, writer), asyncio.timeout(WAIT_S):
        writer.write(data)
        try:
            while part := await reader.read(1 << 16):
                found += part
                writer.write(then)
                then = b""
        except ConnectionResetError:  # it did not read all of what was sent
            pass
    return found


def statuses(reply: bytes) -> list[int]:
    """The status of each response."""
    return [int(part) for part in re.findall(rb"(?:\A|\}|\n)HTTP/\d\.\d (\d{3}) ", reply)]


async def check_well(served: Served) -> None:
    """A good request is answered, and nothing is left behind."""
    status, _, _ = await served.post(CHAT, data=BODY)
    assert status == 200
    assert served.app[STATS]().in_flight == served.engine.health().in_flight == 0


def test_requests_are_parsed_in_c() -> None:
    assert http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy


SIZE = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
WHOLE = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
GARBAGE = b"\x00\r\n\r\n"
"""ends a connection on which everything before it was read"""
MALFORMED: dict[str, bytes] = {
    "a method that is none": head(start=f"P@ST {CHAT} HTTP/1.1"),
    "a method in lower case": head(start=f"post {CHAT} HTTP/1.1"),
    "no version": f"POST {CHAT}\r\n\r\n".encode(),
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a version that is none": head(start=f"POST {CHAT} HTTP/9.9"),
    "a version without number": head(start=f"POST {CHAT} HTTP/x"),
    "a version of three": head(start=f"POST {CHAT} HTTP/1.1.1"),
    "spaces in the path": head(start="POST /v1/chat completions HTTP/1.1"),
    "a control byte in the path": head(start="POST /v1/\x01 HTTP/1.1"),
    "a NUL in the path": head(start="POST /v1/\x00chat HTTP/1.1"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
    "zeros": b"\x00" * 1000,
    "nothing but line ends, then garbage": b"\r\n" * 20 + b"garbage\r\n\r\n",
    "a header without colon": head("Nonsense"),
    "a header without name": head(": x"),
    "a space before the colon": head("X-A : b"),
    "a header folded over two lines": head("X-A: b\r\n c"),
    "a NUL in a header": head("X-A: b\x00c"),
    "a control byte in a header": head("X-A: b\x01c"),
    "a bare line feed in a header": head("X-A: b\nX-Clawloop-Session: hidden"),
    "a bare carriage return in a header": head("X-A: b\rX-Clawloop-Session: hidden"),
    "a control byte in a header's name": head("X\x01A: b"),
    "a header that is too long": head("X-A: " + "b" * 100_000),
    "a header's name that is too long": head("X" * 100_000 + ": b"),
    "a path that is too long": head(start="POST /" + "a" * 100_000 + " HTTP/1.1"),
    "10,000 headers": head(*(f"X-{number}: x" for number in range(10_000))),
    "two hosts": head("Host: localhost"),
    "a negative length": head("Content-Length: -1") + BODY,
    "a length with a sign": head(f"Content-Length: +{len(BODY)}") + BODY,
    "a length that is no number": head("Content-Length: x") + BODY,
    "a length in base 16": head("Content-Length: 0x30") + BODY,
    "a length with a space": head("Content-Length: 3 0") + BODY,
    "an empty length": head("Content-Length:") + BODY,
    "a length of 30 digits": head("Content-Length: " + "9" * 30) + BODY,
    "two lengths that differ": head(SIZE, "Content-Length: 5") + BODY,
    "two lengths in one": head("Content-Length: 5, 5") + BODY,
    "a length and chunks": head(SIZE, CHUNKED) + WHOLE,
    "chunks and a length": head(CHUNKED, SIZE) + WHOLE,
    "chunks that are not last": head("Transfer-Encoding: chunked, gzip") + WHOLE,
    "chunks twice": head("Transfer-Encoding: chunked, chunked") + WHOLE,
    "chunks of a space": head("Transfer-Encoding : chunked") + WHOLE,
    "an encoding that is none": head("Transfer-Encoding: xchunked") + WHOLE,
    "an encoding and a length": head("Transfer-Encoding: identity", SIZE) + BODY,
    "a chunk of a negative size": head(CHUNKED) + b"-5\r\nhello\r\n0\r\n\r\n",
    "a chunk's size that is no number": head(CHUNKED) + b"zz\r\nhello\r\n0\r\n\r\n",
    "a chunk's size that is too large": head(CHUNKED) + b"f" * 30 + b"\r\nhello\r\n0\r\n\r\n",
    "a chunk's size with 0x": head(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk's size with a space": head(CHUNKED) + b" 5\r\nhello\r\n0\r\n\r\n",
    "a chunk's size with underscores": head(CHUNKED) + b"0_5\r\nhello\r\n0\r\n\r\n",
    "an empty chunk's size": head(CHUNKED) + b"\r\nhello\r\n0\r\n\r\n",
    "a chunk that is longer than it says": head(CHUNKED) + b"2\r\nhello\r\n0\r\n\r\n",
    "a chunk without its line end": head(CHUNKED) + b"5\r\nhello0\r\n\r\n",
    "a chunk with a bare line feed": head(CHUNKED) + b"5\nhello\n0\n\n",
    "a chunk extension that does not end": head(CHUNKED) + b"5;" + b"a" * 200_000 + b"\r\nhello\r\n0\r\n\r\n",
    "a trailer that is no header": head(CHUNKED) + b"%x\r\n%b\r\n0\r\nnonsense\r\n\r\n" % (len(BODY), BODY),
    "a NUL in a trailer": head(CHUNKED) + b"%x\r\n%b\r\n0\r\nX: a\x00\r\n\r\n" % (len(BODY), BODY),
    "a foreign name in an absolute URI": head(SIZE, start=f"POST http://evil.example{CHAT} HTTP/1.1") + BODY,
    "an authority for a path": head(start="CONNECT 127.0.0.1:80 HTTP/1.1"),
    "an asterisk for a path": head(start="OPTIONS * HTTP/1.1"),
    "a path without a slash": head(SIZE, start="POST v1/chat/completions HTTP/1.1") + BODY,
    "no host": f"GET /v1/models HTTP/1.1\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode(),
    "an unknown expectation": head(SIZE, "Expect: cake") + BODY,
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_what_is_no_http_is_refused_once_and_cut_off(what: str, served: Served) -> None:
    reply = await answers(served, MALFORMED[what])
    found = statuses(reply)
    assert len(found) == 1, "one refusal, and the connection ends"
    assert 400 <= found[0] < 500, reply[:300]
    assert served.pool.stats().steps == 0
    await check_well(served)


async def test_the_words_of_the_refusal_are_in_the_usual_shape_and_no_secret_is_logged(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        reply = await answers(served, head(f"X-Key: {SECRET}\x00", token=SECRET))
    top, _, body = reply.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 400 ") or top.startswith(b"HTTP/1.0 400 ")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert SECRET not in caplog.text
    assert SECRET.encode() not in reply


async def test_a_second_request_hidden_in_the_first_is_not_served_by_its_token(served: Served) -> None:
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    five, all_of_it = "Content-Length: 5", f"Content-Length: {len(hidden)}"
    end = b"0\r\n\r\n"
    hiding = {
        "length before chunks": head(five, CHUNKED, last=False) + end + hidden,
        "chunks before length": head(CHUNKED, five, last=False) + end + hidden,
        "a folded encoding": head("Transfer-Encoding:\r\n chunked", five, last=False) + end + hidden,
        "a tab": head("Transfer-Encoding:\tchunked", five, last=False) + end + hidden,
        "two lengths": head("Content-Length: 0", all_of_it, last=False) + hidden,
        "a chunk extension": head(CHUNKED, last=False) + b"5;\n" + hidden,
        "a body of GET": head(all_of_it, start="GET /v1/models HTTP/1.1", last=False) + hidden,
        "after the body": head(SIZE, last=False) + BODY + hidden,
    }
    for name, data in hiding.items():
        found = statuses(await answers(served, data, then=GARBAGE))
        assert found, name
        assert found.count(200) <= 1, f"{name}: the hidden request was served: {found}"
        if name == "after the body":
            assert found == [200, 401], "a request of its own, without a token"


async def test_chunks_that_are_allowed_are_understood(served: Served) -> None:
    byte_by_byte = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    for data in (WHOLE, byte_by_byte, b"%x;a=b\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(BODY), BODY)):
        reply = await answers(served, head(CHUNKED) + data)
        assert statuses(reply) == [200]


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(served: Served) -> None:
    async with connected(served) as (reader, writer), asyncio.timeout(WAIT_S):
        writer.write(head(SIZE, "Expect: 100-continue"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_unpacks_to_gigabytes_is_refused_packed(served: Served) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = b"\x00" * (1 << 20)
    bomb = b"".join(packer.compress(block) for _ in range(200)) + packer.flush()
    bomb = bomb * 50  # gzip members one after the other: 10 GB from 10 MB
    began = time.monotonic()
    for packed in (bomb, gzip.compress(BODY)):
        data = head("Content-Encoding: gzip", f"Content-Length: {len(packed)}") + packed
        assert statuses(await answers(served, data)) == [415]
    assert time.monotonic() - began < 8
    await check_well(served)


async def test_an_upgrade_is_not_taken(served: Served) -> None:
    for wanted in ("h2c", "websocket"):
        upgrade = (
            f"Upgrade: {wanted}",
            "Connection: Upgrade, HTTP2-Settings",
            "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        )
        reply = await answers(served, head(*upgrade, start="GET /v1/models HTTP/1.1"))
        assert statuses(reply) == [200], reply[:200]
        assert statuses(await answers(served, head(*upgrade, start=f"GET {CHAT} HTTP/1.1"))) == [405]


async def test_a_web_page_gets_no_leave_to_read(served: Served) -> None:
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:3000", 405)):
        preflight = (
            f"Origin: {origin}",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization",
            "Access-Control-Request-Private-Network: true",
        )
        reply = await answers(served, head(*preflight, start=f"OPTIONS {CHAT} HTTP/1.1"))
        assert statuses(reply) == [status]
        assert b"access-control" not in reply.lower()


async def test_names_that_only_look_like_ours_are_refused(served: Served) -> None:
    for host in (
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example",
        "evil.example:80",
        "127.0.0.1@evil.example",
        "evil.example#127.0.0.1",
        "evil.example/127.0.0.1",
        "evil.example?127.0.0.1",
        "evil.example\\127.0.0.1",
        "0.0.0.0",
        "169.254.169.254",
        "[::ffff:8.8.8.8]",
        "2130706433.evil.example",
        "",
    ):
        data = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        assert statuses(await answers(served, data)) in ([403], [400]), host


async def test_strange_spellings_of_a_path_reach_nothing_that_needs_no_token(served: Served) -> None:
    for path in (
        "/healthz/../v1/models",
        "/healthz%2f..%2fv1/models",
        "/healthz;/../v1/models",
        "//v1/models",
        "/v1//models",
        "/./v1/models",
        "/v1/models/",
        "/v1/models%00",
        "/%76%31/models",
        "/v1/models?/healthz",
        "/v1/models#/healthz",
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/ui/../../etc/passwd",
        "/\\v1\\models",
        "http://127.0.0.1/v1/models",
    ):
        data = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        reply = await answers(served, data)
        assert statuses(reply) in ([400], [401], [404], [405]), (path, reply[:200])
        assert b"root:" not in reply


async def test_a_wrong_content_type_changes_nothing(served: Served) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "a/b; charset=x",
    ):
        status, _, body = await served.post(CHAT, data=BODY, headers={"Content-Type": kind})
        assert status == 200, (kind, body)


async def test_a_thousand_idle_connections_cost_others_nothing(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", body_timeout_s=2)
    port = int(served.base_url.rpartition(":")[2])

    async def begin(number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write([b"", b"POST ", head(SIZE)[:-4], head(SIZE)][number % 4])
        return reader, writer

    idle = await asyncio.gather(*map(begin, range(1000)))
    try:
        began = time.monotonic()
        assert (await served.post(CHAT, data=BODY))[0] == 200
        assert time.monotonic() - began < 5
        async with asyncio.timeout(WAIT_S):
            ends = await asyncio.gather(*(reader.read() for reader, _ in idle[:100]))
        assert {bytes(end[:12]) for end in ends} == {b"", b"HTTP/1.1 408"}, "those without headers are cut off"
    finally:
        for _, writer in idle:
            writer.transport.abort()
    await check_well(served)


async def test_headers_that_come_byte_by_byte_are_cut_off_also_on_a_connection_that_was_used(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", body_timeout_s=0.4)
    for before in (b"", head(start="GET /v1/models HTTP/1.1", last=False)):
        began = time.monotonic()
        async with connected(served) as (reader, writer), asyncio.timeout(WAIT_S):
            if before:
                writer.write(before)
                await reader.readuntil(b"}]}")
            cut = asyncio.create_task(reader.read())
            writer.write(b"GET /v1/models HTTP/1.1\r\nX-A: ")
            while not cut.done():
                writer.write(b"b")
                await asyncio.wait([cut], timeout=0.05)
            assert time.monotonic() - began > 0.3
            if not isinstance(cut.exception(), ConnectionResetError):  # of a byte that came too late
                assert cut.result() == b""

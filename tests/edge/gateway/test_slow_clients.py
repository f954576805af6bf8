"""Slow, silent and vanishing clients, over raw sockets: they get an end, and cost nothing to others."""

import asyncio
import json
import time

from clawloop_edge.gateway.app import STATS

from .conftest import Serve, Served

CHAT = "/v1/chat/completions"


def _head(served: Served, size: int) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {served.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


def _body(*, stream: bool = True) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": stream}).encode()


async def _connect(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(served.base_url.rpartition(":")[2]), limit=1024)


async def _until_idle(served: Served) -> None:
    deadline = time.monotonic() + 15
    while served.app[STATS]().in_flight or served.engine.health().in_flight:
        assert time.monotonic() < deadline, "a call is still in flight"
        await asyncio.sleep(0.02)


async def test_a_body_that_does_not_come_is_answered_408(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", body_timeout_s=0.2)
    reader, writer = await _connect(served)
    writer.write(_head(served, 100) + b'{"messages":')
    reply = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
    assert b" 408 " in reply.partition(b"\r\n")[0]
    assert b'"code":"request_timeout"' in reply
    writer.close()


async def test_a_client_that_goes_away_in_its_body_leaves_nothing(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.")
    _, writer = await _connect(served)
    writer.write(_head(served, 100) + b'{"messages":')
    await writer.drain()
    writer.transport.abort()
    await _until_idle(served)
    assert (await served.post(CHAT, data=_body(stream=False)))[0] == 200


async def test_a_silent_model_is_bridged_by_pings(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", delay_s=0.5, headers_after_s=0.1, keep_alive_s=0.1)
    auth = {"Authorization": f"Bearer {served.token}"}
    async with served.http.post(served.base_url + CHAT, data=_body(), headers=auth) as reply:
        text = await reply.text()
    assert text.startswith("data: ")
    assert text.count(": keep-alive\n\n") >= 3
    assert text.endswith("data: [DONE]\n\n")


async def test_a_client_that_does_not_read_is_let_go(scripted: Serve) -> None:
    words = "word " * 6000
    served = await scripted(lambda prompt: words, keep_alive_s=0.2, stalled_client_s=0.5, default_max_tokens=20_000)
    reader, writer = await _connect(served)
    data = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, "logprobs": True}).encode()
    writer.write(_head(served, len(data)) + data)
    await reader.readuntil(b"\r\n\r\n")
    assert (await served.post(CHAT, data=_body(stream=False)))[0] == 200, "others are served meanwhile"
    await _until_idle(served)
    writer.close()


async def test_a_client_that_stops_reading_before_the_last_event_is_let_go(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", keep_alive_s=0.2, stalled_client_s=0.5)
    reader, writer = await _connect(served)
    echoed = {"a": "x" * (12 << 20)}  # comes back in the first events and in the last one
    data = json.dumps({"input": "hi", "stream": True, "metadata": echoed}).encode()
    writer.write(_head(served, len(data)).replace(CHAT.encode(), b"/v1/responses") + data)
    seen = b""
    while b"response.output_text.delta" not in seen:
        seen = seen[-64:] + await asyncio.wait_for(reader.read(1 << 20), 10)
    await _until_idle(served)
    writer.close()

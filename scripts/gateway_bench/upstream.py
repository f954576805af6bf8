"""The fixed upstream: an OpenAI-compatible server that always says `CHUNKS` chunks, as fast as it can.

A chunk says its number and when it was sent, so that the client can tell order and age; the monotonic clock is one for
all processes of a machine. A prompt that begins with `PACED` is streamed one chunk each `PACE_S`.
"""

import argparse
import asyncio
import json
import time

import uvloop
from aiohttp import web

CHUNKS = 64
PACE_S = 0.005
PACED = "paced"
MODEL = "fixed"
USAGE = {"prompt_tokens": 10, "completion_tokens": CHUNKS, "total_tokens": 10 + CHUNKS}
MAX_BODY_BYTES = 64 << 20
_ABOUT = {"id": "chatcmpl-fixed", "created": 1, "model": MODEL}


def chunk(number: int) -> str:
    """The text of one chunk that is sent now."""
    return f"{number} {time.monotonic_ns()} "


def whole() -> bytes:
    """The body of an answer that is not streamed."""
    message = {"role": "assistant", "content": "".join(map(chunk, range(CHUNKS)))}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps({**_ABOUT, "object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()


def event(delta: dict[str, str], *, reason: str | None = None) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: %b\n\n" % json.dumps({**_ABOUT, "object": "chat.completion.chunk", "choices": [choice]}).encode()


_OPEN, _CLOSE = event({"content": "@"}).split(b"@")
"""around the text of a chunk"""


async def stream(request: web.Request, *, paced: bool) -> web.StreamResponse:
    """All chunks, then the usage and the end mark."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(event({"role": "assistant", "content": ""}))
    for number in range(CHUNKS):
        if paced:
            await asyncio.sleep(PACE_S)
        await response.write(_OPEN + chunk(number).encode() + _CLOSE)
    last = json.dumps({**_ABOUT, "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    await response.write(event({}, reason="stop") + b"data: %b\n\ndata: [DONE]\n\n" % last.encode())
    await response.write_eof()
    return response


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    body = json.loads(await request.read())
    if body.get("stream"):
        return await stream(request, paced=body["messages"][-1]["content"].startswith(PACED))
    return web.Response(body=whole(), content_type="application/json")


async def models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1}]})


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    port = parser.parse_args().port
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()

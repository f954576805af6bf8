"""The least that a gateway in Python can do: read the JSON, send the body on, give back the bytes as they come.

No token, no record, no retry: what it costs is what aiohttp costs.
"""

import argparse
import json
from collections.abc import AsyncIterator, Mapping

import aiohttp
import uvloop
from aiohttp import web

from gateway_bench.upstream import MAX_BODY_BYTES

SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)
UPSTREAM: web.AppKey[str] = web.AppKey("upstream", str)
_NOT_SENT_ON = frozenset({"host", "content-length", "connection", "keep-alive", "transfer-encoding", "te", "upgrade"})


def sent_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are not this connection's own."""
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_SENT_ON}


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    data = await request.read()
    streamed = bool(json.loads(data).get("stream"))
    url = request.app[UPSTREAM] + request.path
    async with request.app[SESSION].post(url, data=data, headers=sent_on(request.headers)) as answer:
        if not streamed:
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    async with request.app[SESSION].get(request.app[UPSTREAM] + request.path) as answer:
        return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)


async def session(app: web.Application) -> AsyncIterator[None]:
    """One client for all calls, as long as the relay runs."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as opened:
        app[SESSION] = opened
        yield


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True, help="its address, without /v1")
    options = parser.parse_args()
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app[UPSTREAM] = options.upstream
    app.cleanup_ctx.append(session)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()

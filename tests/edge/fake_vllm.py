"""Servers on loopback for the engine `upstream`: one that speaks vLLM's documented replies, with a real engine behind
it, so that its ids and logprobs are real; and a plain OpenAI-compatible one that says what a test tells it to.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from clawloop_edge.engine.protocol import Engine, GenerateRequest, Token
from clawloop_shared.errors import ClawloopError
from clawloop_shared.lora import FILES
from clawloop_shared.records import Policy, Sampling

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def running(app: web.Application, *, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The address of a server that serves `app` until the end."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def error(status: int, message: str, *, param: str | None = None, code: Any = None) -> web.Response:
    """vLLM's and OpenAI's error."""
    body = {"error": {"message": message, "type": "BadRequestError", "param": param, "code": code or status}}
    return web.json_response(body, status=status)


class FakeVllm:
    """vLLM's server, as far as docs/upstream.md uses it. `requests` are the bodies that came to `/v1/completions`.

    `with_ids`, `refuses`, `bend` and `runtime_lora` take away or spoil what a test wants to be without.
    """

    def __init__(self, engine: Engine, *, name: str = "served") -> None:
        self.engine, self.name = engine, name
        self.requests: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.loras: dict[str, Policy] = {}
        self.with_ids = True
        self.refuses = ""
        self.runtime_lora = True
        self.chunk_tokens = 1
        self.aborted = 0
        self.bend: Callable[[Json], Json] = lambda chunk: chunk
        self._next_version = 1

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/load_lora_adapter", self.load)
        app.router.add_post("/v1/unload_lora_adapter", self.unload)
        return app

    async def models(self, _request: web.Request) -> web.Response:
        base = {"id": self.name, "object": "model", "owned_by": "vllm", "parent": None, "max_model_len": 1500}
        loras = [{"id": name, "object": "model", "owned_by": "vllm", "parent": self.name} for name in self.loras]
        return web.json_response({"object": "list", "data": [base, *loras]})

    async def load(self, request: web.Request) -> web.Response:
        if not self.runtime_lora:
            return web.json_response({"detail": "Not Found"}, status=404)
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.loras:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        files = {file: (folder / file).read_bytes() for file in FILES}
        policy = Policy(self.engine.line.line_id, self._next_version, name)
        try:
            await self.engine.load(policy, files)
        except ClawloopError as failure:
            return error(500, str(failure))
        self._next_version += 1
        self.loras[name] = policy
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name not in self.loras:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        await self.engine.unload(self.loras.pop(name).version)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if body["model"] != self.name and body["model"] not in self.loras:
            return error(404, f"The model `{body['model']}` does not exist.", param="model")
        if self.refuses in body:
            return error(400, f"{self.refuses} is not supported", param=self.refuses)
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self.engine.tokenizer.encode(body["prompt"])
        try:
            generation = await self.engine.generate(self._asked(body, prompt))
        except ClawloopError as failure:
            return error(400, str(failure), param="prompt")
        if not body.get("stream"):
            tokens = [token async for token in generation]
            choice = self._choice(body, tokens, prompt=prompt) | await self._scored(body, prompt)
            return web.json_response(self.bend({"object": "text_completion", "choices": [choice], "usage": {}}))
        return await self._stream(request, body, prompt=prompt, tokens=aiter(generation))

    async def _stream(
        self, request: web.Request, body: Json, *, prompt: list[int], tokens: AsyncIterator[Token]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        held: list[Token] = []
        first = True
        try:
            async for token in tokens:
                held.append(token)
                if len(held) < self.chunk_tokens and not first and not token.finish_reason:
                    continue
                choice = self._choice(body, held, prompt=prompt if first else None)
                await response.write(_event(self.bend({"object": "text_completion", "choices": [choice]})))
                held, first = [], False
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": 3}}
            await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _asked(self, body: Json, prompt: list[int]) -> GenerateRequest:
        fields = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed") if name in body}
        lora = self.loras.get(body["model"])
        return GenerateRequest(
            prompt_ids=prompt,
            max_tokens=body["max_tokens"],
            sampling=Sampling(**fields),
            version=lora.version if lora else 0,
            top_logprobs=body.get("logprobs") or 0,
        )

    def _choice(self, body: Json, tokens: list[Token], *, prompt: list[int] | None) -> Json:
        ids = [token.token_id for token in tokens]
        choice: Json = {
            "index": 0,
            "text": self.engine.tokenizer.visible(ids),
            "logprobs": None,
            "finish_reason": tokens[-1].finish_reason,
            "stop_reason": None,
        }
        if self.with_ids and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "text_offset": [0] * len(ids),
                "token_logprobs": [token.logprob for token in tokens],
                "tokens": [f"token_id:{i}" for i in ids],
                "top_logprobs": [
                    {f"token_id:{i}": value for i, value in ((token.token_id, token.logprob), *token.top)}
                    for token in tokens
                ],
            }
        return choice

    async def _scored(self, body: Json, prompt: list[int]) -> Json:
        if body.get("prompt_logprobs") is None:
            return {}
        lora = self.loras.get(body["model"])
        found = await self.engine.score(prompt[:1], prompt[1:], version=lora.version if lora else 0)
        rows = [{str(i): {"logprob": value, "rank": 1}} for i, value in zip(prompt[1:], found, strict=True)]
        return {"prompt_logprobs": [None, *rows]}


class PlainServer:
    """An OpenAI-compatible server without token ids. Chats are answered by `answer`; `requests` are their bodies."""

    def __init__(self) -> None:
        self.requests: list[Json] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.peers: set[Any] = set()
        self.cancelled = asyncio.Event()
        self.answer: Handler = says(delta("Hello"), delta(" world"), end("stop"))

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/{path:.*}", self.post)
        return app

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "plain", "object": "model"}]})

    async def post(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.paths.append(request.path)
        self.headers.append(dict(request.headers))
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(**choice: Any) -> bytes:
    """One event of a chat."""
    return _event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, **choice}]})


def delta(content: str, **more: Any) -> bytes:
    """An event with text."""
    return chunk(delta={"content": content}, **more)


def end(reason: str | None) -> bytes:
    """The event that says why it ended."""
    return chunk(finish_reason=reason)


DONE = b"data: [DONE]\n\n"


def says(*events: bytes, done: bytes = DONE) -> Handler:
    """Answers a call with these events, each written by itself."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in (*events, done):
            await response.write(event)
        await response.write_eof()
        return response

    return answer


def replies(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    """Answers a call with one JSON body."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return answer


def whole(message: Json, reason: str = "stop", **more: Any) -> Handler:
    """Answers a call that does not stream."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason, **more}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
    return replies({"object": "chat.completion", "choices": [choice], "usage": usage})

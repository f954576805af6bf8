"""Real edges for the SDKs: processes of their own, clients that note what they are given, and a connection that breaks.

Knows no API; what is asked and how answers are read is the affair of `sdk_apis`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import anthropic
import openai

from demoworld.stage import Part, StageError, make_edge

from .sdk_apis import Answer, Api, Ask

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
WAIT_S = 20.0
"""how long something may take that is only waited for"""


@dataclass(frozen=True)
class Seen:
    """One HTTP reply, as a client saw its head."""

    path: str
    status: int
    retry: int
    """which attempt of the SDK at the same call it answers; 0 is the first"""
    at_s: float
    headers: Mapping[str, str]


@dataclass
class Door:
    """An edge, and all that its clients were given."""

    part: Part
    seen: list[Seen] = field(default_factory=list)
    given: dict[str, Answer] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """ids of answers whose client went away"""
    talks: list[list[list[Answer]]] = field(default_factory=list)
    """conversations: the answers of each turn"""
    choices: dict[str, str] = field(default_factory=dict)
    """the texts of answers that came beside others"""
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    """what was told of each token, by the id of the answer"""

    @property
    def trainable(self) -> dict[str, str]:
        """What `x-clawloop-trainable` said of each step."""
        named = [(head.headers.get("x-clawloop-step"), head) for head in self.seen]
        return {one: head.headers["x-clawloop-trainable"] for steps, head in named if steps for one in steps.split(",")}

    def client(self, sdk: ModuleType, *, port: int = 0, **settings: Any) -> Any:
        """An asynchronous client of this edge, which does not retry unless it is told to."""
        root = f"http://127.0.0.1:{port or self.part.port}"
        merged: Any = {"api_key": self.part.token(), "max_retries": 0, "timeout": WAIT_S, **settings}
        hooks: Any = {"response": [self._note_async]}
        if sdk is anthropic:
            other = anthropic.DefaultAsyncHttpxClient(event_hooks=hooks)
            return anthropic.AsyncAnthropic(base_url=root, http_client=other, **merged)
        http = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
        return openai.AsyncOpenAI(base_url=f"{root}/v1", http_client=http, **merged)

    def sync_client(self, sdk: ModuleType) -> Any:
        """A synchronous client."""
        root, hooks = f"http://127.0.0.1:{self.part.port}", {"response": [self._note]}
        settings: Any = {"api_key": self.part.token(), "max_retries": 0}
        if sdk is anthropic:
            other = anthropic.DefaultHttpxClient(event_hooks=hooks)
            return anthropic.Anthropic(base_url=root, http_client=other, **settings)
        http = openai.DefaultHttpxClient(event_hooks=hooks)
        return openai.OpenAI(base_url=f"{root}/v1", http_client=http, **settings)

    async def whole(self, api: Api, client: Any, ask: Ask, **more: Any) -> Answer:
        """An answer in one piece; `more` are further arguments of the SDK's `create`."""
        return self.noted(api.read(await api.resource(client).create(**api.body(ask), **more)))

    async def streamed(self, api: Api, client: Any, ask: Ask) -> Answer:
        """An answer as the SDK puts it together from a stream."""
        return self.noted(api.read(await api.collected(client, ask)))

    async def ask(self, api: Api, client: Any, ask: Ask, *, stream: bool) -> Answer:
        """An answer, either way."""
        return await (self.streamed if stream else self.whole)(api, client, ask)

    async def open(self, api: Api, client: Any, ask: Ask, **more: Any) -> Any:
        """A raw stream of the SDK's events."""
        return await api.resource(client).create(**api.body(ask), stream=True, **more)

    def noted(self, answer: Answer) -> Answer:
        """Note what was given."""
        self.given[answer.step_id] = answer
        return answer

    def in_flight(self) -> int:
        """Calls that the engine works on now."""
        return int(self.part.get("/readyz")["in_flight"])

    async def idle(self) -> None:
        """Return once the engine is free."""
        await until(lambda: self.in_flight() == 0)

    def explain(self, *step_ids: str) -> dict[str, Any]:
        """What `clawloop-edge explain` tells of steps, by id. Steps are written behind an answer's back, so it may take
        a moment until they are there."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                found = self.part.run("explain", *step_ids, "--json", expect_json=True)
                return {step["step_id"]: step for step in (found if isinstance(found, list) else [found])}
            except StageError:
                if time.monotonic() > deadline:
                    raise

    async def _note_async(self, response: Any) -> None:
        self._note(response)

    def _note(self, response: Any) -> None:
        retry = int(response.request.headers.get("x-stainless-retry-count", 0))
        path = response.request.url.path
        self.seen.append(Seen(path, response.status_code, retry, time.monotonic(), response.headers))


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds. Raises TimeoutError after `WAIT_S`."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.02)


@contextmanager
def real_edge(folder: Path) -> Iterator[Door]:
    """An edge with the demo's model; its bounds are small, so that tests reach them."""
    settings = {"engine": {"max_queue": 32}, "gateway": {"max_body_bytes": 1 << 20, "retry_after_s": 1}}
    with _running(make_edge(folder, MODEL, name="real", settings=settings)) as door:
        yield door


@contextmanager
def scripted_edge(folder: Path, script: list[str]) -> Iterator[Door]:
    """An edge that says the texts of `script`, one a call."""
    path = folder / "script.json"
    path.write_text(json.dumps(script))
    settings = {"model": {"kind": "scripted", "script": str(path)}}
    with _running(make_edge(folder, MODEL, name="scripted", settings=settings)) as door:
        yield door


@contextmanager
def _running(part: Part) -> Iterator[Door]:
    try:
        part.start()
        yield Door(part)
    finally:
        part.stop()


@asynccontextmanager
async def breaking(port: int, *, cut_after_answer: bool) -> AsyncIterator[int]:
    """A port that leads to `port`, but the first connection is cut: at once, or when the answer to it is there."""
    connections = 0

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        cut = connections == 1
        if cut and not cut_after_answer:
            return writer.close()
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        sending = asyncio.create_task(pump(reader, forth))
        try:
            if cut:
                await back.read(1)
            else:
                await pump(back, writer)
        finally:
            for closing in (forth, writer):
                closing.close()
            await sending
        return None

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    assert connections > 1, "nobody tried again"

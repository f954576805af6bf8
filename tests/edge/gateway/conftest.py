"""A real gateway on loopback before a scripted or a real engine, with a real pool."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.sessions.names import SessionNames

TOKEN = "test-token-0123456789"


@dataclass
class Served:
    """A gateway that is running."""

    engine: Any
    pool: Pool
    app: web.Application
    http: ClientSession
    base_url: str
    token: str = TOKEN

    @property
    def sdk(self) -> dict[str, Any]:
        """Arguments of an OpenAI client."""
        return {"base_url": f"{self.base_url}/v1", "api_key": self.token}

    async def post(
        self, path: str, body: Any = None, *, headers: dict[str, str] | None = None, data: Any = None
    ) -> Any:
        """(status, headers, JSON) of a POST with the token."""
        auth = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        async with self.http.post(self.base_url + path, json=body, data=data, headers=auth) as reply:
            return reply.status, reply.headers, await reply.json()

    def id_of(self, name: str) -> str:
        """What a session or trajectory that its caller calls `name` is kept as."""
        return SessionNames(self.pool.tag).id_of(name)

    def kept(self, step_id: str) -> KeptStep:
        """A step, once everything handed to the pool is on disk."""
        self.pool.submit(lambda database: None).result(10)
        found = self.pool.get_step(step_id)
        assert found is not None, f"{step_id} is not in the pool"
        return found


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """An empty pool."""
    with Pool.open(tmp_path / "pool", KnownKey.of(os.urandom(32)), writer=True) as opened:
        yield opened


@pytest.fixture
async def serve(pool: Pool) -> AsyncIterator[Serve]:
    """`await serve(engine, **settings)` -> a running gateway; stopped at the end."""
    async with AsyncExitStack() as stack:

        async def start(engine: Any, **settings: Any) -> Served:
            app = make_app(engine, pool, settings=GatewaySettings(**settings), token=TOKEN)
            runner = make_runner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            http = await stack.enter_async_context(ClientSession())
            return Served(engine, pool, app, http, f"http://127.0.0.1:{port}")

        yield start


@pytest.fixture
async def scripted(tiny_model: Path, serve: Serve) -> AsyncIterator[Serve]:
    """`await scripted([text, ...], delay_s=0, **settings)` -> a gateway before an engine that says these texts."""
    async with AsyncExitStack() as stack:

        async def start(script: Any, *, delay_s: float = 0.0, **settings: Any) -> Served:
            engine = ScriptedEngine(tiny_model, script, token_delay_s=delay_s)
            stack.push_async_callback(engine.close)
            return await serve(engine, **settings)

        yield start


@pytest.fixture
async def real(engine: Any, serve: Serve) -> Served:
    """A gateway before the MLX engine on the tiny model."""
    return await serve(engine)

"""`/healthz` (the process answers), `/readyz` (the model does) and `/v1/models`."""

from typing import Any

from aiohttp import web

from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.body import pinned_version
from clawloop_edge.gateway.drain import Drain

_CREATED_S = 0


class HealthHandler:
    """Says how the edge is, and which models it serves."""

    def __init__(self, engine: Engine | TextEngine, drain: Drain) -> None:
        self._engine, self._drain = engine, drain

    async def healthz(self, request: web.Request) -> web.Response:
        """The process is up."""
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 while calls are answered, else 503 and why not."""
        health = self._engine.health()
        ready = health.alive and not self._drain.draining
        status = "ready" if ready else "draining" if self._drain.draining else "engine gone"
        body = {"status": status, "in_flight": health.in_flight, "versions": health.versions, "detail": health.detail}
        return web.json_response(body, status=200 if ready else 503)

    async def models(self, request: web.Request) -> web.Response:
        """The current policy, and each version that is loaded."""
        names = ["clawloop", *(f"clawloop@{version}" for version in sorted(self._engine.health().versions))]
        return web.json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: web.Request) -> web.Response:
        """One of them; a name without a version is the current policy."""
        name = request.match_info["name"]
        version = pinned_version(name)
        if version is not None and version not in self._engine.health().versions:
            message = f"no adapter of version {version} is loaded; see GET /v1/models"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        return web.json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": _CREATED_S, "owned_by": "clawloop"}
        context = context_length(self._engine)
        return {**model, "context_length": context} if context else model


def context_length(engine: Engine | TextEngine) -> int:
    """Tokens that a prompt and its answer may have; 0 if that is not known."""
    return engine.context_length if isinstance(engine, TextEngine) else engine.tokenizer.context_length

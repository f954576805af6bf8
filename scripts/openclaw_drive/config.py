"""OpenClaw's configuration for a small local model behind the edge. Only options of OpenClaw's own.

Its schema is strict: a key it does not know makes every command fail. Observed on OpenClaw 2026.9.6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

PROVIDER = "clawloop"
MODEL = "clawloop"
TOOLS = ("read", "write", "edit", "ls", "exec")
"""what is allowed; with `write` comes `apply_patch`, so the model sees six"""
CONTEXT_TOKENS = 32_768
MAX_TOKENS = 128
"""of one answer"""
CALL_TIMEOUT_S = 600
"""of one call, reading the prompt included"""


class Api(StrEnum):
    """An API by which OpenClaw talks to its model provider."""

    COMPLETIONS = "completions"
    """OpenAI's chat completions, what OpenClaw uses if told nothing else"""
    RESPONSES = "responses"
    """OpenAI's responses"""
    MESSAGES = "messages"
    """Anthropic's messages; the token goes out as `x-api-key`"""

    @property
    def option(self) -> str:
        """Its name in OpenClaw's configuration."""
        return f"anthropic-{self}" if self is Api.MESSAGES else f"openai-{self}"

    def base_url(self, edge_url: str) -> str:
        """What OpenClaw puts its paths after; to that of Anthropic's API it adds `/v1` itself."""
        return edge_url if self is Api.MESSAGES else f"{edge_url}/v1"


@dataclass(frozen=True)
class Edge:
    """An edge as OpenClaw's model provider: its address without a path, its token, and the API to use."""

    url: str
    token: str
    api: Api = Api.COMPLETIONS


@dataclass(frozen=True)
class Gateway:
    """Where OpenClaw's own gateway, its daemon, listens on loopback, and the token that it wants."""

    port: int
    token: str


def provider(edge: Edge) -> dict[str, Any]:
    """The edge as a model provider. The affinity headers name the conversation, so that the edge need not guess it."""
    model = {
        "id": MODEL,
        "name": "clawloop",
        "reasoning": False,
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": CONTEXT_TOKENS,
        "maxTokens": MAX_TOKENS,
        "compat": {
            "sendSessionAffinityHeaders": True,
            "supportsPromptCacheKey": True,
            "supportsUsageInStreaming": True,
            "maxTokensField": "max_tokens",
            "supportsStore": False,
            "supportsDeveloperRole": False,
        },
    }
    return {
        "baseUrl": edge.api.base_url(edge.url),
        "apiKey": edge.token,
        "api": edge.api.option,
        "timeoutSeconds": CALL_TIMEOUT_S,
        "models": [model],
    }


def openclaw_config(edge: Edge, *, folder: Path, temperature: float, gateway: Gateway | None = None) -> dict[str, Any]:
    """The whole file: one provider, the small set of tools, no background requests, everything under `folder`."""
    name = f"{PROVIDER}/{MODEL}"
    agent = {
        "model": {"primary": name},
        "models": {name: {"params": {"temperature": temperature}}},
        "utilityModel": "",
        "workspace": str(folder / "workspace"),
        "heartbeat": {"every": "0m"},
        "skipBootstrap": True,
        "contextInjection": "never",
        "skills": [],
    }
    listening: dict[str, Any] = {"mode": "local", "bind": "loopback"}
    if gateway is not None:
        listening |= {"port": gateway.port, "auth": {"mode": "token", "token": gateway.token}}
    return {
        "update": {"checkOnStart": False},
        "models": {
            "mode": "replace",
            "catalogRefresh": {"enabled": False},
            "providers": {PROVIDER: provider(edge)},
        },
        "agents": {"defaults": agent},
        "tools": {"allow": list(TOOLS), "toolSearch": False},
        "logging": {"consoleLevel": "error", "file": str(folder / "openclaw.log")},
        "gateway": listening,
    }


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write it for its owner alone; it holds the edge's token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))

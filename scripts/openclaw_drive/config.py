"""OpenClaw's configuration for a small local model behind the edge. Only options of OpenClaw's own.

Its schema is strict: a key it does not know makes every command fail. Observed on OpenClaw 2026.9.6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

MODEL = "clawloop/clawloop"
"""the edge's, as OpenClaw names it"""
TOOLS = ("read", "write", "edit", "ls", "exec")
"""what is allowed; with `write` comes `apply_patch`, so the model sees six"""
MAX_TOKENS = 128
"""of one answer"""


class Api(StrEnum):
    """An API by which OpenClaw talks to its model provider."""

    COMPLETIONS = "completions"
    """OpenAI's chat completions, what OpenClaw uses if told nothing else"""
    RESPONSES = "responses"
    """OpenAI's responses"""
    MESSAGES = "messages"
    """Anthropic's messages; the token goes out as `x-api-key`"""


@dataclass(frozen=True)
class Gateway:
    """Where OpenClaw's own gateway, its daemon, listens on loopback, and the token that it wants."""

    port: int
    token: str


def openclaw_config(*, folder: Path, temperature: float, gateway: Gateway | None = None) -> dict[str, Any]:
    """All but the edge, which `clawloop-edge openclaw connect` puts in: the small set of tools, no background requests,
    everything under `folder`."""
    agent = {
        "models": {MODEL: {"params": {"temperature": temperature}}},
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
        "models": {"mode": "replace", "catalogRefresh": {"enabled": False}},
        "agents": {"defaults": agent},
        "tools": {"allow": list(TOOLS), "toolSearch": False},
        "logging": {"consoleLevel": "error", "file": str(folder / "openclaw.log")},
        "gateway": listening,
    }


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write it for its owner alone; it holds the daemon's token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))

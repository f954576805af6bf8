"""OpenClaw's configuration for a small local model behind the edge. Only options of OpenClaw's own.

Its schema is strict: a key it does not know makes every command fail. Observed on OpenClaw 2026.9.6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROVIDER = "clawloop"
MODEL = "clawloop"
TOOLS = ("read", "write", "edit", "ls", "exec")
"""what is allowed; with `write` comes `apply_patch`, so the model sees six"""
CONTEXT_TOKENS = 32_768


def provider(base_url: str, *, token: str, max_tokens: int, timeout_s: int) -> dict[str, Any]:
    """The edge as a model provider. The affinity headers name the conversation, so that the edge need not guess it."""
    model = {
        "id": MODEL,
        "name": "clawloop",
        "reasoning": False,
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": CONTEXT_TOKENS,
        "maxTokens": max_tokens,
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
        "baseUrl": base_url,
        "apiKey": token,
        "api": "openai-completions",
        "timeoutSeconds": timeout_s,
        "models": [model],
    }


def openclaw_config(
    base_url: str, *, token: str, folder: Path, temperature: float, max_tokens: int = 128, timeout_s: int = 600
) -> dict[str, Any]:
    """The whole file: one provider, the small set of tools, no background requests, everything under `folder`.

    `max_tokens` bounds one answer; `timeout_s` bounds one call, reading the prompt included.
    """
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
    return {
        "update": {"checkOnStart": False},
        "models": {
            "mode": "replace",
            "catalogRefresh": {"enabled": False},
            "providers": {PROVIDER: provider(base_url, token=token, max_tokens=max_tokens, timeout_s=timeout_s)},
        },
        "agents": {"defaults": agent},
        "tools": {"allow": list(TOOLS), "toolSearch": False},
        "logging": {"consoleLevel": "error", "file": str(folder / "openclaw.log")},
        "gateway": {"mode": "local", "bind": "loopback"},
    }


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write it for its owner alone; it holds the edge's token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))

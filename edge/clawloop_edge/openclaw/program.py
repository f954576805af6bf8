"""The `openclaw` command, asked what it thinks of a configuration. Observed on OpenClaw 2026.9.6."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from clawloop_edge.openclaw.entries import NAME
from clawloop_shared.errors import ConfigError, UncheckedError

COMMAND = "openclaw"
CONFIG_VARIABLE = "OPENCLAW_CONFIG_PATH"
TIMEOUT_S = 120.0
_MOST_ISSUES = 5


def found() -> str:
    """Where the command is; empty if it is not on PATH."""
    return shutil.which(COMMAND) or ""


def validate(config: Path) -> None:
    """Return if OpenClaw takes the configuration.

    Raises:
        ConfigError: it does not; says why in OpenClaw's words.
        UncheckedError: it gave no answer.
    """
    answer = _asked(config, "config", "validate", "--json")
    if answer.get("valid") is True:
        return
    issues = [f"{each.get('path')}: {each.get('message')}" for each in answer.get("issues", [])][:_MOST_ISSUES]
    raise ConfigError(f"OpenClaw does not take the configuration: {'; '.join(issues) or 'it does not say why'}")


def plugin_state(config: Path) -> str:
    """What OpenClaw says of our plugin: `loaded` if it can be loaded and its commands are there.

    Raises:
        UncheckedError: it gave no answer.
    """
    answer = _asked(config, "plugins", "inspect", NAME, "--runtime", "--json")
    plugin = answer.get("plugin") or {}
    status = str(plugin.get("status", "not found"))
    return status if status != "loaded" or plugin.get("commands") else "loaded, but without its commands"


def _asked(config: Path, *arguments: str) -> dict[str, Any]:
    command = [found() or COMMAND, *arguments]
    environment = {**os.environ, CONFIG_VARIABLE: str(config)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False
        )
        return msgspec.json.decode(done.stdout, type=dict[str, Any])
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        said = type(error).__name__
        raise UncheckedError(f"`{COMMAND} {' '.join(arguments)}` gave no answer ({said}); run it by hand") from error

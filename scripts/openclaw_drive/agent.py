"""The real OpenClaw, one turn at a time, with a HOME of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openclaw_drive.config import openclaw_config, write_config
from openclaw_drive.transcript import find_session

TURN_TIMEOUT_S = 1200
TEMPERATURE = 0.7
QUIET = {
    "OPENCLAW_DISABLE_BONJOUR": "1",
    "OPENCLAW_SKIP_CHANNELS": "1",
    "OPENCLAW_NO_RESPAWN": "1",
    "OPENCLAW_EXEC_SHELL_SNAPSHOT": "0",
}


class DriveError(Exception):
    """OpenClaw or the edge did not do what the drive needs; the text names the log."""


@dataclass(frozen=True)
class Turn:
    """One user turn: what was asked in which conversation, OpenClaw's reply, and which tools it ran.

    A turn that OpenClaw gave up, because the model said nothing, say, has failed and has no reply.
    """

    session_key: str
    message: str
    reply: str
    session_id: str
    tools: tuple[str, ...]
    seconds: float
    failed: bool = False


class OpenClaw:
    """An installed OpenClaw whose HOME is `folder`/home."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.home = folder / "home"
        self.errors = folder / "openclaw.err"
        self._command = installed / "app/node_modules/.bin/openclaw"
        self._installed, self._folder = installed, folder

    @property
    def database(self) -> Path:
        """Where OpenClaw keeps its own transcripts."""
        return self.home / ".openclaw/agents/main/agent/openclaw-agent.sqlite"

    def point_at(self, base_url: str, *, token: str) -> None:
        """Write the configuration that makes the edge its model provider."""
        config = openclaw_config(base_url, token=token, folder=self._folder, temperature=TEMPERATURE)
        write_config(self.home / ".openclaw/openclaw.json", config)

    def turn(self, session_key: str, message: str) -> Turn:
        """One turn of the conversation that `session_key` names, its tool loop included.

        Raises:
            DriveError: OpenClaw did not even begin the conversation, or printed no result.
        """
        command = [str(self._command), "agent", "--local", "--session-key", f"agent:main:{session_key}"]
        started = time.monotonic()
        code, output = self._run([*command, "--message", message, "--json", "--timeout", str(TURN_TIMEOUT_S)])
        seconds = time.monotonic() - started
        if code:
            session_id = find_session(self.database, f"agent:main:{session_key}") if self.database.exists() else ""
            if not session_id:
                raise DriveError(f"openclaw agent ended with {code}; see {self.errors}")
            return Turn(session_key, message, "", session_id, (), seconds, failed=True)
        return read_turn(output, session_key, message=message, seconds=seconds)

    def _run(self, command: list[str]) -> tuple[int, bytes]:
        """Exit code and output. OpenClaw works in a child of its launcher, so the whole group ends with this call."""
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                command,
                env=self._environment(os.environ),
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                start_new_session=True,
            )
        with process:
            try:
                output, _ = process.communicate(timeout=TURN_TIMEOUT_S + 60)
            finally:
                with contextlib.suppress(ProcessLookupError):  # the usual case: nobody of the group is left
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The user's environment without what names their own OpenClaw."""
        kept = {k: v for k, v in base.items() if not k.startswith("OPENCLAW_")}
        own = {
            "HOME": str(self.home),
            "TMPDIR": str(self._folder),
            "NODE_COMPILE_CACHE": str(self._installed / "compile-cache"),
            "PATH": f"{self._installed / 'bin'}:{base.get('PATH', os.defpath)}",
        }
        return {**kept, **QUIET, **own}


def read_turn(output: bytes, session_key: str, *, message: str, seconds: float) -> Turn:
    """What `openclaw agent --json` printed.

    Raises:
        DriveError: it is not that JSON.
    """
    try:
        found: dict[str, Any] = json.loads(output)
        meta = found["meta"]
        return Turn(
            session_key=session_key,
            message=message,
            reply="\n".join(p["text"] for p in found["payloads"] if p.get("text")),
            session_id=meta["agentMeta"]["sessionId"],
            tools=tuple(meta.get("toolSummary", {}).get("tools", ())),
            seconds=seconds,
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DriveError(f"openclaw agent --json printed something else ({error!r})") from error

"""The real OpenClaw, turn by turn, with a HOME of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from demoworld.stage import BIN, Part
from openclaw_drive.config import Api, Gateway, openclaw_config, write_config
from openclaw_drive.transcript import Transcript, TranscriptError, find_session, read_transcript

TURN_TIMEOUT_S = 1200
CONNECT_TIMEOUT_S = 180
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


class Order(NamedTuple):
    """What is to be asked in which conversation."""

    session_key: str
    message: str


class OpenClaw:
    """An installed OpenClaw whose HOME is `folder`/home."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.home, self.folder = folder / "home", folder
        self.errors = folder / "openclaw.err"
        self._command = installed / "app/node_modules/.bin/openclaw"
        self._installed = installed

    @property
    def _database(self) -> Path:
        """Where OpenClaw keeps its own transcripts."""
        return self.home / ".openclaw/agents/main/agent/openclaw-agent.sqlite"

    def point_at(self, edge: Part, api: Api, *, gateway: Gateway | None = None) -> None:
        """Write its configuration, and have the edge connect itself as the model of all agents.

        Raises:
            DriveError: `clawloop-edge openclaw connect` failed.
        """
        config = self.home / ".openclaw/openclaw.json"
        write_config(config, openclaw_config(folder=self.folder, temperature=TEMPERATURE, gateway=gateway))
        command = [str(BIN / edge.command), "--home", str(edge.home), "openclaw", "connect"]
        done = subprocess.run(
            [*command, "--config", str(config), "--api", api, "--primary", "--yes", "--json"],
            env=self._environment(os.environ),
            capture_output=True,
            text=True,
            timeout=CONNECT_TIMEOUT_S,
        )
        if done.returncode or not json.loads(done.stdout)["validated"]:
            raise DriveError(f"{edge.command} openclaw connect ended with {done.returncode}: {done.stderr.strip()}")

    def turn(self, order: Order) -> Turn:
        """One turn, its tool loop included, in a process of its own. No daemon may run.

        Raises:
            DriveError: OpenClaw did not even begin the conversation, or printed no result.
        """
        return self._turns([order], "--local")[0]

    def turns_at_once(self, orders: Sequence[Order]) -> list[Turn]:
        """One turn of each of several conversations at the same time, through the daemon.

        Raises:
            DriveError: OpenClaw did not even begin one of the conversations, or printed no result.
        """
        return self._turns(orders)

    def run(self, *arguments: str, timeout_s: float) -> tuple[int, bytes]:
        """Exit code and output of one command."""
        with self.started(*arguments) as process:
            output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    @contextmanager
    def started(self, *arguments: str, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """A running command, its output to `log` or to be read, and its errors to that file or to `errors`.

        OpenClaw works in children of its launcher, so the whole group ends with the block.
        """
        with (log or self.errors).open("ab") as errors:
            process = subprocess.Popen(
                [str(self._command), *arguments],
                env=self._environment(os.environ),
                stdout=errors if log else subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
            )
        with process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):  # the usual case: nobody of the group is left
                    os.killpg(process.pid, signal.SIGKILL)

    def transcript(self, session_id: str) -> Transcript:
        """What OpenClaw itself keeps of a conversation.

        Raises:
            DriveError: it cannot be read.
        """
        try:
            return read_transcript(self._database, session_id)
        except TranscriptError as error:
            raise DriveError(str(error)) from error

    def _turns(self, orders: Sequence[Order], *options: str) -> list[Turn]:
        began = time.monotonic()
        turns = []
        with ExitStack() as running:
            processes = [running.enter_context(self._asking(order, *options)) for order in orders]
            for order, process in zip(orders, processes, strict=True):
                output, _ = process.communicate(timeout=TURN_TIMEOUT_S + 60)
                turns.append(self._read(order, process.returncode, output=output, seconds=time.monotonic() - began))
        return turns

    def _asking(self, order: Order, *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        asked = ("--session-key", f"agent:main:{order.session_key}", "--message", order.message)
        return self.started("agent", *options, *asked, "--json", "--timeout", str(TURN_TIMEOUT_S))

    def _read(self, order: Order, code: int, *, output: bytes, seconds: float) -> Turn:
        if not code:
            return read_turn(output, order, seconds=seconds)
        key = f"agent:main:{order.session_key}"
        session_id = find_session(self._database, key) if self._database.exists() else ""
        if not session_id:
            raise DriveError(f"openclaw agent ended with {code}; see {self.errors}")
        return Turn(*order, "", session_id, (), seconds, failed=True)

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The user's environment without what names their own OpenClaw."""
        kept = {k: v for k, v in base.items() if not k.startswith("OPENCLAW_")}
        own = {
            "HOME": str(self.home),
            "TMPDIR": str(self.folder),
            "NODE_COMPILE_CACHE": str(self._installed / "compile-cache"),
            "PATH": f"{self._installed / 'bin'}:{self._command.parent}:{base.get('PATH', os.defpath)}",
        }
        return {**kept, **QUIET, **own}


def read_turn(output: bytes, order: Order, *, seconds: float) -> Turn:
    """What `openclaw agent --json` printed, `--local` or through the daemon.

    Raises:
        DriveError: it is not that JSON.
    """
    try:
        printed: dict[str, Any] = json.loads(output)
        found = printed.get("result", printed)
        meta = found["meta"]
        return Turn(
            *order,
            reply="\n".join(p["text"] for p in found["payloads"] if p.get("text")),
            session_id=meta["agentMeta"]["sessionId"],
            tools=tuple(meta.get("toolSummary", {}).get("tools", ())),
            seconds=seconds,
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DriveError(f"openclaw agent --json printed something else ({error!r})") from error

"""OpenClaw's own gateway, its daemon: through it the conversations of one machine run at the same time.

Asked over its RPC as the dashboard does, too: a first message there makes OpenClaw ask the model for a title, a system
event makes it wake the model, and a long conversation is summarised. Observed on OpenClaw 2026.9.6.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from demoworld.stage import Part, free_ports
from openclaw_drive.agent import DriveError, OpenClaw, Order, Turn
from openclaw_drive.config import Api, Gateway

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 60.0
WAKE_TIMEOUT_S = 120.0
"""seen to take 4 to 47 s"""
REACTION = "👍"
EVENT = f"Telegram reaction added: {REACTION} by Alice (@alice) on msg 42"
"""a system event as OpenClaw's Telegram channel words it"""


class Daemon:
    """A running daemon of `agent`'s."""

    def __init__(self, agent: OpenClaw) -> None:
        self._agent = agent

    def chat(self, order: Order) -> Turn:
        """One turn as the dashboard asks it; the conversation is made if it is not there.

        Raises:
            DriveError: the daemon refused, or there was no answer in time.
        """
        began = time.monotonic()
        key, run_id = f"agent:main:{order.session_key}", str(uuid.uuid4())
        self.call("chat.send", {"sessionKey": key, "message": order.message, "idempotencyKey": run_id})
        timeout_ms = int(ANSWER_TIMEOUT_S * 1000)
        ended = self.call("agent.wait", {"runId": run_id, "timeoutMs": timeout_ms}, timeout_s=ANSWER_TIMEOUT_S + 10)
        seconds, receipt = time.monotonic() - began, ended.get("terminalReceipt", {})
        if ended.get("status") == "timeout" or not receipt.get("sessionId"):
            raise DriveError(f"no answer in {order.session_key} after {seconds:.0f} s; see {self._agent.errors}")
        reply = ended.get("terminalReply", {}).get("text", "")
        tools = tuple(receipt.get("successfulToolNames", ()))
        return Turn(*order, reply, receipt["sessionId"], tools, seconds, failed=ended["status"] != "ok")

    def command(self, turn: Turn, text: str) -> str:
        """What OpenClaw answers to a slash command in the conversation of `turn`, without the model.

        Raises:
            DriveError: the daemon refused, or said nothing.
        """
        key = str(uuid.uuid4())
        session = f"agent:main:{turn.session_key}"
        self.call("chat.send", {"sessionKey": session, "message": text, "idempotencyKey": key})
        self.call("agent.wait", {"runId": key, "timeoutMs": int(COMMAND_TIMEOUT_S * 1000)}, timeout_s=ANSWER_TIMEOUT_S)
        reply = self._agent.transcript(turn.session_id).own_words.get(key)
        if reply is None:
            raise DriveError(f"OpenClaw said nothing to {text!r} in {turn.session_key}; see {self._agent.errors}")
        return reply

    def compact(self, session_key: str) -> bool:
        """Have OpenClaw put a summary, which it asks the model for, in the place of a conversation; whether it did."""
        found = self.call("sessions.compact", {"key": f"agent:main:{session_key}"}, timeout_s=ANSWER_TIMEOUT_S)
        return bool(found.get("compacted"))

    def wake(self, turn: Turn) -> None:
        """Give OpenClaw a system event in the conversation of `turn`, and wait until the model has answered to it.

        Raises:
            DriveError: it did not in time.
        """
        key = f"agent:main:{turn.session_key}"
        self._run("system", "event", "--session-key", key, "--text", EVENT, "--mode", "now", "--json")
        deadline = time.monotonic() + WAKE_TIMEOUT_S
        while not any(said.heartbeat for said in self._agent.transcript(turn.session_id).said):
            if time.monotonic() > deadline:
                raise DriveError(f"no heartbeat in {turn.session_key} within {WAKE_TIMEOUT_S:.0f} s of a system event")
            time.sleep(0.5)

    def call(self, method: str, params: dict[str, Any], *, timeout_s: float = 30.0) -> dict[str, Any]:
        """The daemon's answer to an RPC.

        Raises:
            DriveError: it refused.
        """
        timeout = ("--timeout", str(int(timeout_s * 1000)))
        return self._run("gateway", "call", method, "--params", json.dumps(params), *timeout, "--json")

    def _run(self, *arguments: str) -> dict[str, Any]:
        code, output = self._agent.run(*arguments, timeout_s=ANSWER_TIMEOUT_S + 60)
        try:
            found: dict[str, Any] = json.loads(output)
        except json.JSONDecodeError as error:
            raise DriveError(
                f"openclaw {arguments[0]} ended with {code} and no JSON; see {self._agent.errors}"
            ) from error
        if code:
            said = found.get("error", {}).get("message", "no reason")
            raise DriveError(f"openclaw {' '.join(arguments[:3])} ended with {code}: {said}")
        return found


@contextmanager
def running(agent: OpenClaw, edge: Part) -> Iterator[Daemon]:
    """The daemon with `edge` as its model provider; stopped at the end, with every process that it started.

    Raises:
        DriveError: it did not start.
    """
    (port,) = free_ports(1)
    agent.point_at(edge, Api.COMPLETIONS, gateway=Gateway(port, secrets.token_urlsafe(16)))
    log = agent.folder / "daemon.log"
    with agent.started("gateway", "run", "--port", str(port), log=log) as process:
        _wait(process, port, log=log)
        try:
            yield Daemon(agent)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], port: int, *, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DriveError(f"openclaw gateway run ended with {process.returncode}; see {log}")
        try:
            with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise DriveError(f"OpenClaw's daemon did not answer within {START_TIMEOUT_S:.0f} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group: the launcher ends after the daemon. What is left of it is killed by `OpenClaw.started`."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DriveError(f"OpenClaw's daemon did not end within {STOP_TIMEOUT_S:.0f} s and was killed") from error

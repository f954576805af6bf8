"""Starts what is measured, each as a process of its own, and stops it again: upstream, relay, our edge, LiteLLM.

Where there are two cores, upstream and client have the first one and what is measured has the second.
"""

import asyncio
import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from demoworld.stage import Part, StageError, free_ports
from gateway_bench.upstream import MODEL

ROOT = Path(__file__).resolve().parents[2]
LITELLM = ROOT / ".litellm"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
SETTLE_TIMEOUT_S = 60.0
_KEPT = re.compile(rb"^clawloop_steps_kept_total (\S+)$", re.M)


@dataclass
class Contender:
    """One server under load. `pid` is 0 for the upstream itself; `answered` counts its good answers."""

    name: str
    port: int
    token: str = "none"
    pid: int = 0
    start_s: float = 0.0
    answered: int = 0

    async def settle(self) -> None:
        """Wait until nothing is left to do for what was answered."""


@dataclass
class EdgeContender(Contender):
    """Ours: a call is over once its step is on the disk."""

    async def settle(self) -> None:
        """Wait until all that was answered is kept.

        Raises:
            StageError: it is not, after `SETTLE_TIMEOUT_S`.
        """
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while (kept := await asyncio.to_thread(self._kept)) < self.answered:
            if time.monotonic() > deadline:
                raise StageError(f"the edge answered {self.answered} calls and kept {kept}")
            await asyncio.sleep(0.02)

    def _kept(self) -> int:
        found = _KEPT.search(fetch(self.port, "/metrics", token=self.token))
        if found is None:
            raise StageError("the edge's /metrics does not say how many steps were kept")
        return int(float(found[1]))


def fetch(port: int, path: str, *, token: str) -> bytes:
    """GET on loopback; HTTP errors count as an answer. Raises OSError if nothing answers."""
    request = Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        with urlopen(request, timeout=10) as reply:
            return bytes(reply.read())
    except HTTPError as error:
        return error.read()


@contextlib.contextmanager
def cores(*wanted: int) -> Iterator[None]:
    """What is started in here runs on these cores alone, where the system can do that and has them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(wanted) if set(wanted) <= before else before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM; SIGKILL if that does not end it."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running(
    command: list[str], contender: Contender, *, log: Path, more: dict[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block is left; it answers when the block begins. Notes its pid and how long it took.

    Raises:
        StageError: it ended, or did not answer within `START_TIMEOUT_S`.
    """
    began = time.monotonic()
    with log.open("wb") as output:
        environment = {**os.environ, **(more or {})}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT / "scripts")
    try:
        while True:
            with contextlib.suppress(OSError):
                fetch(contender.port, "/v1/models", token=contender.token)
                break
            if process.poll() is not None or time.monotonic() - began > START_TIMEOUT_S:
                raise StageError(f"{contender.name} does not answer; see {log}")
            time.sleep(0.05)
        contender.pid, contender.start_s = process.pid, time.monotonic() - began
        yield
    finally:
        stop(process)


@contextlib.contextmanager
def upstream(folder: Path) -> Iterator[Contender]:
    """The fixed upstream."""
    (port,) = free_ports(1)
    direct = Contender("direct", port)
    command = [sys.executable, "-m", "gateway_bench.upstream", "--port", str(port)]
    with running(command, direct, log=folder / "upstream.log"):
        direct.pid = 0  # its cost is not the question
        yield direct


@contextlib.contextmanager
def relay(folder: Path, direct: Contender) -> Iterator[Contender]:
    """The honest minimum."""
    (port,) = free_ports(1)
    contender = Contender("relay", port)
    address = f"http://127.0.0.1:{direct.port}"
    command = [sys.executable, "-m", "gateway_bench.relay", "--port", str(port), "--upstream", address]
    with running(command, contender, log=folder / "relay.log"):
        yield contender


@contextlib.contextmanager
def edge(
    folder: Path, direct: Contender, *, name: str = "clawloop", scored: bool = True
) -> Iterator[tuple[Contender, Part]]:
    """Our edge, set up as a user would: a home of its own, its token, its encrypted pool; with the scorers that run by
    default, which look at the upstream server's untrainable steps as they would at others, or (not `scored`) none."""
    (port,) = free_ports(1)
    part = Part(name, "clawloop-edge", folder / name, port, "CLAWLOOP_EDGE_HOME")
    server = f"http://127.0.0.1:{direct.port}/v1"
    part.run("setup", "--upstream", server, "--upstream-model", MODEL, "--port", str(port), "--key-file", "--yes")
    part.configure({"signals": {"untrainable": True} if scored else {"scorers": []}})
    began = time.monotonic()
    part.start()
    try:
        assert part.process is not None
        start_s = time.monotonic() - began
        yield EdgeContender(part.name, part.port, part.token(), part.process.pid, start_s), part
    finally:
        part.stop()


def install_litellm() -> str:
    """LiteLLM in its own venv beside .venv; its version.

    Raises:
        StageError: it cannot be installed here.
    """
    pip = (str(LITELLM / "bin/python"), "-m", "pip", "--disable-pip-version-check")
    commands = [[sys.executable, "-m", "venv", str(LITELLM)], [*pip, "install", "--quiet", "litellm[proxy]"]]
    for command in commands if not (LITELLM / "bin/litellm").exists() else []:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StageError(f"cannot install LiteLLM: {done.stderr.strip().splitlines()[-1]}")
    shown = subprocess.run([*pip, "show", "litellm"], capture_output=True, text=True, check=True).stdout
    return next(line.partition(": ")[2] for line in shown.splitlines() if line.startswith("Version"))


@contextlib.contextmanager
def litellm(folder: Path, direct: Contender) -> Iterator[Contender]:
    """LiteLLM's proxy with one worker and no spend logs."""
    (port,) = free_ports(1)
    contender = Contender("LiteLLM", port, f"sk-{secrets.token_hex(24)}")
    config = folder / "litellm.yaml"
    config.write_text(
        f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n      model: openai/{MODEL}\n"
        f"      api_base: http://127.0.0.1:{direct.port}/v1\n      api_key: none\n"
        "litellm_settings:\n  telemetry: false\n  callbacks: []\ngeneral_settings:\n  disable_spend_logs: true\n"
    )
    command = [str(LITELLM / "bin/litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    more = {
        "LITELLM_MASTER_KEY": contender.token,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }
    with running([*command, "--num_workers", "1"], contender, log=folder / "litellm.log", more=more):
        yield contender

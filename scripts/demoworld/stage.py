"""The stage of the demo: the real server and the real edges as processes of their own, driven by their command lines.

Everything lies in one folder, every port is on loopback, and everything that was started is stopped again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import tomli_w

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
PORTS = range(15_000, 24_000)
"""of which `free_ports` gives; processes that make stages at the same time set a part of it each"""


class StageError(Exception):
    """A part did not do what the demo needs; the text names its log."""


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now, none of them twice, and that no outgoing connection can get
    meanwhile: they are below those that Linux and macOS give to such."""
    ports: list[int] = []
    while len(ports) < count:
        port = next(_untried())
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):  # taken: the next one
            ports.append(port)
    return ports


@cache
def _untried() -> Iterator[int]:
    return iter(random.sample(PORTS, len(PORTS)))


@dataclass
class Part:
    """One side: its home, its command, its process."""

    name: str
    command: str
    home: Path
    port: int
    variable: str
    token_name: str = "token"
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.home.with_suffix(".log")

    def run(self, *arguments: str, expect_json: bool = False) -> Any:
        """Run a command of this side to its end; its output (parsed with `expect_json`).

        Raises:
            StageError: it failed; the text is what it printed.
        """
        done = subprocess.run(
            [str(BIN / self.command), *arguments], env=self._environment(), capture_output=True, text=True, timeout=180
        )
        if done.returncode:
            raise StageError(f"{self.command} {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
        return json.loads(done.stdout) if expect_json else done.stdout

    def start(self) -> None:
        """Start `serve` in the background and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / self.command), "serve"],
                env=self._environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise StageError(f"{self.name} ended with {self.process.returncode}; see {self.log}")
            try:
                self.get("/healthz")
                return
            except OSError:
                time.sleep(0.1)
        raise StageError(f"{self.name} did not answer within {START_TIMEOUT_S:.0f} s; see {self.log}")

    def token(self) -> str:
        """The token of this side's loopback API."""
        return (self.home / self.token_name).read_text().strip()

    def get(self, path: str) -> Any:
        """A JSON answer of this side's loopback API. Raises OSError if it does not answer."""
        request = Request(f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {self._token()}"})
        with urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def _token(self) -> str:
        return self.token() if (self.home / self.token_name).is_file() else ""

    def configure(self, changes: Mapping[str, Mapping[str, object]]) -> None:
        """Change keys of config.toml, as its owner would in an editor."""
        path = self.home / "config.toml"
        settings = tomllib.loads(path.read_text()) if path.is_file() else {}
        for section, keys in changes.items():
            settings.setdefault(section, {}).update(keys)
        path.write_text(tomli_w.dumps(settings))

    def kill(self) -> None:
        """kill -9, as a crash or a pulled plug would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """SIGTERM, then wait; SIGKILL to the whole group if it does not end."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", self.variable: str(self.home)}


def make_server(folder: Path, model: Path, *, settings: Mapping[str, Mapping[str, object]]) -> Part:
    """`clawloop-server init` in `folder`, with `settings` changed afterwards."""
    public, admin = free_ports(2)
    server = Part("server", "clawloop-server", folder / "server", admin, "CLAWLOOP_SERVER_HOME", "admin.token")
    server.run("init", "--base", str(model), "--port", str(public), "--admin-port", str(admin), "--yes")
    server.configure(settings)
    return server


def make_edge(folder: Path, model: Path, *, name: str, settings: Mapping[str, Mapping[str, object]]) -> Part:
    """`clawloop-edge setup` in `folder`, with `settings` changed afterwards."""
    (port,) = free_ports(1)
    edge = Part(name, "clawloop-edge", folder / name, port, "CLAWLOOP_EDGE_HOME")
    edge.run("setup", "--model", str(model), "--port", str(port), "--key-file", "--yes")
    edge.configure(settings)
    return edge

"""Flower on the server: SuperLink and superexec as supervised children on loopback, and the bridge's run.

    SuperLink (TLS, node keys) ◄── superexec ──starts──► flwr-serverapp = the bridge ◄──► hub (channel)

The three heal by themselves: the children are restarted, and the run is submitted again whenever the bridge's line
to the hub ends. Nothing is installed or fetched at run time.

The SuperLink keeps its state in memory. What is worth keeping is in the hub's database, so a new SuperLink is told the
members' keys again; and what devices send, which the vault encrypts, is never written in clear by Flower. Measured:
its SQLite mode costs 3.5 times the CPU an exchange, and answers 500 when two writers meet.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from clawloop_server.errors import FleetError
from clawloop_server.fleet.channel import VARIABLE, Channel, FleetPort
from clawloop_server.fleet.children import ChildSpec, ChildStatus, Supervisor
from clawloop_server.fleet.control import Control
from clawloop_server.fleet.tls import TlsFiles, client_context
from clawloop_server.home import Home
from clawloop_shared.errors import ClawloopError
from clawloop_shared.files import private_folder, publish_secret

_log = logging.getLogger(__name__)

_APP = Path(__file__).parent / "fab"
_PORTS = range(24_000, 32_000)
"""for the SuperLink; below those that Linux and macOS give to outgoing connections and to listeners that name none"""
_READY_S = 120.0
_LOOK_S = 0.1
_BRIDGE_START_S = 180.0
_BRIDGE_LOOK_S = 2.0
_BRIDGE_STEADY_S = 20.0
_BRIDGE_SILENT_S = 120.0
_BRIDGE_BACK_OFF_S = (0.1, 5.0)
_POLL = "0.5"
_PATIENT_S = 15.0
"""for so long a superexec looks for its SuperLink often enough"""
_GRACE_S = 1.5
"""they hold nothing, and superexec alone takes three seconds to say goodbye"""


class Members(Protocol):
    """The devices that may sync, as the SuperLink must know them."""

    def node_keys(self) -> Mapping[str, str]:
        """Node key (PEM) by device id."""
        ...

    def set_node(self, device_id: str, node_id: int) -> None:
        """Note the number that Flower gave a device; it changes when the SuperLink starts anew."""
        ...


class FleetStatus(msgspec.Struct, frozen=True):
    """How Flower's part is."""

    open: bool
    """whether devices can connect"""
    ready: bool
    """whether the bridge is connected"""
    address: str
    run_id: int
    bridge_starts: int
    children: list[ChildStatus]


class Fleet:
    """One SuperLink with its helpers."""

    def __init__(
        self, home: Home, tls: TlsFiles, *, port: FleetPort, members: Members, superlink_port: int = 0
    ) -> None:
        self._home, self._tls, self._members = home, tls, members
        self._channel = Channel(port)
        self._number = superlink_port or free_port()
        self._control: Control | None = None
        self._supervisor = Supervisor()
        self._keeper: asyncio.Task[None] | None = None
        self._bridge_starts, self._superexec_deaths = 0, 0
        self._superexec_died_now = asyncio.Event()
        self._died_s = 0.0
        self._open = False

    @property
    def open(self) -> bool:
        """Whether the SuperLink runs and knows its members. While it is not, devices must be told to come later:
        it would refuse them as strangers."""
        return self._open

    @property
    def address(self) -> str:
        """Where the SuperLink listens: loopback only."""
        return f"127.0.0.1:{self._number}"

    @property
    def control(self) -> Control:
        """The SuperLink's Control API.

        Raises:
            FleetError: the fleet is not running.
        """
        if self._control is None:
            raise FleetError("the fleet is not running; start the server first")
        return self._control

    @property
    def status(self) -> FleetStatus:
        """How things are now."""
        channel = self._channel
        return FleetStatus(
            self._open, channel.connected, self.address, channel.run_id, self._bridge_starts, self._supervisor.status
        )

    async def start(self) -> None:
        """Start everything and let the members in; the bridge comes up soon after (`wait_ready`).

        Raises:
            FleetError: the SuperLink does not come up.
        """
        folder = private_folder(self._home.flower)
        file, secret = folder / "bridge.json", folder / "superexec.secret"
        if not secret.exists():
            publish_secret(secret, secrets.token_bytes(32))
        await self._channel.start(file, log=self._home.logs / "bridge.log")
        try:
            self._control = Control(self.address, client_context(self._tls))
            await self._supervisor.add(self._superlink(secret), on_exit=self._superlink_died)
            await self._until_open()
            await self._supervisor.add(self._superexec(secret, file), on_exit=self._superexec_died)
        except BaseException:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep_bridge(), name="keep bridge")

    async def stop(self) -> None:
        """Stop everything that was started."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        self._open = False
        await self._channel.stop()
        if self._control is not None:  # first, since the SuperLink waits for its open connections
            await self._control.close()
            self._control = None
        await self._supervisor.stop()

    async def wait_ready(self, timeout_s: float = _READY_S) -> None:
        """Return when the bridge is connected.

        Raises:
            FleetError: it is not within `timeout_s`.
        """
        if not await self._channel.wait_connected(timeout_s):
            raise FleetError(f"the bridge did not come up in {timeout_s:.0f} s; see {self._home.logs}")

    async def admit(self, device_id: str, key_pem: str) -> int:
        """Let a device's node key in, and no other of its keys; its node id, until the SuperLink starts anew."""
        return await self.control.register(key_pem, device_id)

    async def expel(self, device_id: str) -> None:
        """Let a device's node key in no more."""
        for node in await self.control.nodes():
            if node.name == device_id:
                await self.control.unregister(node.node_id)

    async def _until_open(self) -> None:
        """Wait for the SuperLink, and make its keys those of the members."""
        deadline = time.monotonic() + _READY_S
        while not await self.control.ready():
            if time.monotonic() > deadline:
                raise FleetError(f"the SuperLink did not come up; see {self._home.logs / 'superlink.log'}")
            await asyncio.sleep(_LOOK_S)
        members = await asyncio.to_thread(self._members.node_keys)
        known = {node.key_pem: node for node in await self.control.nodes()}
        for device_id, key_pem in members.items():
            node = known.get(key_pem)
            node_id = node.node_id if node else await self.control.add_key(key_pem, device_id)
            await asyncio.to_thread(self._members.set_node, device_id, node_id)
        self._open = True

    def _superlink_died(self) -> None:
        """The superexec is started anew beside it: both take seconds, and the old one would look seldom by then."""
        self._open, self._died_s = False, time.monotonic()
        self._channel.drop()
        self._supervisor.restart("superexec")

    def _superexec_died(self) -> None:
        """With it die the programs that it was starting. Flower waits half a minute for such a task; we do not."""
        self._superexec_deaths += 1
        self._superexec_died_now.set()

    # the bridge's run

    async def _keep_bridge(self) -> None:
        wait_s = _BRIDGE_BACK_OFF_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._run_bridge()
            except ClawloopError as error:
                _log.warning("the bridge does not run: %s", error)
            except Exception:  # noqa: BLE001  it must come back whatever it was; the back-off bounds the noise
                _log.exception("the bridge does not run")
            wait_s = _BRIDGE_BACK_OFF_S[0] if time.monotonic() - began > _BRIDGE_STEADY_S else wait_s
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _BRIDGE_BACK_OFF_S[1])

    async def _run_bridge(self) -> None:
        if not self._open:
            await self._until_open()
            if time.monotonic() - self._died_s > _PATIENT_S:
                await self._restart_superexec()  # by now it may wait up to 20 s before it looks again
        await self.control.stop_runs()
        self._bridge_starts, deaths = self._bridge_starts + 1, self._superexec_deaths
        run_id = await self.control.start_run(_APP)
        if not await self._bridge_calls(run_id, deaths=deaths):
            return
        _log.info("the bridge (run %d) is connected", run_id)
        while not await self._channel.wait_lost(5.0):
            if self._channel.silent_s > _BRIDGE_SILENT_S:
                _log.warning("the bridge said nothing for %.0f s; hanging up", _BRIDGE_SILENT_S)
                self._channel.drop()
        _log.warning("the bridge (run %d) is gone; starting it again", run_id)

    async def _restart_superexec(self) -> None:
        self._superexec_died_now.clear()
        self._supervisor.restart("superexec")
        with contextlib.suppress(TimeoutError):  # it was down already
            async with asyncio.timeout(_GRACE_S):
                await self._superexec_died_now.wait()

    async def _bridge_calls(self, run_id: int, *, deaths: int) -> bool:
        """Whether the bridge of a run comes up. On a busy machine that may take long: starting another would not help,
        so it is given up only when its run has ended, when the superexec that was starting it has died, or after
        minutes."""
        deadline = time.monotonic() + _BRIDGE_START_S
        while not await self._channel.wait_connected(_BRIDGE_LOOK_S):
            died = self._superexec_deaths > deaths
            if died or await self.control.has_ended(run_id) or time.monotonic() > deadline:
                _log.warning("the bridge (run %d) did not come up; starting it again", run_id)
                return False
        return True

    # the children

    def _superlink(self, secret: Path) -> ChildSpec:
        return self._child(
            "superlink",
            [
                "flower-superlink",
                *("--host", "127.0.0.1", "--port", str(self._number)),
                *("--ssl-certfile", str(self._tls.certificate), "--ssl-keyfile", str(self._tls.key)),
                *("--ssl-ca-certfile", str(self._tls.ca), "--enable-supernode-auth"),
                *("--isolation", "process"),
                *("--superexec-auth-secret-file", str(secret), "--disable-runtime-dependency-installation"),
            ],
        )

    def _superexec(self, secret: Path, file: Path) -> ChildSpec:
        return self._child(
            "superexec",
            [
                "flower-superexec",
                *("--runtime-api-address", self.address, "--root-certificates", str(self._tls.ca)),
                *("--superexec-auth-secret-file", str(secret)),
            ],
            {VARIABLE: str(file), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL},
        )

    def _child(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> ChildSpec:
        bin_folder = Path(sys.executable).parent
        environment = {
            "FLWR_HOME": str(self._home.flower),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOG_LEVEL": "WARNING",
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **(more or {}),
        }
        program = [_program(command[0], bin_folder), *command[1:]]
        return ChildSpec(name, program, self._home.logs / f"{name}.log", environment, self._home.flower, _GRACE_S)


def free_port() -> int:
    """A loopback port that nobody listens on now, nor gets from the system until the SuperLink is up."""
    while True:
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _program(name: str, bin_folder: Path) -> str:
    found = shutil.which(name, path=str(bin_folder)) or shutil.which(name)
    if not found:
        raise FleetError(f"{name} is not installed; run: pip install 'clawloop[server]'")
    return found

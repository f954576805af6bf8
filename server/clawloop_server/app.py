"""The server in one process with its children: what `clawloop-server serve` runs.

    hub (this process) ── front (TLS), admin API, dispatcher, release loop
      ├── SuperLink, superexec ── the bridge      (fleet/superlink.py)
      └── trainer                                 (trainer/process.py)

It only wires and supervises: whatever dies is started again, and a stop leaves no process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

import msgspec

from clawloop_server.aggregate.secure_store import SecureSums
from clawloop_server.bases import Base, find_base
from clawloop_server.config import ServerConfig
from clawloop_server.errors import FleetError, HomeError
from clawloop_server.fleet.children import ChildSpec, ChildStatus, Supervisor
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_server.fleet.quota import QuotaSettings
from clawloop_server.fleet.superlink import Fleet
from clawloop_server.fleet.tasks import HubTasks
from clawloop_server.fleet.tls import TlsFiles, client_context, ensure_tls, server_context
from clawloop_server.home import Home, read_secret
from clawloop_server.hub.admin import AdminPort
from clawloop_server.hub.blobs import BlobDesk
from clawloop_server.hub.forget import ForgetDesk
from clawloop_server.hub.front import Front
from clawloop_server.hub.join import JoinDesk
from clawloop_server.hub.members import HubMembers, HubReleases
from clawloop_server.hub.membership import MemberDesk
from clawloop_server.hub.registrar import Registrar
from clawloop_server.hub.status import RUNNING_FILE, Part, Running, ServerStatus, read_status, write_running
from clawloop_server.hub.steps import Step, go_on
from clawloop_server.hub.training import TrainerEar
from clawloop_server.release.keys import ServerKeys, load_keys
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_waiting, renew_expiring
from clawloop_server.vault.parts import FOLDER as BLOBS
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import SumDeltas
from clawloop_shared.blobs import signed_address
from clawloop_shared.envelope import derive_key
from clawloop_shared.files import publish_secret
from clawloop_shared.lora import ModelShape
from clawloop_shared.manifest import SignedManifest, open_manifest
from clawloop_shared.messages import SignedAnswer
from clawloop_shared.receipts import sign_item
from clawloop_shared.signing import key_id

_log = logging.getLogger(__name__)

_LOOK_S = 0.5
"""how often the hub looks for new candidates and revoked devices"""
_SWEEP_S = 86_400.0
"""and for parts of items that never came whole"""
_ADDRESS_S = 86_400
"""for how long a device may fetch an adapter's file by the address that it was given"""
_TRAINER_WAIT_S = 300.0
"""how long at most until a trainer that keeps failing is started again"""


class ServerApp:
    """A server: started, running, stopped."""

    def __init__(self, home: Home, config: ServerConfig) -> None:
        """Open everything that must be there before a port is opened.

        Raises:
            HomeError, KeyMissing: the home or its keys cannot be used.
            ConfigError: there is no model line to train.
        """
        self.home, self.config = home, config
        self._keys: ServerKeys = load_keys(home)
        self._base: Base = find_base(home, config.hub.line)
        self._tls: TlsFiles = ensure_tls(home.keys, config.certificate_names)
        self._address_key = derive_key(self._keys.master, "addresses of files")
        self._open = AsyncExitStack()
        self._fleet: Fleet | None = None
        self._registrar: Registrar | None = None
        self._dispatcher: Dispatcher | None = None
        self._blobs: BlobDesk | None = None
        self._known: dict[str, int] = {}
        self._children = Supervisor()
        self._trainer = TrainerEar()
        self.running = Running(
            pid=os.getpid(), url=config.url(), port=config.hub.port, admin_port=config.hub.admin_port
        )

    async def start(self) -> Running:
        """Start every part; where it listens. If one does not start, none is left.

        Raises:
            FleetError: a port is taken, or Flower does not come up.
            ClawloopError: the database cannot be opened.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self.running

    async def stop(self) -> None:
        """Stop every part, in the opposite order."""
        await self._open.aclose()

    async def _start(self) -> None:
        home, config = self.home, self.config
        self._open.enter_context(sole_server(home))
        self._vault = Vault.open(home, self._keys.master, settings=config.reward, federate=config.federate)
        self._open.callback(self._vault.close)
        self._vault.obey_settings()
        self._registry = Registry(self._vault.database, home.adapters)
        self._registry.log.sign_heads(self._keys.release)
        self._members = HubMembers(self._vault.database, line_id=self._base.line_id, approve=config.hub.approve)
        self._releases = HubReleases(self._registry, self._members.devices, line_id=self._base.line_id)
        self._dispatcher = Dispatcher(
            vault=self._vault,
            releases=self._releases,
            members=self._members,
            sign=lambda received: sign_item(received, self._keys.release),
            links=self._links,
            prove=partial(self._registry.log.proof, key_id=key_id(self._keys.release_public)),
            tasks=self._tasks(sums := self._sums()),
            sums=sums,
            apart=self._releases.apart,
            settings=_dispatch_settings(config),
        )
        await self._start_fleet(self._dispatcher)
        await self._start_trainer()
        await self._start_admin()
        self.looking = asyncio.create_task(self._look(), name="look")
        self._open.push_async_callback(_cancel, self.looking)
        write_running(home, self.running)
        self._open.callback((home.folder / RUNNING_FILE).unlink, missing_ok=True)

    def _sums(self) -> SecureSums:
        database = self._vault.database
        return SecureSums(
            database,
            settings=self.config.federate,
            shape_of=self._shape_of,
            keep=SumDeltas(database, DeviceSeals(database, self._keys.master)),
        )

    def _shape_of(self, line_id: str) -> ModelShape:
        if line_id != self._base.line_id:
            raise HomeError(f"model line {line_id} is not the one that is trained here")
        return self._base.shape

    def _tasks(self, sums: SecureSums) -> HubTasks:
        return HubTasks(
            registry=self._registry,
            devices=self._members.devices,
            deltas=self._vault.deltas,
            base=self._base,
            federate=self.config.federate,
            train=self.config.train,
            took=sums.expect,
            gathering=sums.gathering,
        )

    async def _start_fleet(self, dispatcher: Dispatcher) -> None:
        fleet = Fleet(
            self.home,
            self._tls,
            port=dispatcher,
            members=self._members,
            superlink_port=self.config.fleet.superlink_port,
        )
        self._open.push_async_callback(fleet.stop)
        await fleet.start()
        self._fleet, self._registrar = fleet, Registrar(fleet, self._members)
        self._blobs = self._blob_desk(dispatcher.admit_large)
        front = self._front(fleet, self._registrar)
        self._open.push_async_callback(front.stop)
        hub = self.config.hub
        with _port_errors(f"{hub.host}:{hub.port}", "[hub] port"):
            port = await front.start(hub.host, hub.port, tls=server_context(self._tls))
        self.running = msgspec.structs.replace(self.running, port=port, url=self.config.url(port=port))

    def _front(self, fleet: Fleet, registrar: Registrar) -> Front:
        joining = JoinDesk(
            self._members,
            register=lambda _, device_id: registrar.register(device_id),
            line=self._base.line,
            release_key=self._keys.release_public,
            statement=self._statement,
            wrong_per_minute=self.config.fleet.wrong_joins_per_minute,
            wrong_per_minute_total=self.config.fleet.wrong_joins_per_minute_total,
        )
        members = MemberDesk(
            self._members.devices,
            register=registrar.register,
            release_key=self._keys.release,
            statement=self._statement,
        )
        forgetting = ForgetDesk(self._vault, device=self._members.devices.get, release_key=self._keys.release)
        return Front(
            fleet.address,
            joining=joining,
            forgetting=forgetting,
            upstream_tls=client_context(self._tls),
            is_open=lambda: fleet.open,
            nothing_for=lambda node_id: self._dispatcher is not None and self._dispatcher.nothing_for(node_id),
            stock_nodes=self.config.fleet.stock_nodes,
            members=members,
            blobs=self._blobs,
            trusted_proxies=self.config.hub.trusted_proxies,
        )

    def _blob_desk(self, admit: Callable[[str, int], float]) -> BlobDesk:
        database, seals = self._vault.database, DeviceSeals(self._vault.database, self._keys.master)

        def seal(device_id: str) -> DeviceSeal:
            with database.write():
                return seals.ensure(device_id)

        return BlobDesk(
            self.home.folder / BLOBS,
            self._vault,
            device=self._members.devices.get,
            seal=seal,
            sign=lambda received: sign_item(received, self._keys.release),
            files=self._registry.file_of,
            address_key=self._address_key,
            max_bytes=self.config.fleet.max_item_mib << 20,
            admit=admit,
        )

    def _links(self, signed: SignedManifest, device_id: str) -> dict[str, str]:
        """Addresses of the files of an adapter that is too large for a message."""
        expires_s, key = int(time.time()) + _ADDRESS_S, self._address_key
        manifest = open_manifest(signed, self._keys.release_public)
        return {
            entry.name: signed_address(entry.sha256, device_id=device_id, expires_s=expires_s, key=key)
            for entry in manifest.files
        }

    def _statement(self) -> SignedAnswer:
        return self._keys.release_statement(now_ms=time.time_ns() // 1_000_000)

    async def _start_trainer(self) -> None:
        await asyncio.to_thread(self._trainer.remember, self.home.trainer)
        command = [sys.executable, "-m", "clawloop_server.trainer.process", "--home", str(self.home.folder)]
        self._open.push_async_callback(self._children.stop)
        log = self.home.logs / "trainer.log"
        # It loads a model each time: one that fails (a setting, memory) must not keep a core busy.
        spec = ChildSpec(
            "trainer",
            command,
            log,
            longest_wait_s=_TRAINER_WAIT_S,
            steady_s=2 * _TRAINER_WAIT_S,
            on_line=self._trainer.hear,
        )
        await self._children.add(spec, on_exit=self._trainer.lost)

    async def _start_admin(self) -> None:
        admin = AdminPort(token=admin_token(self.home), status=self.status, trainer=self._trainer)
        self._open.push_async_callback(admin.stop)
        wanted = self.config.hub.admin_port
        with _port_errors(f"127.0.0.1:{wanted}", "[hub] admin_port"):
            port = await admin.start(wanted)
        self.running = msgspec.structs.replace(self.running, admin_port=port)

    async def status(self) -> ServerStatus:
        """How the server is now."""
        found = await asyncio.to_thread(read_status, self.home, self.config, vault=self._vault)
        online = len(self._dispatcher.online) if self._dispatcher else 0
        fleet = self._fleet.status if self._fleet else None
        children = [*(fleet.children if fleet else []), *self._children.status]
        return msgspec.structs.replace(
            found,
            running=True,
            url=self.running.url,
            devices=msgspec.structs.replace(found.devices, online=online),
            fleet_ready=fleet is not None and fleet.ready,
            training=self._trainer.training,
            parts=[_part(child) for child in children],
            held_back=self._dispatcher.held_back if self._dispatcher else {},
            trouble=self._dispatcher.trouble if self._dispatcher else "",
        )

    # what happens while it runs

    async def _look(self) -> None:
        """Release what passed, renew what expires, tell of it, keep Flower's list of who may sync, and tidy."""
        self._known = await asyncio.to_thread(self._releases.versions)
        scrub = self._vault.database.scrub  # a server that was killed may have deleted without emptying the log
        await go_on(
            [
                Step("releasing", lambda: asyncio.to_thread(self._release), every_s=_LOOK_S),
                Step("renewing", lambda: asyncio.to_thread(self._renew), every_s=_LOOK_S),
                Step("telling of releases", self._tell, every_s=_LOOK_S),
                Step("keeping the list of who may sync", self._settle, every_s=_LOOK_S),
                Step("emptying the database's log", lambda: asyncio.to_thread(scrub), every_s=math.inf),
                Step("sweeping parts of items", self._sweep, every_s=_SWEEP_S),
            ],
            look_s=_LOOK_S,
        )

    async def _tell(self) -> None:
        current, known = await asyncio.to_thread(self._releases.versions), self._known
        if current == known or self._dispatcher is None:
            return
        for cohort in [name for name, version in current.items() if known.get(name) != version]:
            _log.info("adapter %d is released%s", current[cohort], f" for {cohort}" if cohort else "")
        self._dispatcher.notify()
        self._known = current

    async def _settle(self) -> None:
        if self._registrar is not None:
            await self._registrar.settle()

    async def _sweep(self) -> None:
        if self._blobs is not None:
            await asyncio.to_thread(self._blobs.sweep)

    def _release(self) -> None:
        days = self.config.release.expires_days
        if self.config.release.auto:
            release_waiting(self._registry, self._keys, expires_days=days)

    def _renew(self) -> None:
        days = self.config.release.expires_days
        line_id = self._base.line_id
        for cohort in {"", *self._registry.cohorts(line_id)}:
            renew_expiring(self._registry, self._keys, line_id=line_id, cohort=cohort, expires_days=days)


async def serve(app: ServerApp, *, started: Callable[[Running], None]) -> None:
    """Run until SIGTERM or SIGINT, then stop everything. `started` is called once it listens.

    Raises:
        FleetError: a port is taken, or Flower does not come up.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    starting, stopping = asyncio.create_task(app.start()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            started(await starting)
            await asyncio.wait({app.looking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if app.looking.done():
                await app.looking
    finally:
        await _cancel(starting)
        await _cancel(stopping)
        await app.stop()


def admin_token(home: Home) -> str:
    """The token of the admin API, made when it is first needed.

    Raises:
        HomeError: the file is readable by others.
    """
    if not home.admin_token.exists():
        publish_secret(home.admin_token, secrets.token_urlsafe(32).encode() + b"\n")
    return read_secret(home.admin_token).decode().strip()


def _dispatch_settings(config: ServerConfig) -> DispatchSettings:
    fleet = config.fleet
    return DispatchSettings(
        upload_every_s=fleet.upload_every_s,
        status_every_s=fleet.status_every_s,
        exchanges_per_s=fleet.exchanges_per_s,
        max_blob_bytes=fleet.max_item_mib << 20,
        quota=QuotaSettings(items_per_hour=fleet.items_per_hour, mib_per_hour=fleet.mib_per_hour),
    )


def _part(child: ChildStatus) -> Part:
    return Part(
        name=child.name,
        pid=child.pid,
        restarts=child.restarts,
        last_exit=child.last_exit,
        wait_s=round(child.wait_s, 1),
        log=str(child.log),
    )


@contextmanager
def sole_server(home: Home) -> Iterator[None]:
    """Hold the lock that only one server of a home can have; the system frees it when the process dies.

    Raises:
        HomeError: another process has it.
    """
    with (home.folder / "serve.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise HomeError(f"another server runs on {home.folder}; stop it first") from error
        yield


@contextmanager
def _port_errors(address: str, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FleetError(f"cannot listen on {address}: {reason}; stop what uses it or change {setting}") from error


async def _cancel(task: asyncio.Task[Any]) -> None:
    if task.done():
        return
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

"""What the server tells of itself: to the admin API, and to the command line when no server runs.

Numbers and states only: no key, no name of a person, nothing that a device sent.
"""

from __future__ import annotations

import time

import msgspec

from clawloop_server.aggregate.buffer import buffer_size
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import find_base
from clawloop_server.config import ServerConfig
from clawloop_server.errors import HomeError
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.hub.training import Training, duration
from clawloop_server.release.records import AdapterState, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.vault.learners import learners
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import devices_in
from clawloop_shared.files import publish_secret
from clawloop_shared.records import Channel

RUNNING_FILE = "running.json"


class Running(msgspec.Struct, frozen=True):
    """Where a running server listens. Written by it at start, removed when it stops."""

    pid: int
    url: str
    port: int
    admin_port: int


class DeviceCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many devices there are, and how many are reachable now."""

    joined: int
    revoked: int
    online: int = 0
    waiting: int = 0
    """for the operator to approve them"""
    left: int = 0
    doubled: int = 0
    """of which two edges have the keys, as was seen within the last hour"""


class CurrentAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter that devices should use, and how many do."""

    version: int
    round_id: str
    released_ms: int
    reward: float
    reward_before: float
    in_use: int


class RoundCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many rounds came to what, and the id of the one that runs."""

    passed: int = 0
    refused: int = 0
    failed: int = 0
    running: str = ""


class DeltaCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What devices learned at home: how many deltas are in each state, and what those that wait wait for.

    They are of so many `devices`, of a secure sum all its members. Of `needed` devices they make a round without
    trajectories, or of `min_devices` once the oldest, which waits for `oldest_s`, waited for `max_wait_s`.
    """

    states: dict[str, int] = {}
    waiting: int = 0
    devices: int = 0
    needed: int = 0
    min_devices: int = 0
    oldest_s: float = 0.0
    max_wait_s: float = 0.0

    @property
    def summary(self) -> str:
        """What waits, and for what, in one line."""
        if not self.waiting:
            return "none"
        told = f"{self.waiting}, of {self.devices} of {self.needed} devices for a round"
        if self.devices >= self.needed:
            return told
        if self.devices < self.min_devices:
            return f"{told}; they wait for other devices, [federate] min_devices is {self.min_devices}"
        return f"{told}, or in {duration(max(0.0, self.max_wait_s - self.oldest_s))} without more"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One child process. `pid` is 0 while it is down; `wait_s` is then how long until it is started again."""

    name: str
    pid: int
    restarts: int
    last_exit: int | None = None
    wait_s: float = 0.0
    log: str = ""

    @property
    def summary(self) -> str:
        """How it is, in words: one that keeps failing names where to look."""
        ended = f"it ended with {self.last_exit}, see {self.log}"
        if not self.pid:
            return f"down, tried again in {self.wait_s:.0f} s: {ended}"
        return f"up (restarted {self.restarts} times; {ended})" if self.restarts else "up"


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it."""

    running: bool
    url: str
    line_id: str
    devices: DeviceCounts
    ready_trajectories: int
    round_trajectories: int
    rounds: RoundCounts
    adapter: CurrentAdapter | None
    waiting_adapters: int = 0
    """newer than the released one, and not released: candidates, and those that the gate or the operator held"""
    deltas: DeltaCounts = DeltaCounts()
    """what devices learned at home"""
    fleet_ready: bool = False
    training: Training | None = None
    """the round under way, as the running server hears of it"""
    parts: list[Part] = []
    held_back: dict[str, str] = {}
    """devices of which nothing is taken for now, and why"""
    trouble: str = ""
    """why nothing that devices send can be kept"""


def read_status(home: Home, config: ServerConfig, *, vault: Vault) -> ServerStatus:
    """What the database says.

    Raises:
        ConfigError: there is no model line, or several and none is named.
    """
    base = find_base(home, config.hub.line)
    registry, current = Registry(vault.database, home.adapters), _current(home, vault, line_id=base.line_id)
    newer = [a for a in registry.adapters(line_id=base.line_id) if current is None or a.version > current.version]
    devices = Devices(vault.database).all()
    return ServerStatus(
        running=False,
        url=config.url(),
        line_id=base.line_id,
        devices=DeviceCounts(
            joined=sum(device.state == "joined" for device in devices),
            revoked=sum(device.state == "revoked" for device in devices),
            waiting=sum(device.state == "waiting" for device in devices),
            left=sum(device.state == "left" for device in devices),
            doubled=sum(device.doubled(now_ms=time.time_ns() // 1_000_000) for device in devices),
        ),
        ready_trajectories=vault.count_ready(base.line_id, Channel.TRAIN),
        round_trajectories=config.train.round_trajectories,
        rounds=_rounds(registry),
        adapter=current,
        deltas=_deltas(vault, config.federate, line_id=base.line_id),
        waiting_adapters=sum(a.state in (AdapterState.CANDIDATE, AdapterState.HELD) for a in newer),
    )


def _deltas(vault: Vault, settings: FederateSettings, *, line_id: str) -> DeltaCounts:
    waiting = vault.deltas.waiting(line_id)
    devices = frozenset[str]().union(*(devices_in(vault.database, delta.device_id) for delta in waiting))
    now_ms = time.time_ns() // 1_000_000
    return DeltaCounts(
        states=vault.deltas.counts(line_id),
        waiting=len(waiting),
        devices=len(devices),
        needed=buffer_size(settings, len(learners(vault.database, line_id) | devices)),
        min_devices=settings.min_devices,
        oldest_s=max(0.0, (now_ms - waiting[0].received_ms) / 1000) if waiting else 0.0,
        max_wait_s=settings.max_wait_s,
    )


def _rounds(registry: Registry) -> RoundCounts:
    counts = registry.round_counts()
    latest = registry.rounds(limit=1)
    running = latest[0].round_id if latest and latest[0].state is RoundState.RUNNING else ""
    return RoundCounts(
        passed=counts.get(RoundState.PASSED, 0),
        refused=counts.get(RoundState.REFUSED, 0),
        failed=counts.get(RoundState.FAILED, 0),
        running=running,
    )


def _current(home: Home, vault: Vault, *, line_id: str) -> CurrentAdapter | None:
    found = Registry(vault.database, home.adapters).current(line_id)
    if found is None:
        return None
    users = [d for d in Devices(vault.database).all() if d.state == "joined" and d.adapter_version == found.version]
    return CurrentAdapter(
        version=found.version,
        round_id=found.facts.round_id,
        released_ms=found.released_ms or 0,
        reward=found.facts.evaluation.reward,
        reward_before=found.facts.evaluation.reward_before,
        in_use=len(users),
    )


def write_running(home: Home, running: Running) -> None:
    """Tell the command line where the server listens.

    Raises:
        StorageError: the home cannot be written.
    """
    publish_secret(home.folder / RUNNING_FILE, msgspec.json.encode(running))


def read_running(home: Home) -> Running | None:
    """Where a server of this home listens, if one was started and not stopped. It may have died since.

    Raises:
        HomeError: the file is damaged.
    """
    path = home.folder / RUNNING_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Running)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise HomeError(f"cannot read {path}: {error}; remove it if no server runs") from error

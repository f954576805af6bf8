"""What a simulation found, as values, and the sums that make it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from clawloop_server.simulate.device import Account
from clawloop_server.simulate.stage import Part
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault

_HOUR_S = 3600.0
_SET_ASIDE = "set aside"


class PartCost(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of process of the server. CPU in seconds a device and hour, and in cores; memory in MiB, the most seen.
    `quiet`: before the first release, when there was nothing but polls, heartbeats and uploads."""

    name: str
    cpu_s_per_device_hour: float
    quiet_cpu_s_per_device_hour: float
    cores: float
    rss_mib: float


class PickUps(msgspec.Struct, frozen=True, kw_only=True):
    """From an adapter's release until devices had taken it, over all releases. `missing`: how many never did.
    `_polls`: in polling periods."""

    count: int
    missing: int
    p50_s: float
    p95_s: float
    max_s: float
    p50_polls: float
    p95_polls: float
    max_polls: float


class Items(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the items. `lost`: acknowledged by a receipt and not whole in the vault; `doubled`: there more
    than once; `waiting`: not acknowledged when it ended, so still with their devices."""

    acknowledged: int
    lost: int
    doubled: int
    waiting: int


class Deltas(msgspec.Struct, frozen=True, kw_only=True):
    """What became of made-up deltas. `lost`: acknowledged by a receipt and unknown to the vault; `states`: of the
    others by state (`waiting`, `joined`, `left out`, ...), `set aside` among them; `rounds`: all rounds, by state."""

    acknowledged: int = 0
    lost: int = 0
    states: dict[str, int] = {}
    rounds: dict[str, int] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. Rates are of the measured time, from when all devices were there; errors are of all of it."""

    devices: int
    processes: int
    poll_s: float
    heartbeat_s: float
    upload_every_s: float
    seconds: float
    ramp_s: float
    active: int
    connections: int
    polls_per_s: float
    calls_per_s: float
    calls: dict[str, int]
    errors: dict[str, int]
    refused: list[str]
    faults: list[str]
    parts: list[PartCost]
    server_cpu_s_per_device_hour: float
    quiet_cpu_s_per_device_hour: float
    simulator_cores: float
    pick_ups: PickUps
    items: Items
    load_average: float
    deltas: Deltas = Deltas()

    @property
    def sound(self) -> bool:
        """Whether every device was there, every adapter arrived and nothing was lost. Says nothing of speed."""
        items, found = self.items, self.pick_ups
        whole = self.active == self.devices and not self.faults and not self.refused
        whole = whole and not (self.deltas.lost or self.deltas.states.get(_SET_ASIDE))
        return whole and not (items.lost or items.doubled or items.waiting or found.missing)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that is not below `share` of them (nearest rank); nan if there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def pick_ups(accounts: Iterable[Account], released_ms: dict[int, int], *, poll_s: float) -> PickUps:
    """How long each device took for each version of `released_ms`. One that went from one version to a later one
    directly counts for both at that moment."""
    waits, missing = list[float](), 0
    for account in accounts:
        for version, at_ms in released_ms.items():
            taken = [pick.at_ms for pick in account.pick_ups if pick.version >= version]
            if taken:
                waits.append(max(0, min(taken) - at_ms) / 1000)
            else:
                missing += 1
    p50, p95, most = (percentile(waits, share) for share in (0.5, 0.95, 1.0))
    return PickUps(
        count=len(waits),
        missing=missing,
        p50_s=p50,
        p95_s=p95,
        max_s=most,
        p50_polls=p50 / poll_s,
        p95_polls=p95 / poll_s,
        max_polls=most / poll_s,
    )


def check_items(vault: Vault, master_key: bytes, accounts: Iterable[Account], *, steps: int) -> Items:
    """Look up in the vault every item that was acknowledged, each of which had so many `steps`."""
    seals, database = DeviceSeals(vault.database, master_key), vault.database
    acknowledged = lost = doubled = waiting = 0
    for account in accounts:
        waiting += account.waiting
        acknowledged += len(account.acknowledged)
        seal = seals.get(account.device_id) if account.device_id else None
        doubled += len(account.acknowledged) - len(set(account.acknowledged))
        for item_id in set(account.acknowledged):
            key = seal.name("item", item_id) if seal else b""
            values = [account.device_id, key]
            items = database.count("SELECT count(*) FROM items WHERE device_id = ? AND item_key = ?", values)
            found = database.count("SELECT count(*) FROM steps WHERE device_id = ? AND item_key = ?", values)
            lost += items == 0 or found < steps
            doubled += items > 1 or found > steps
    return Items(acknowledged=acknowledged, lost=lost, doubled=doubled, waiting=waiting)


def check_deltas(vault: Vault, master_key: bytes, accounts: Iterable[Account]) -> Deltas:
    """Look up in the vault every delta that was acknowledged, and what rounds there were."""
    seals, database, states, lost = DeviceSeals(vault.database, master_key), vault.database, Counter[str](), 0
    accounts = [account for account in accounts if account.deltas]
    for account in accounts:
        seal = seals.open(account.device_id)
        for item_id in account.deltas:
            key = seal.name("item", item_id)
            found = database.row(
                "SELECT state FROM deltas WHERE device_id = ?1 AND item_key = ?2 UNION ALL"
                " SELECT ?3 FROM set_aside WHERE device_id = ?1 AND name_key = ?2",
                [account.device_id, key, _SET_ASIDE],
            )
            states.update([found[0]] if found else [])
            lost += found is None
    rounds = dict(database.rows("SELECT state, count(*) FROM rounds GROUP BY state ORDER BY state"))
    acknowledged = sum(len(account.deltas) for account in accounts)
    return Deltas(acknowledged=acknowledged, lost=lost, states=dict(states), rounds=rounds)


def part_costs(
    begin: dict[str, Part], quiet: dict[str, Part], end: dict[str, Part], *, most_mib: dict[str, float], devices: int,
    quiet_s: float, seconds: float,
) -> list[PartCost]:  # fmt: skip
    """What each kind of process used between `begin` and `end`, and between `begin` and `quiet`."""
    zero = Part(0.0, 0.0)
    costs = []
    for name, last in end.items():
        first = begin.get(name, zero).cpu_s
        spent, in_quiet = last.cpu_s - first, quiet.get(name, zero).cpu_s - first
        costs.append(
            PartCost(
                name=name,
                cpu_s_per_device_hour=spent / devices / seconds * _HOUR_S,
                quiet_cpu_s_per_device_hour=in_quiet / devices / quiet_s * _HOUR_S if quiet_s else 0.0,
                cores=spent / seconds,
                rss_mib=most_mib.get(name, 0.0),
            )
        )
    return costs


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """All of them together, the largest first."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())

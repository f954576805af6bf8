"""A device as the operator looks at it: how it stands, what it sent, and what it waits for. Reads only."""

from __future__ import annotations

import time

import msgspec

from clawloop_server.hub.devices import Device, DeviceEvent, Devices, DeviceState
from clawloop_server.release.registry import Registry
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared.signing import key_words


class DeviceTold(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of one device. `items` counts what it sent that is kept, `deltas` those by their state; `waits_for`
    is empty if it waits for nothing."""

    device_id: str
    state: str
    level: str
    adapter_version: int
    line_id: str
    cohort: str
    node_id: int | None
    joined_ms: int
    approved_ms: int
    seen_ms: int
    asked_ms: int
    """when its edge last asked how it stands"""
    key: str
    """six words of its key"""
    items: int
    deltas: dict[str, int]
    waits_for: str
    invitation: str
    events: list[DeviceEvent] = []


def tell(database: ServerDatabase, registry: Registry, device: Device, *, now_ms: int | None = None) -> DeviceTold:
    """All of it."""
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    own = [device.device_id]
    sql = "SELECT label FROM invitations WHERE device_id = ?"
    row = database.row(sql, own)
    return DeviceTold(
        device_id=device.device_id,
        state=device.state.value,
        level=device.level,
        adapter_version=device.adapter_version,
        line_id=device.line_id,
        cohort=device.cohort,
        node_id=device.node_id,
        joined_ms=device.joined_ms,
        approved_ms=device.approved_ms,
        seen_ms=device.seen_ms,
        asked_ms=device.held_ms,
        key=key_words(device.device_key) if device.device_key else "",
        items=database.count("SELECT count(*) FROM items WHERE device_id = ?", own),
        deltas=dict(database.rows("SELECT state, count(*) FROM deltas WHERE device_id = ? GROUP BY state", own)),
        waits_for=_waits_for(registry, device, now_ms=now_ms),
        invitation=row[0] if row else "",
        events=Devices(database).events(device.device_id),
    )


def _waits_for(registry: Registry, device: Device, *, now_ms: int) -> str:
    if device.state is DeviceState.WAITING:
        return f"your word: devices approve {device.device_id}, or devices reject"
    if device.state is not DeviceState.JOINED:
        return ""
    if device.doubled(now_ms=now_ms):
        return "its owner: two edges have its keys (a copied home); the one that came last is served"
    if device.node_id is None:
        return "being registered in Flower"
    current = registry.current(device.line_id, cohort=device.cohort)
    if current is not None and current.version > device.adapter_version:
        return f"adapter {current.version}"
    return "" if device.level not in ("", "off") else "its owner: nothing may leave it"

"""What a round takes when devices wait for it: each its share, however much one of them sends."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from clawloop_server.bases import Base
from clawloop_server.vault import standing
from clawloop_server.vault.groups import Stage
from clawloop_server.vault.store import Vault
from clawloop_shared.ids import new_id

Make = Callable[..., Any]


def fill(vault: Vault, base: Base, device: str, sizes: list[int], *, at_ms: int, stage: Stage = Stage.QUIET) -> None:
    """Groups of so many judged trajectories each, one after the other."""
    groups = [(new_id(), size, at_ms + number) for number, size in enumerate(sizes)]
    with vault.database.write() as database:
        database.run_each(
            "INSERT INTO trajectory_groups VALUES (?, ?, ?, 'train', 0, ?, ?, ?, ?)",
            [[name, device, base.line_id, str(stage), size, at, at] for name, size, at in groups],
        )
        sql = "INSERT INTO trajectories (trajectory_id, device_id, line_id, channel, state, created_ms, group_id)"
        database.run_each(
            sql + " VALUES (?, ?, ?, 'train', 'judged', ?, ?)",
            [[new_id(), device, base.line_id, at, name] for name, size, at in groups for _ in range(size)],
        )


def taken(vault: Vault, base: Base, limit: int, *, cohort: str = "") -> list[str]:
    """The devices of a round, trajectory by trajectory; it ends, and what it had is consumed."""
    vault.pins.take("round", base.line_id, limit, deadlines=dict.fromkeys(Stage, 1 << 62), cohort=cohort)
    sql = "SELECT trajectory_id, device_id, group_id FROM pins JOIN trajectories USING (trajectory_id, device_id)"
    rows = vault.database.rows(sql)
    ended = str(vault.database.count("SELECT count(DISTINCT round_id) FROM trajectories"))
    with vault.database.write() as database:
        sql = "UPDATE trajectories SET state = 'consumed', round_id = ? WHERE trajectory_id = ?"
        database.run_each(sql, [[ended, name] for name, _, _ in rows])
        standing.update_groups(database, {group for _, _, group in rows})
        vault.pins.release("round")
    return [device for _, device, _ in rows]


def test_a_device_with_ten_thousand_groups_has_its_share_and_no_more(
    vault: Vault, base: Base, add_device: Make
) -> None:
    crowd, *others = (add_device() for _ in range(4))
    fill(vault, base, crowd, [1] * 10_000, at_ms=1)
    for number, device in enumerate(others):
        fill(vault, base, device, [1] * 10, at_ms=100_000 + number * 1000)
    assert Counter(taken(vault, base, 32)) == dict.fromkeys([crowd, *others], 8)
    assert Counter(taken(vault, base, 32)) == {crowd: 26} | dict.fromkeys(others, 2), "who has no more leaves room"
    assert Counter(taken(vault, base, 32)) == {crowd: 32}


def test_what_large_groups_bring_counts_by_trajectories(vault: Vault, base: Base, add_device: Make) -> None:
    large, *others = (add_device() for _ in range(3))
    fill(vault, base, large, [8] * 20, at_ms=1)
    for device in others:
        fill(vault, base, device, [1] * 30, at_ms=1000)
    assert Counter(taken(vault, base, 24)) == dict.fromkeys([large, *others], 8)


def test_a_group_that_fills_a_round_does_not_come_first_again(vault: Vault, base: Base, add_device: Make) -> None:
    huge, small = add_device(), add_device()
    fill(vault, base, huge, [40] * 5, at_ms=1)
    fill(vault, base, small, [1] * 3, at_ms=1000)
    assert set(taken(vault, base, 16)) == {huge}, "the first goes even if it is larger than a round"
    assert taken(vault, base, 16) == [small] * 3
    assert set(taken(vault, base, 16)) == {huge}


def test_with_more_devices_than_places_those_go_first_that_were_not_served(
    vault: Vault, base: Base, add_device: Make
) -> None:
    devices = [add_device() for _ in range(6)]
    for number, device in enumerate(devices):
        fill(vault, base, device, [1] * 5, at_ms=1 + 1000 * number)
    rounds = [set(taken(vault, base, 2)) for _ in range(3)]
    assert rounds == [set(devices[:2]), set(devices[2:4]), set(devices[4:])]


def test_of_one_device_the_longest_waiting_go_first_over_both_stages_and_pages(
    vault: Vault, base: Base, add_device: Make
) -> None:
    device, other, apart = add_device(), add_device(), add_device()
    fill(vault, base, device, [1] * 40, at_ms=1)
    fill(vault, base, device, [1] * 40, at_ms=20, stage=Stage.PARTIAL)
    fill(vault, base, other, [1], at_ms=1)
    fill(vault, base, apart, [1] * 4, at_ms=1)
    with vault.database.write() as database:
        database.run("UPDATE devices SET cohort = 'apart' WHERE device_id = ?", [apart])

    def ready(limit: int, cohort: str = "", until: int = 1 << 62) -> list[str]:
        found = standing.ready_groups(
            vault.database,
            base.line_id,
            "train",
            deadlines={Stage.QUIET: until, Stage.PARTIAL: until},
            limit=limit,
            cohort=cohort,
        )
        return [group.group_id for group in found]

    def waiting(where: str) -> list[str]:
        sql = f"SELECT group_id FROM trajectory_groups WHERE {where} ORDER BY arrived_ms, arrival, group_id"  # noqa: S608
        return [row[0] for row in vault.database.rows(sql)]

    mine, (its,) = waiting(f"device_id = '{device}'"), waiting(f"device_id = '{other}'")
    for limit in (2, 3, 7, 33, 64, 81, 500):
        found = ready(limit)
        assert its in found[:2]
        assert [name for name in found if name != its] == mine[: limit - 1]
        assert found == ready(limit), "the same again"
    assert ready(500, until=30) == [name for name in ready(500) if name == its or name in waiting("arrived_ms <= 30")]
    assert ready(9, "apart") == waiting(f"device_id = '{apart}'")
    assert ready(9, "nobody") == ready(0) == []


@pytest.mark.parametrize("limit", [4, 64])
def test_what_it_costs_does_not_grow_with_what_waits(
    vault: Vault, base: Base, add_device: Make, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    devices, read, real = [add_device() for _ in range(4)], 0, vault.database.rows
    for device in devices:
        fill(vault, base, device, [1] * 2_000, at_ms=1)

    def rows(sql: str, values: Any = ()) -> list[tuple[Any, ...]]:
        nonlocal read
        found = real(sql, values)
        read += len(found)
        return found

    monkeypatch.setattr(vault.database, "rows", rows)
    found = standing.ready_groups(
        vault.database, base.line_id, "train", deadlines=dict.fromkeys(Stage, 1 << 62), limit=limit
    )
    assert len(found) == limit
    assert read <= 2 * limit + 2 * len(devices)


@pytest.mark.parametrize("sql", [standing._DEVICES, standing._OF_DEVICE, standing._SERVED])
def test_every_look_is_one_at_an_index(vault: Vault, sql: str) -> None:
    plan = [
        row[3] for row in vault.database.rows(f"EXPLAIN QUERY PLAN {sql}", ["x"] * int(max(re.findall(r"\?(\d)", sql))))
    ]
    looks = [line for line in plan if "trajector" in line]
    assert looks
    assert all("in_turn (" in line or "by_device_round (device_id=?" in line for line in looks), plan
    assert not [line for line in plan if "TEMP B-TREE" in line], plan

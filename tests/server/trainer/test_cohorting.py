"""Devices that keep conflicting are moved apart, in the transaction of the round that showed it."""

from collections.abc import Callable
from itertools import combinations

import pytest

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.trainer.cohorting import Cohorting
from clawloop_server.vault.store import Vault

SETTINGS = FederateSettings(min_devices=2, conflict_rounds=2)
Add = Callable[..., str]


@pytest.fixture
def devices(add_device: Add) -> list[str]:
    """Five, by their ids: the first three agree, and so do the last two."""
    return sorted(add_device() for _ in range(5))


@pytest.fixture
def cohorts(vault: Vault, base: Base) -> Cohorting:
    return Cohorting(vault.database, line_id=base.line_id, settings=SETTINGS)


def seen(devices: list[str], *, apart: int = 3, by: float = -0.5) -> dict[str, dict[str, float]]:
    """What a round found where the first `apart` devices and the others go against each other."""
    found: dict[str, dict[str, float]] = {}
    for (m, x), (n, y) in combinations(enumerate(devices), 2):
        found.setdefault(x, {})[y] = 0.6 if (m < apart) == (n < apart) else by
    return found


def cohort_of(vault: Vault, device_id: str) -> str:
    ((cohort,),) = vault.database.rows("SELECT cohort FROM devices WHERE device_id = ?", [device_id])
    return str(cohort)


def test_what_conflicts_round_after_round_is_moved_apart_and_told_why(
    cohorts: Cohorting, vault: Vault, devices: list[str]
) -> None:
    assert cohorts.names() == [""]
    assert cohorts.heard("", seen(devices)) == []
    (new,) = cohorts.heard("", seen(devices))
    assert (new["cohort"], new["devices"]) == ("cohort-1", devices[3:])
    assert "went against" in new["why"]
    assert [cohort_of(vault, device) for device in devices] == ["", "", "", "cohort-1", "cohort-1"]
    assert cohorts.names() == ["", "cohort-1"]
    assert cohorts.heard("", seen(devices[:3])) == [], "what was known of them all is forgotten"


def test_one_round_that_disagrees_splits_nobody(cohorts: Cohorting, vault: Vault, devices: list[str]) -> None:
    for _ in range(4):
        assert cohorts.heard("", seen(devices)) == []
        assert cohorts.heard("", seen(devices, by=2.0)) == [], "agreed again"
    assert cohorts.names() == [""]


def test_what_was_seen_outlives_a_restart_and_a_transaction_that_fails_leaves_no_trace(
    vault: Vault, base: Base, devices: list[str]
) -> None:
    def anew() -> Cohorting:
        return Cohorting(vault.database, line_id=base.line_id, settings=SETTINGS)

    def record_and_fail() -> None:
        with vault.database.write():
            assert anew().heard("", seen(devices))
            raise RuntimeError("the round could not be recorded")

    anew().heard("", seen(devices))
    with pytest.raises(RuntimeError):
        record_and_fail()
    assert anew().names() == [""]
    assert anew().heard("", seen(devices)), "the first round is remembered, the failed one is not"


def test_deltas_and_trajectories_are_heard_together(cohorts: Cohorting, devices: list[str]) -> None:
    x, y = devices[:2]
    assert cohorts.heard("", {x: {y: 1.0}}, {}) == []
    pair = cohorts._evidence("").pairs[x][y]
    cohorts.heard("", {x: {y: 0.4}}, {x: {y: 0.0}})
    assert cohorts._evidence("").pairs[x][y].cosine == pytest.approx((pair.cosine + 0.2) / 2)


def test_a_device_that_left_is_moved_nowhere(cohorts: Cohorting, vault: Vault, devices: list[str]) -> None:
    cohorts.heard("", seen(devices))
    with vault.database.write() as database:
        database.run("UPDATE devices SET state = 'revoked' WHERE device_id = ?", [devices[4]])
    assert cohorts.heard("", seen(devices[:4])) == [], "one device alone is no cohort"
    assert cohort_of(vault, devices[4]) == ""


def test_it_can_be_switched_off_and_asks_only_where_there_are_enough(
    vault: Vault, base: Base, devices: list[str]
) -> None:
    off = Cohorting(vault.database, line_id=base.line_id, settings=FederateSettings(cohorts="off"))
    assert [off.heard("", seen(devices)) for _ in range(9)] == [[]] * 9
    assert not off.could_split("")
    four = Cohorting(vault.database, line_id=base.line_id, settings=FederateSettings(min_devices=2))
    six = Cohorting(vault.database, line_id=base.line_id, settings=FederateSettings(min_devices=3))
    assert four.could_split("")
    assert not six.could_split("")
    assert not four.could_split("cohort-1")


def test_a_cohort_splits_again_under_a_name_of_its_own(cohorts: Cohorting, vault: Vault, devices: list[str]) -> None:
    with vault.database.write() as database:
        database.run("UPDATE devices SET cohort = 'cohort-1'")
    cohorts.heard("cohort-1", seen(devices))
    (new,) = cohorts.heard("cohort-1", seen(devices))
    assert new["cohort"] == "cohort-2"
    assert cohorts.names() == ["", "cohort-1", "cohort-2"]


def test_a_split_knows_since_when_they_disagree(cohorts: Cohorting, devices: list[str]) -> None:
    x, *others = devices
    agreed = {x: dict.fromkeys(others, 0.9)} | {y: dict.fromkeys(others[n + 1 :], 0.9) for n, y in enumerate(others)}
    cohorts.heard("", {k: v for k, v in agreed.items() if v}, version=3)
    split = []
    for version in range(4, 12):
        split = cohorts.heard("", seen(devices, by=-0.9), version=version)
        if split:
            break
    assert [one["since"] for one in split] == [3], "the last version beside which they agreed"

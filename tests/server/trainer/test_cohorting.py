"""Devices that keep conflicting are moved apart, in the transaction of the round that showed it."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.trainer.cohorting import Cohorting, _evidence
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


def hear(cohorts: Cohorting, cohort: str, *conflicts: Any, version: int = 0) -> list[dict[str, Any]]:
    """What a round does: look first, and keep it in its transaction."""
    heard = cohorts.hear(cohort, *conflicts, version=version)
    return cohorts.part(heard) if heard else []


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
    assert hear(cohorts, "", seen(devices)) == []
    (new,) = hear(cohorts, "", seen(devices))
    assert (new["cohort"], new["devices"]) == ("cohort-1", devices[3:])
    assert "went against" in new["why"]
    assert [cohort_of(vault, device) for device in devices] == ["", "", "", "cohort-1", "cohort-1"]
    assert cohorts.names() == ["", "cohort-1"]
    assert hear(cohorts, "", seen(devices[:3])) == [], "what was known of them all is forgotten"


def test_one_round_that_disagrees_splits_nobody(cohorts: Cohorting, vault: Vault, devices: list[str]) -> None:
    for _ in range(4):
        assert hear(cohorts, "", seen(devices)) == []
        assert hear(cohorts, "", seen(devices, by=2.0)) == [], "agreed again"
    assert cohorts.names() == [""]


def test_what_was_seen_outlives_a_restart_and_a_transaction_that_fails_leaves_no_trace(
    vault: Vault, base: Base, devices: list[str]
) -> None:
    def anew() -> Cohorting:
        return Cohorting(vault.database, line_id=base.line_id, settings=SETTINGS)

    def record_and_fail() -> None:
        with vault.database.write():
            assert hear(anew(), "", seen(devices))
            raise RuntimeError("the round could not be recorded")

    hear(anew(), "", seen(devices))
    with pytest.raises(RuntimeError):
        record_and_fail()
    assert anew().names() == [""]
    assert hear(anew(), "", seen(devices)), "the first round is remembered, the failed one is not"


def test_deltas_and_trajectories_are_heard_together(cohorts: Cohorting, devices: list[str]) -> None:
    x, y = devices[:2]
    assert hear(cohorts, "", {x: {y: 1.0}}, {}) == []
    pair = _evidence(cohorts._kept("")).pairs[x][y]
    hear(cohorts, "", {x: {y: 0.4}}, {x: {y: 0.0}})
    assert _evidence(cohorts._kept("")).pairs[x][y].cosine == pytest.approx((pair.cosine + 0.2) / 2)


def test_a_device_that_left_is_moved_nowhere(cohorts: Cohorting, vault: Vault, devices: list[str]) -> None:
    hear(cohorts, "", seen(devices))
    with vault.database.write() as database:
        database.run("UPDATE devices SET state = 'revoked' WHERE device_id = ?", [devices[4]])
    assert hear(cohorts, "", seen(devices[:4])) == [], "one device alone is no cohort"
    assert cohort_of(vault, devices[4]) == ""


def test_it_can_be_switched_off_and_asks_only_where_there_are_enough(
    vault: Vault, base: Base, devices: list[str]
) -> None:
    off = Cohorting(vault.database, line_id=base.line_id, settings=FederateSettings(cohorts="off"))
    assert [hear(off, "", seen(devices)) for _ in range(9)] == [[]] * 9
    assert not off.could_split("")
    four = Cohorting(vault.database, line_id=base.line_id, settings=FederateSettings(min_devices=2))
    six = Cohorting(vault.database, line_id=base.line_id, settings=FederateSettings(min_devices=3))
    assert four.could_split("")
    assert not six.could_split("")
    assert not four.could_split("cohort-1")


def test_a_cohort_splits_again_under_a_name_of_its_own(cohorts: Cohorting, vault: Vault, devices: list[str]) -> None:
    with vault.database.write() as database:
        database.run("UPDATE devices SET cohort = 'cohort-1'")
    hear(cohorts, "cohort-1", seen(devices))
    (new,) = hear(cohorts, "cohort-1", seen(devices))
    assert new["cohort"] == "cohort-2"
    assert cohorts.names() == ["", "cohort-1", "cohort-2"]


def test_a_split_knows_since_when_they_disagree(cohorts: Cohorting, devices: list[str]) -> None:
    x, *others = devices
    agreed = {x: dict.fromkeys(others, 0.9)} | {y: dict.fromkeys(others[n + 1 :], 0.9) for n, y in enumerate(others)}
    hear(cohorts, "", {k: v for k, v in agreed.items() if v}, version=3)
    split = []
    for version in range(4, 12):
        split = hear(cohorts, "", seen(devices, by=-0.9), version=version)
        if split:
            break
    assert [(one["since"], one["back"]) for one in split] == [(3, True)], "the last version beside which they agreed"


def test_few_who_part_take_nobody_back_with_them(cohorts: Cohorting, add_device: Add, devices: list[str]) -> None:
    more = sorted([*devices, *(add_device() for _ in range(4))])
    hear(cohorts, "", seen(more, apart=9), version=3)
    split = next(
        found for version in range(4, 12) if (found := hear(cohorts, "", seen(more, apart=6, by=-0.9), version=version))
    )
    assert [(one["devices"], one["since"], one["back"]) for one in split] == [(more[6:], 3, False)]


def test_who_never_agreed_takes_nobody_back(cohorts: Cohorting, devices: list[str]) -> None:
    hear(cohorts, "", seen(devices), version=7)
    (one,) = hear(cohorts, "", seen(devices), version=8)
    assert (one["since"], one["back"]) == (8, False)


def test_nobody_parts_where_devices_came_or_went_while_it_was_judged(
    cohorts: Cohorting, vault: Vault, devices: list[str], add_device: Add
) -> None:
    hear(cohorts, "", seen(devices))
    heard = cohorts.hear("", seen(devices))
    assert heard
    assert len(heard.found) == 2
    add_device()
    assert cohorts.part(heard) == []
    assert cohorts.names() == [""]
    assert hear(cohorts, "", seen(devices)), "the next round says it again"

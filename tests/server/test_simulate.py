"""What a simulation counts, and that it goes nowhere near a server that learns."""

import math
from collections.abc import Callable

import pytest

from clawloop_server.errors import HomeError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.simulate.device import Account, PickUp
from clawloop_server.simulate.report import check_items, part_costs, percentile, pick_ups
from clawloop_server.simulate.stage import Part, Stage
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Step, StepBatch


def item(item_id: str, *steps: Step) -> UploadItem:
    return UploadItem(item_id, "receipt", "steps.v1", wire.encode(StepBatch(steps=list(steps))))


def test_a_home_that_was_not_made_for_it_is_refused(home: Home, keys: ServerKeys) -> None:
    with pytest.raises(HomeError, match="not the home of a simulation"):
        Stage.make(home.folder, settings={})


def test_an_item_that_was_acknowledged_and_is_not_whole_in_the_vault_is_lost(
    vault: Vault, keys: ServerKeys, device: str, make_step: Callable[..., Step]
) -> None:
    vault.receive(device, [item("whole", make_step(), make_step()), item("half", make_step())])
    told = Account(device_id=device, acknowledged=["whole", "half", "never came"], waiting=1)
    found = check_items(vault, keys.master, [told], steps=2)
    assert (found.acknowledged, found.lost, found.doubled, found.waiting) == (3, 2, 0, 1)
    twice = check_items(vault, keys.master, [Account(device_id=device, acknowledged=["half", "half"])], steps=1)
    assert (twice.lost, twice.doubled) == (0, 1)


def test_a_pick_up_counts_from_the_release_and_a_later_version_counts_for_an_earlier_one() -> None:
    accounts = [
        Account(pick_ups=[PickUp(1, 3_000), PickUp(2, 13_000)]),
        Account(pick_ups=[PickUp(2, 12_000)]),
        Account(pick_ups=[PickUp(1, 2_000)]),
    ]
    found = pick_ups(accounts, {1: 1_000, 2: 11_000}, poll_s=2.0)
    assert (found.count, found.missing) == (5, 1)
    assert (found.p50_s, found.max_s, found.p50_polls) == (2.0, 11.0, 1.0)
    assert math.isnan(pick_ups([], {1: 1}, poll_s=1.0).p95_s)


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(n) for n in range(1, 21)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 1.0)] == [1.0, 10.0, 19.0, 20.0]


def test_costs_are_of_the_time_that_was_measured() -> None:
    begin, quiet, end = ({"hub": Part(spent, 50.0)} for spent in (10.0, 11.0, 16.0))
    (cost,) = part_costs(begin, quiet, end, most_mib={"hub": 60.0}, devices=10, quiet_s=36.0, seconds=72.0)
    assert (cost.cpu_s_per_device_hour, cost.quiet_cpu_s_per_device_hour) == (30.0, 10.0)
    assert (cost.cores, cost.rss_mib) == (6.0 / 72.0, 60.0)

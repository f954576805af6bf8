"""What a simulation counts, and that it goes nowhere near a server that learns."""

import math
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from clawloop_server.bases import Base
from clawloop_server.errors import HomeError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.simulate.device import Account, Device, PickUp
from clawloop_server.simulate.learning import made_adapter
from clawloop_server.simulate.report import check_deltas, check_items, part_costs, percentile, pick_ups
from clawloop_server.simulate.stage import Part, Stage
from clawloop_server.simulate.worker import is_of_share
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, check_tensors, parse_config
from clawloop_shared.messages import LEARN, STATUS, UploadItem, UploadRequest
from clawloop_shared.records import Step, StepBatch
from clawloop_shared.safetensors_header import read_header


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


def test_a_device_at_deltas_answers_a_task_with_a_delta_that_the_vault_takes_and_rounds_can_join(
    vault: Vault, keys: ServerKeys, base: Base, add_device: Callable[..., str]
) -> None:
    task = LearnTask(task_id="t", line_id=base.line_id, base_version=0, rank=4, target_modules=("q_proj", "v_proj"))
    accounts = []
    for _ in range(3):
        device_id = add_device()
        made = Device(Mock(), code="", root_key=b"", line=base.line, habits=Mock(items=0), learns=base.shape)
        made.account.device_id = device_id
        assert made._answer(STATUS, b"")[0].level == "deltas"  # type: ignore[attr-defined]
        assert made._answer(LEARN, wire.encode(task))[0] == LearnReply(task_id="t", accepted=True)
        (sent,) = made._upload(UploadRequest(receipts=[], max_bytes=1 << 20)).items
        vault.receive(device_id, [sent])
        made.account.deltas = [sent.item_id]
        accounts.append(made.account)
        made.rest()
        assert not made._learn(task).accepted, "what is made after the end would never be drained"
    found = check_deltas(vault, keys.master, accounts)
    assert (found.acknowledged, found.lost, found.states, found.rounds) == (3, 0, {"waiting": 3}, {})
    deltas = [vault.deltas.read(facts.delta_id) for facts in vault.deltas.waiting(base.line_id)]
    assert len({delta.weights for delta in deltas if delta}) == 3
    accounts[0].deltas.append("never came")
    assert check_deltas(vault, keys.master, accounts).lost == 1


def test_a_device_at_full_learns_nothing(base: Base) -> None:
    made = Device(Mock(), code="", root_key=b"", line=base.line, habits=Mock(items=0))
    assert made._answer(STATUS, b"")[0].level == "full"  # type: ignore[attr-defined]
    task = LearnTask(task_id="t", line_id=base.line_id, base_version=0)
    assert not made._answer(LEARN, wire.encode(task))[0].accepted  # type: ignore[attr-defined]
    assert made.drained


def test_an_adapter_that_rounds_go_on_from_fits_the_model(base: Base) -> None:
    files = made_adapter(base.shape)
    config = parse_config(files[CONFIG_FILE])
    check_tensors(read_header(files[WEIGHTS_FILE], max_bytes=1 << 20), config, shape=base.shape)


@pytest.mark.parametrize(("share", "of_ten"), [(0.0, 0), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_a_share_of_the_devices_is_spread_over_them(share: float, of_ten: int) -> None:
    found = [is_of_share(number, share) for number in range(20)]
    assert (sum(found[:10]), sum(found[10:])) == (of_ten, of_ten)


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(n) for n in range(1, 21)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 1.0)] == [1.0, 10.0, 19.0, 20.0]


def test_costs_are_of_the_time_that_was_measured() -> None:
    begin, quiet, end = ({"hub": Part(spent, 50.0)} for spent in (10.0, 11.0, 16.0))
    (cost,) = part_costs(begin, quiet, end, most_mib={"hub": 60.0}, devices=10, quiet_s=36.0, seconds=72.0)
    assert (cost.cpu_s_per_device_hour, cost.quiet_cpu_s_per_device_hour) == (30.0, 10.0)
    assert (cost.cores, cost.rss_mib) == (6.0 / 72.0, 60.0)

"""Joined rounds from which something is missing: forgotten, cut off, refused, or alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.gate import refuse
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import RoundState
from clawloop_server.trainer.delta_round import DEADLY_DELTA
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.deltas import DeltaState
from clawloop_server.vault.store import Vault

from .filled import PER_ROUND, TRAIN, Died, configure, fill
from .joined import (
    PLAIN,
    MakeSignal,
    MakeStep,
    _all,
    add_sum,
    dense,
    forget_all,
    joined_home,
    learn,
    make_ready,
    opened,
    paths_of,
    served,
    states,
)

__all__ = ["joined_home", "learn", "opened"]


@pytest.mark.parametrize("left", [2, 1])
def test_what_is_forgotten_while_it_is_judged_is_in_no_adapter(
    vault: Vault, base: Base, opened: Callable[[], Worker], learn: Any, left: int
) -> None:
    worker = opened()
    forgotten, device, _ = learn(1)
    others = [learn(seed) for seed in range(2, 2 + left)]
    judge, told = worker._judge, list[list[int]]()

    def judging(*args: Any, **more: Any) -> Any:
        if not told:
            told.append(forget_all(vault, device))
        return judge(*args, **more)

    worker._judge = judging  # type: ignore[method-assign]
    report = worker.run()
    assert told == [[]]
    assert vault.deltas.lost([forgotten]) == {forgotten}
    if left == 1:
        assert (report.state, report.version) == (RoundState.FAILED, None), "one device is too few"
        assert states(vault, base.line_id) == {"waiting": 1}
        return
    assert (report.state, report.deltas) == (RoundState.PASSED, 2)
    files = worker._registry.files(1)
    for path in paths_of(base):
        wanted = 0.5 * dense(others[0][2], path) + 0.5 * dense(others[1][2], path)
        assert torch.allclose(served(files, path), wanted, atol=1e-5), path
    assert forget_all(vault, others[0][1]) == [1]


def test_a_mixed_round_begins_again_without_what_was_forgotten_and_keeps_its_updates(
    vault: Vault,
    device: str,
    opened: Callable[[], Worker],
    learn: Any,
    make_step: MakeStep,
    make_signal: MakeSignal,
) -> None:
    fill(vault, device, count=PER_ROUND, make_step=make_step, make_signal=make_signal)
    worker = opened()
    _, gone, _ = learn(1)
    learn(2)
    judge, steps, done = worker._judge, list[dict[str, float]](), list[bool]()

    def judging(*args: Any, **more: Any) -> Any:
        if not done:
            done.append(True)
            vault.delete_device(gone)
        return judge(*args, **more)

    worker._judge = judging  # type: ignore[method-assign]
    report = worker.run(steps.append)
    assert (report.state, report.deltas, report.trajectories) == (RoundState.PASSED, 1, PER_ROUND)
    assert len(steps) == 3, "the updates are gone on with from their checkpoint"
    assert {d.device_id for d in vault.deltas.of_round(report.round_id)}.isdisjoint({gone})


@pytest.mark.parametrize("where", ["into", "_judge", "settle", "finish_round"])
def test_a_round_of_deltas_that_was_cut_off_is_made_anew_the_same(
    vault: Vault, base: Base, opened: Callable[[], Worker], learn: Any, where: str
) -> None:
    deltas = [learn(seed)[2] for seed in (1, 2)]
    worker = opened()
    holder: Any = {"into": worker._joining, "settle": worker._joining, "finish_round": worker._registry}.get(
        where, worker
    )

    def die(*args: Any, **more: Any) -> Any:
        raise Died

    setattr(holder, where, die)
    with pytest.raises(Died):
        worker.run()
    again = opened()
    assert states(vault, base.line_id) == {"waiting": 2}
    make_ready(again)
    report = again.run()
    assert (report.state, report.version, report.deltas) == (RoundState.PASSED, 1, 2)
    assert again._registry.round(report.round_id).attempts == 2, "it is the same round"
    for path in paths_of(base):
        wanted = 0.5 * dense(deltas[0], path) + 0.5 * dense(deltas[1], path)
        assert torch.allclose(served(again._registry.files(1), path), wanted, atol=1e-5), path
    assert again.missing == PER_ROUND


def test_a_delta_that_kills_the_trainer_is_refused_in_the_end(
    vault: Vault, base: Base, opened: Callable[[], Worker], learn: Any
) -> None:
    for seed in (1, 2):
        learn(seed)
    large, _, _ = learn(3, rank=8)

    def die(*args: Any, **more: Any) -> Any:
        raise Died

    for _ in range(3):
        worker = opened()
        worker._joining.into = die  # type: ignore[method-assign]
        with pytest.raises(Died):
            worker.run()
    report = opened().run()
    assert (report.state, report.deltas) == (RoundState.PASSED, 2)
    assert {d.delta_id: d.reason for d in _all(vault) if d.state is DeltaState.REFUSED} == {large: DEADLY_DELTA}


def test_what_a_refused_round_had_joined_is_refused_with_it(
    vault: Vault, opened: Callable[[], Worker], learn: Any
) -> None:
    worker = opened()
    for seed in (1, 2):
        learn(seed)
    worker._judge = lambda result, *, current: refuse("reward is worse")  # type: ignore[method-assign]
    report = worker.run()
    assert (report.state, report.version) == (RoundState.REFUSED, None)
    found = vault.deltas.of_round(report.round_id)
    assert [d.state for d in found] == [DeltaState.REFUSED] * 2
    assert all("reward is worse" in d.reason for d in found)
    assert worker.missing == PER_ROUND


def test_a_sum_of_devices_that_learn_apart_by_now_is_in_no_cohorts_round(
    vault: Vault, base: Base, opened: Callable[[], Worker], add_device: Callable[..., str], learn: Any
) -> None:
    members = [add_device() for _ in range(3)]
    add_sum(vault, base, members)
    learn(1)
    with vault.database.write() as database:
        database.run("UPDATE devices SET cohort = 'b' WHERE device_id = ?", [members[0]])
    worker = opened()
    assert worker.missing == PER_ROUND
    assert states(vault, base.line_id) == {"stale": 1, "waiting": 1}
    (reason,) = [d.reason for d in _all(vault) if d.state is DeltaState.STALE]
    assert "the sum of 3 devices" in reason
    assert "different cohorts" in reason


def test_a_secure_sum_counts_as_the_devices_that_are_in_it(
    vault: Vault, base: Base, opened: Callable[[], Worker], add_device: Callable[..., str]
) -> None:
    members = [add_device() for _ in range(3)]
    add_sum(vault, base, members)
    worker = opened()
    make_ready(worker)
    report = worker.run()
    assert (report.state, report.deltas) == (RoundState.PASSED, 1)
    account = worker._registry.round(report.round_id).metrics["joined"]
    assert account["devices"] == sorted(members)
    assert [share["device_id"] for share in account["shares"]] == [""], "it is of no single device"
    assert vault.delete_device(members[1]).adapters == [1]
    assert [d.state for d in vault.deltas.of_round(report.round_id)] == [DeltaState.SHREDDED]


def test_what_only_lacks_company_waits_on_when_the_others_are_left_out(
    home: Home, vault: Vault, keys: ServerKeys, base: Base, learn: Any
) -> None:
    configure(home, train=TRAIN, federate=PLAIN | {"duplicate_cosine": 0.98})
    first, _, _ = learn(1)
    copied, _, _ = learn(1)
    worker = Worker.open(home)
    make_ready(worker)
    report = worker.run()
    assert (report.state, report.version) == (RoundState.FAILED, None)
    assert states(vault, base.line_id) == {"waiting": 2}, "a round that did not happen uses nothing up"
    assert worker.missing == PER_ROUND, "and is not made of the same again and again"
    learn(2)
    make_ready(worker)
    assert worker.run().deltas == 2
    assert {d.state for d in _all(vault) if d.delta_id in (first, copied)} == {DeltaState.JOINED, DeltaState.LEFT_OUT}
    worker.close()


def test_what_was_left_out_and_waited_for_others_in_vain_is_learned_anew(
    home: Home, vault: Vault, keys: ServerKeys, base: Base, learn: Any
) -> None:
    configure(home, train=TRAIN, federate=PLAIN | {"duplicate_cosine": 0.98})
    learn(1)
    learn(1)
    worker = Worker.open(home)
    assert worker.run().version is None
    assert worker.missing == PER_ROUND
    with vault.database.write() as database:
        database.run("UPDATE deltas SET received_ms = received_ms - 1800000")
    make_ready(worker)
    assert "a copy of" in worker.run().reason
    assert states(vault, base.line_id) == {"left out": 1, "waiting": 1}, "a device whose delta waits is asked nothing"
    assert worker.missing == PER_ROUND
    worker.close()

"""Rounds of what devices learned at home, alone and beside trajectories, with the real engine."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torch import Tensor

from clawloop_server.aggregate.buffer import buffer_size
from clawloop_server.aggregate.seeds import task_seed
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys, load_keys
from clawloop_server.release.records import RoundState
from clawloop_server.release.release import release_candidate, roll_back
from clawloop_server.trainer.joining import IN_MEMORY, PREFIX
from clawloop_server.trainer.reports import RoundBegan
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.deltas import DeltaState
from clawloop_server.vault.store import Vault, lineage_root
from clawloop_shared.deltas import A, B, Method
from clawloop_shared.frozen_factors import frozen_a
from clawloop_shared.levels import Level
from clawloop_shared.lora import WEIGHTS_FILE

from ..made_deltas import make_delta, send_delta, with_tensors
from .filled import PER_ROUND, TRAIN, configure, fill
from .joined import (
    PLAIN,
    SCALE,
    TARGETS,
    MakeSignal,
    MakeStep,
    _all,
    _device,
    _hash,
    dense,
    joined_home,
    learn,
    let_deltas_out,
    make_ready,
    opened,
    parts_of,
    paths_of,
    served,
    states,
)

__all__ = ["joined_home", "learn", "opened"]


def test_a_round_of_deltas_alone_is_their_mean_and_is_explained(
    vault: Vault, base: Base, opened: Callable[[], Worker], learn: Any
) -> None:
    worker = opened()
    assert worker.missing == PER_ROUND
    one, _, first = learn(1, trajectories=3, reward=0.5)
    assert worker.missing == PER_ROUND, "one device is not enough"
    two, device, second = learn(2, trajectories=2, rank=4, alpha=2.0, reward=-0.5)
    make_ready(worker)

    began = list[RoundBegan]()
    report = worker.run(began=began.append)

    assert (report.state, report.version, report.trajectories, report.deltas) == (RoundState.PASSED, 1, 0, 2)
    assert report.reward == pytest.approx(0.1), "the mean of what the devices told, by what they learned from"
    assert (began[0].trajectories, began[0].updates, began[0].deltas) == (0, 0, 2)
    files, part = worker._registry.files(1), parts_of(worker, report.round_id)
    assert part[one] >= part[two] > 0
    assert part[one] + part[two] == pytest.approx(1)
    for path in paths_of(base):
        wanted = part[one] * dense(first, path) + part[two] * dense(second, path)
        assert torch.allclose(served(files, path), wanted, atol=1e-5), path
    untouched = "model.layers.0.self_attn.k_proj"
    assert not served(files, untouched).any()
    assert worker._registry.adapter(1).facts.lineage_root == lineage_root([one, two])
    round_ = worker._registry.round(report.round_id)
    shares = {share["source"]: share for share in round_.metrics["joined"]["shares"]}
    assert {source: share["device_id"] for source, share in shares.items()}[two] == device
    assert {one, two} == shares.keys()
    assert [d.state for d in vault.deltas.of_round(report.round_id)] == [DeltaState.JOINED] * 2
    assert worker.missing == PER_ROUND

    again = opened()
    again._restore()
    assert (again._state.version, again._state.rounds, again._state.updates) == (1, 1, 0)
    assert not any(name.startswith("exp_avg") for name in again._engine.state()), "the optimizer begins anew"


def test_a_mixed_round_joins_its_own_update_with_the_deltas(
    vault: Vault,
    base: Base,
    device: str,
    opened: Callable[[], Worker],
    learn: Any,
    make_step: MakeStep,
    make_signal: MakeSignal,
) -> None:
    fill(vault, device, count=PER_ROUND, make_step=make_step, make_signal=make_signal)
    worker = opened()
    own: list[dict[str, Tensor]] = []
    into = worker._joining.into

    def spying(*args: Any, **more: Any) -> Any:
        own.append(worker._engine.adapter())
        return into(*args, **more)

    worker._joining.into = spying  # type: ignore[method-assign]
    delta_id, _, delta = learn(1, trajectories=3)
    report = worker.run()

    assert (report.state, report.trajectories, report.deltas, report.updates) == (RoundState.PASSED, PER_ROUND, 1, 3)
    files, part = worker._registry.files(1), parts_of(worker, report.round_id)
    assert part["own"] > part[delta_id] > 0
    for path in paths_of(base):
        b, a = (own[0][PREFIX + path + part].double() for part in (B, A))
        learned = SCALE * b @ a  # version 0 has B = 0, so that the whole adapter is what it learned
        wanted = part["own"] * learned + part[delta_id] * dense(delta, path)
        cut = torch.linalg.svd(wanted)
        lost = cut.S[16:].norm()
        assert (served(files, path) - wanted).norm() <= lost + 1e-5, path
    root = worker._registry.adapter(1).facts.lineage_root
    assert root == lineage_root(
        [*vault.lineage(report.round_id), *(d.delta_id for d in vault.deltas.of_round(report.round_id))]
    )
    account = worker._registry.round(report.round_id).metrics["joined"]
    assert {share["source"] for share in account["shares"]} >= {"own"}
    assert device in account["devices"]


def test_without_deltas_a_round_is_bit_for_bit_what_it_was(
    joined_home: Home,
    vault: Vault,
    device: str,
    opened: Callable[[], Worker],
    learn: Any,
    make_step: MakeStep,
    make_signal: MakeSignal,
) -> None:
    """A delta that may not join (too few devices) changes nothing either."""
    fill(vault, device, count=PER_ROUND, make_step=make_step, make_signal=make_signal)
    worker = opened()
    learned: list[dict[str, Tensor]] = []
    judge = worker._judge

    def judging(*args: Any, **more: Any) -> Any:
        learned.append(worker._engine.adapter())
        return judge(*args, **more)

    worker._judge = judging  # type: ignore[method-assign]
    learn(1, device=device)
    report = worker.run()
    assert (report.state, report.deltas) == (RoundState.PASSED, 0)
    assert "joined" not in worker._registry.round(report.round_id).metrics
    assert states(vault, worker._base.line_id) == {"waiting": 1}, "one device is not two: it waits on"
    state = worker._engine.state()
    assert any(name.startswith("exp_avg") for name in state)
    files = load(worker._registry.files(1)[WEIGHTS_FILE])
    assert all(np.array_equal(files[name], tensor.numpy()) for name, tensor in learned[0].items())


def test_the_other_factor_is_drawn_or_the_served_one(
    joined_home: Home, vault: Vault, base: Base, opened: Callable[[], Worker], learn: Any
) -> None:
    worker = opened()
    private = {"level": Level.PRIVATE_DELTAS, "clip": 1.0, "sigma": 0.5, "method": Method.FFA}
    _, _, one = learn(1, **private)
    _, _, two = learn(2, method=Method.ROLORA_B, rank=4)
    assert worker.run().version == 1
    release_candidate(worker._registry, load_keys(joined_home), version=1)
    seed = task_seed(base.line_id, 0)
    files = worker._registry.files(1)
    for path in paths_of(base):
        wanted = torch.zeros(())
        for delta in (one, two):
            inputs = base.shape.linears()[path][0]
            raw = np.frombuffer(frozen_a(seed, path, rank=delta.rank, inputs=inputs), "<f4").reshape(delta.rank, inputs)
            b = torch.from_numpy(load(delta.weights)[path + B].copy()).double()
            wanted = wanted + 0.5 * delta.scale * b @ torch.from_numpy(raw.copy()).double()
        assert torch.allclose(served(files, path), wanted, atol=1e-5), path

    beside = {"base_version": 1, "weights_sha256": _hash(worker, 1), "rank": 16, "alpha": 128.0}
    targets = worker._settings.target_modules
    _, _, first = learn(3, method=Method.ROLORA_B, targets=targets, scale=0.001, **beside)
    _, _, second = learn(4, method=Method.ROLORA_A, targets=targets, scale=0.001, **beside)
    assert worker.run().version == 2
    tensors = load(files[WEIGHTS_FILE])
    after = worker._registry.files(2)
    for path in paths_of(base):
        b, a = (torch.from_numpy(tensors[PREFIX + path + part].copy()).double() for part in (B, A))
        own_b = torch.from_numpy(load(first.weights)[path + B].copy()).double()
        own_a = torch.from_numpy(load(second.weights)[path + A].copy()).double()
        wanted = served(files, path) + 0.5 * SCALE * (own_b @ a + b @ own_a)
        lost = torch.linalg.svdvals(wanted)[16:].norm()
        assert (served(after, path) - wanted).norm() <= lost + 1e-5, path


def test_what_is_too_old_or_of_an_adapter_that_was_taken_back_is_stale(
    joined_home: Home, vault: Vault, opened: Callable[[], Worker], add_device: Callable[..., str], learn: Any
) -> None:
    worker, keys, one, other = opened(), load_keys(joined_home), add_device(), add_device()

    def round_of_two(version: int) -> int:
        beside = {"base_version": version, "weights_sha256": _hash(worker, version)} if version else {}
        for seed, device in enumerate((one, other), start=10 * version):
            learn(seed, device=device, **beside)
        made = worker.run().version
        assert made is not None
        release_candidate(worker._registry, keys, version=made)
        return made

    for version in range(4):
        assert round_of_two(version) == version + 1
    old, _, _ = learn(100, device=one, base_version=0)
    aged, _, _ = learn(101, device=other, base_version=1, weights_sha256=_hash(worker, 1))
    report = worker.run()
    assert (report.version, report.deltas) == (5, 2)
    ages = {s["source"]: s["staleness"] for s in worker._registry.round(report.round_id).metrics["joined"]["shares"]}
    assert ages == {old: 4, aged: 3}
    release_candidate(worker._registry, keys, version=5)
    too_old, _, _ = learn(102, device=one, base_version=0)
    of_five, _, _ = learn(103, device=other, base_version=5, weights_sha256=_hash(worker, 5))
    assert worker.missing == PER_ROUND, "one is stale, so that one waits"
    line_id = worker._base.line_id
    assert states(vault, line_id) == {"joined": 10, "stale": 1, "waiting": 1}
    assert "max_staleness" in next(d for d in _all(vault) if d.delta_id == too_old).reason
    roll_back(worker._registry, keys, to_version=3)
    learn(104, device=one, base_version=3, weights_sha256=_hash(worker, 3))
    assert worker.missing == PER_ROUND
    assert "rolled back" in next(d for d in _all(vault) if d.delta_id == of_five).reason
    copied, _, _ = learn(105, device=other, base_version=6, weights_sha256=_hash(worker, 6))
    report = worker.run()
    ages = {s["source"]: s["staleness"] for s in worker._registry.round(report.round_id).metrics["joined"]["shares"]}
    assert sorted(ages.values()) == [0, 0], "version 6 is 3 again"
    assert copied in ages


def test_fewer_make_a_round_after_a_while_and_too_few_never_do(
    vault: Vault, base: Base, opened: Callable[[], Worker], add_device: Callable[..., str], learn: Any
) -> None:
    for n in range(20):
        device = add_device()
        if n < 8:  # the others send trajectories, or nothing
            let_deltas_out(vault, device)
    worker = opened()
    now_ms = time.time_ns() // 1_000_000
    old = make_delta(base.shape, base.line_id, seed=1, targets=TARGETS)
    send_delta(vault, add_device(), old, now_ms=now_ms - 1_799_000)
    assert worker.missing == PER_ROUND
    learn(2)
    assert worker.missing == PER_ROUND, "two of 10 that let deltas out, and none waited long enough"
    newest = worker._saves.newest
    assert not worker._joining.ready(newest, now_ms=now_ms)
    assert worker._joining.ready(newest, now_ms=now_ms + 2_000)
    for seed in range(3, 9):  # 8 of 16
        learn(seed)
    assert worker.missing == PER_ROUND, "half of them may be those that answer first because they lie"
    learn(9)
    make_ready(worker)
    settings = FederateSettings()
    sizes = {n: buffer_size(settings, n) for n in (0, 1, 2, 3, 4, 5, 6, 8, 20, 100, 127, 1000)}
    wanted = {0: 2, 1: 2, 2: 2, 3: 3, 4: 3, 5: 3, 6: 4, 8: 5, 20: 11, 100: 51, 127: 64, 1000: 64}
    assert sizes == wanted
    alone = msgspec.structs.replace(settings, min_devices=1)
    assert (buffer_size(alone, 1), buffer_size(alone, 5)) == (1, 3)
    given = msgspec.structs.replace(settings, buffer=2)
    assert (buffer_size(given, 1), buffer_size(given, 20)) == (2, 2)


def test_a_round_takes_what_it_may_and_the_others_wait_for_the_next(
    vault: Vault, opened: Callable[[], Worker], learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = opened()
    ids = [learn(seed)[0] for seed in range(4)]
    sizes = {delta.delta_id: delta.size_bytes for delta in vault.deltas.waiting(worker._base.line_id)}
    order = [delta.delta_id for delta in vault.deltas.waiting(worker._base.line_id)]
    monkeypatch.setattr("clawloop_server.trainer.joining.MOST_DELTAS", 3)
    assert [one.facts.delta_id for one in worker._waiting("")] == order[:3]
    room = IN_MEMORY * sum(sizes[name] for name in order[:3]) - 1
    monkeypatch.setattr("clawloop_server.trainer.joining.free_bytes", lambda device: float(room))
    assert [one.facts.delta_id for one in worker._waiting("")] == order[:2], "the third does not fit"
    monkeypatch.setattr("clawloop_server.trainer.joining.free_bytes", lambda device: 0.0)
    assert len(worker._waiting("")) == 2, "too little memory for two is no reason to wait for ever"
    assert worker.run().deltas == 2
    assert {d.delta_id for d in vault.deltas.waiting(worker._base.line_id)} == set(ids) - set(order[:2])


def test_a_replaced_delta_is_not_joined_and_its_device_counts_once(
    vault: Vault, opened: Callable[[], Worker], learn: Any
) -> None:
    worker = opened()
    old, device, _ = learn(1)
    new, _, _ = learn(2, device=device)
    assert worker.missing == PER_ROUND
    learn(3)
    report = worker.run()
    used = {d.delta_id for d in vault.deltas.of_round(report.round_id)}
    assert new in used
    assert old not in used


def test_poison_that_got_by_the_door_and_foreign_layers_are_refused_alone(
    vault: Vault, base: Base, opened: Callable[[], Worker], learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.vault.delta_intake.is_finite", lambda weights, tensor: True)
    worker = opened()
    good = [learn(seed)[0] for seed in (1, 2)]
    delta = make_delta(base.shape, base.line_id, seed=3, targets=TARGETS)
    tensors = load(delta.weights)
    next(iter(tensors.values()))[0, 0] = np.nan
    poisoned = send_delta(vault, _device(vault, learn), with_tensors(delta, tensors))
    report = worker.run()
    assert (report.state, report.deltas) == (RoundState.PASSED, 2)
    fates = {d.delta_id: (d.state, d.reason) for d in vault.deltas.of_round(report.round_id)}
    assert fates[poisoned][0] is DeltaState.LEFT_OUT
    assert "infinite" in fates[poisoned][1]
    assert {fates[name][0] for name in good} == {DeltaState.JOINED}
    weights = load(worker._registry.files(1)[WEIGHTS_FILE])
    assert all(np.isfinite(tensor).all() for tensor in weights.values())


def test_layers_that_the_adapter_has_not_are_named(
    home: Home, vault: Vault, keys: ServerKeys, learn: Any, base: Base
) -> None:
    configure(home, train=TRAIN | {"target_modules": ["q_proj"]}, federate=PLAIN)
    worker = Worker.open(home)
    learn(1, targets=("v_proj",))
    learn(2, targets=("v_proj",))
    report = worker.run()
    assert (report.state, report.version) == (RoundState.FAILED, None)
    assert "target_modules" in report.reason
    assert states(vault, base.line_id) == {"left out": 2}
    assert worker.missing == PER_ROUND
    worker.close()

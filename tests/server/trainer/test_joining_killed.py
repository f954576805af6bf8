"""kill -9 in the middle of joining: the adapter comes out as if nothing had happened, and each delta is used once."""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys, load_master_key
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.joining import Joining
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared.messages import ForgetRequest
from clawloop_shared.records import Signal, Step

from ..made_deltas import make_delta, send_delta
from .filled import PER_ROUND, adapters, configure, fill

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]
PLACES: list[tuple[Any, str, bool]] = [
    (Registry, "start_round", True),  # in the transaction that notes the round
    (Joining, "into", False),
    (Joining, "into", True),  # the engine is at the joined adapter
    (Registry, "record_candidate", True),  # in the transaction that records
    (Joining, "settle", True),
    (Registry, "finish_round", True),
    (Worker, "_prune", True),  # it is recorded
]
"""what is killed: the first call in a process, before it does anything or after all"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch loaded")


def make_one(folder: Path) -> None:
    """What the trainer's process does, until there is an adapter."""
    worker = Worker.open(Home(folder))
    while not worker._registry.adapters():
        assert worker.missing == 0
        worker.run()
    worker.close()
    os._exit(0)


def die_at(folder: Path, place: int) -> None:
    owner, name, after = PLACES[place]
    method = getattr(owner, name)

    def call(*values: Any, **named: Any) -> Any:
        if after:
            method(*values, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    if owner is Worker:  # it is called at the start of each, too
        worker = Worker.open(Home(folder))
        setattr(owner, name, call)
        worker.run()
    setattr(owner, name, call)
    make_one(folder)


def fork(run: Callable[..., None], *values: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=run, args=values)
    child.start()
    child.join()
    return child.exitcode


def fates(folder: Path) -> list[tuple[str, str]]:
    home = Home(folder)
    vault = Vault.open(home, load_master_key(home))
    try:
        return vault.database.rows("SELECT delta_id, state FROM deltas ORDER BY 1")
    finally:
        vault.close()


@pytest.mark.parametrize("kind", ["alone", "mixed"])
def test_a_kill_anywhere_in_a_joined_round_changes_nothing_of_it(
    home: Home,
    keys: ServerKeys,
    vault: Vault,
    base: Base,
    add_device: Callable[..., str],
    make_step: MakeStep,
    make_signal: MakeSignal,
    tmp_path: Path,
    kind: str,
) -> None:
    configure(home, federate={"robust": "mean"})
    if kind == "mixed":
        fill(vault, add_device(), count=PER_ROUND, make_step=make_step, make_signal=make_signal)
    for seed in range(3):
        delta = make_delta(base.shape, base.line_id, seed=seed, scale=0.03)
        assert send_delta(vault, add_device(), delta, item_id=f"item {seed}", now_ms=1000 + seed)
    vault.close()
    copies = [tmp_path / f"killed {place}" for place in range(len(PLACES))]
    for copy in copies:
        shutil.copytree(home.folder, copy, symlinks=True)
    assert fork(make_one, home.folder) == 0
    assert {state for _, state in fates(home.folder)} == {"joined"}
    for place, copy in enumerate(copies):
        assert fork(die_at, copy, place) == -signal.SIGKILL, PLACES[place]
        assert fork(make_one, copy) == 0
        assert adapters(copy) == adapters(home.folder), PLACES[place]
        assert fates(copy) == fates(home.folder), PLACES[place]


def test_what_was_forgotten_while_the_trainer_was_dead_is_in_no_adapter(
    home: Home, keys: ServerKeys, vault: Vault, base: Base, add_device: Callable[..., str]
) -> None:
    configure(home, federate={"robust": "mean"})
    devices = [add_device() for _ in range(3)]
    ids = [
        send_delta(vault, device, make_delta(base.shape, base.line_id, seed=seed), item_id="item", now_ms=1000 + seed)
        for seed, device in enumerate(devices)
    ]
    assert fork(die_at, home.folder, 2) == -signal.SIGKILL
    asked = ForgetRequest(request_id="r", device_id=devices[1], at_ms=1, record_ids=["item"])
    assert vault.forget(asked).adapters == []
    assert fork(make_one, home.folder) == 0
    assert dict(fates(home.folder)) == {ids[0]: "joined", ids[2]: "joined"}

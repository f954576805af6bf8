"""kill -9 at any point of a run of rounds, again and again: the adapters come out as if nothing had happened."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import torch

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys, load_master_key
from clawloop_server.release.registry import Registry
from clawloop_server.trainer import checkpoint
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.running import RunningRound
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.pins import Pins
from clawloop_server.vault.settings import RewardSettings
from clawloop_server.vault.store import Vault
from clawloop_shared import files
from clawloop_shared.records import Signal, Step, Target

from .filled import TRAIN, adapters, configure, fill, send

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]
KILLS = 20
FRESH = 2
"""of these, of a process that was started from its command line"""
PER_ROUND = 6
MOST_ROUNDS = 16
TASK = {"messages": [{"role": "user", "content": "hi"}], "expect": {"calls": [], "answer_names": "hello"}}
PLACES: list[tuple[Any, str, int, bool]] = [
    (Pins, "take", 1, True),  # in the transaction that pins
    (Pins, "plan", 1, True),  # in the transaction that plans
    (TrainEngine, "forward_backward", 2, True),  # the gradients are there
    (TrainEngine, "optim_step", 1, True),
    (checkpoint, "publish", 2, False),
    (os, "fsync", 3, False),  # a checkpoint is written and not renamed
    (files, "sync_folder", 2, False),  # it is renamed, its folder not synced
    (Registry, "record_candidate", 1, True),  # in the transaction that records
    (Vault, "consume", 1, True),
    (Registry, "finish_round", 1, True),
    (RunningRound, "ended", 1, False),  # it is recorded, and what it could go on from is still there
    (Worker, "_prune", 1, False),
]
"""what is killed: the call of that number in a process, before it does anything or after all"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch loaded")


@pytest.fixture
def filled(
    home: Home, keys: ServerKeys, vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal
) -> Home:
    """A home with data for all rounds and a gate; nothing has it open."""
    (home.folder / "tasks.jsonl").write_text(json.dumps(TASK))
    gate: dict[str, object] = {"tasks": "tasks.jsonl", "samples": 2, "max_tokens": 4}
    configure(home, train=TRAIN | {"updates_per_round": 2}, gate=gate)
    fill(vault, device, count=MOST_ROUNDS * PER_ROUND, make_step=make_step, make_signal=make_signal)
    vault.close()
    return home


# in a process of its own


def make_rounds(folder: Path, rounds: int) -> None:
    """What the trainer's process does, until there are so many adapters."""
    worker = Worker.open(Home(folder))
    while len(worker._registry.adapters()) < rounds:
        assert worker.missing == 0
        worker.run()
    worker.close()
    os._exit(0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_calls(folder: Path, said: Any) -> None:
    """Say how many calls of Python functions a round takes."""
    found = [0]

    def count(frame: FrameType, event: str, argument: object) -> None:
        found[0] += event == "call"

    worker = Worker.open(Home(folder))
    sys.setprofile(count)
    worker.run()
    sys.setprofile(None)
    said.send(found[0])
    os._exit(0)


def arm(start: Callable[[], None], *, once_moved: bool) -> None:
    """Have `start` called before the first round; or, if `once_moved`, when an update or a round is behind it."""

    def wrap(owner: type, name: str, *, after: bool) -> None:
        method = getattr(owner, name)

        def call(*values: Any, **named: Any) -> Any:
            if not after:
                start()
            result = method(*values, **named)
            if after:
                start()
            return result

        setattr(owner, name, call)

    if not once_moved:
        return wrap(Worker, "run", after=False)
    wrap(RunningRound, "_keep", after=True)
    wrap(RunningRound, "ended", after=True)
    return None


def die_after_calls(folder: Path, calls: int, *, once_moved: bool) -> None:
    """Make rounds, and die in the call of any Python function of that number."""
    left = [calls]

    def count(frame: FrameType, event: str, argument: object) -> None:
        left[0] -= event == "call"
        if left[0] <= 0:
            die()

    arm(lambda: sys.setprofile(count), once_moved=once_moved)
    make_rounds(folder, MOST_ROUNDS)


def die_at(folder: Path, place: int, *, once_moved: bool) -> None:
    """Make rounds, and die at one of `PLACES`."""
    owner, name, time, after = PLACES[place]
    method, armed, seen = getattr(owner, name), [False], [0]

    def call(*values: Any, **named: Any) -> Any:
        seen[0] += armed[0]
        if armed[0] and seen[0] == time and not after:
            die()
        result = method(*values, **named)
        if armed[0] and seen[0] == time:
            die()
        return result

    setattr(owner, name, call)
    arm(lambda: armed.__setitem__(0, True), once_moved=once_moved)
    make_rounds(folder, MOST_ROUNDS)


# beside it


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Vault, Registry]]:
    home = Home(folder)
    vault = Vault.open(home, load_master_key(home), settings=RewardSettings(settle_s=0, group_timeout_s=0))
    try:
        yield vault, Registry(vault.database, home.adapters)
    finally:
        vault.close()


def fork(run: Callable[..., None], *values: Any, **named: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=run, args=values, kwargs=named)
    child.start()
    child.join()
    return child.exitcode


def start_and_kill(folder: Path) -> None:
    """Start the trainer's own process, and kill it once it has told of a second update."""
    command = [sys.executable, "-m", "clawloop_server.trainer.process", "--home", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        updates = 0
        while updates < 2:
            line = process.stdout.readline()
            assert line, "it ended by itself"
            updates += msgspec.json.decode(line).get("event") == "update"
        process.kill()


def died_within_round(folder: Path, line_id: str) -> bool:
    """Whether another death, without an update between, could be one more in the same update."""
    with opened(folder) as (_, registry):
        found = registry.under_way(line_id)
        return found is not None and bool(found.deaths or found.at_update is not None)


def last_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The checkpoint of the newest adapter."""
    with opened(folder) as (_, registry):
        name = registry.adapters()[0].facts.round_id
    tensors, text = checkpoint.read_checkpoint(folder / "trainer" / f"{name}.safetensors")
    return tensors, msgspec.json.decode(text)


def test_twenty_kills_at_any_point_of_several_rounds_leave_the_same_adapters(
    filled: Home, tmp_path: Path, device: str, base: Base, make_step: MakeStep, make_signal: MakeSignal
) -> None:
    """Between them late words and steps come on what the round has, and new trajectories."""
    folder, counted = tmp_path / "killed", tmp_path / "counted"
    for copy in (folder, counted):
        shutil.copytree(filled.folder, copy, symlinks=True)

    def news(n: int) -> None:
        with opened(folder) as (vault, registry):
            found = registry.under_way(base.line_id)
            pinned = [pin.trajectory_id for pin in vault.pins.of(found.round_id)] if found else []
            for trajectory in vault.pins.read(pinned[:2]):
                step = trajectory.steps[0]
                late = make_step(run_id=step.run_id, group_id=step.group_id, group_size=step.group_size)
                said = make_signal(Target.RUN, step.run_id, -1.0, created_ms=99)
                send(vault, device, steps=[late], signals=[said])
            run_id = f"new {n}"
            send(vault, device, steps=[make_step(run_id=run_id)], signals=[make_signal(Target.RUN, run_id)])

    heard, said = multiprocessing.get_context("fork").Pipe(duplex=False)
    assert fork(count_calls, counted, said) == 0
    calls, rng = heard.recv(), random.Random(7)
    kinds = [*range(len(PLACES)), *["calls"] * (KILLS - FRESH - len(PLACES)), *["fresh"] * FRESH]
    rng.shuffle(kinds)
    for n, kind in enumerate(kinds):
        once_moved = died_within_round(folder, base.line_id)
        if kind == "fresh":
            start_and_kill(folder)
        elif kind == "calls":
            assert fork(die_after_calls, folder, rng.randrange(1, calls), once_moved=once_moved) == -signal.SIGKILL
        else:
            assert fork(die_at, folder, kind, once_moved=once_moved) == -signal.SIGKILL, PLACES[kind]
        news(n)

    with opened(folder) as (_, registry):
        rounds = len(registry.adapters()) + 1
    assert 4 < rounds <= MOST_ROUNDS
    assert fork(make_rounds, folder, rounds) == 0
    assert fork(make_rounds, filled.folder, rounds) == 0
    assert len(adapters(folder)) == 2 * rounds
    assert adapters(folder) == adapters(filled.folder)
    (mine, text), (whole, wanted) = last_state(folder), last_state(filled.folder)
    assert text == wanted
    assert mine.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in mine.items())
    with opened(folder) as (vault, registry):
        found = registry.rounds()
        assert len(found) == rounds
        assert sum(round.attempts for round in found) > rounds + KILLS // 2
        assert all(round.metrics["set_aside"] == {} for round in found)
        lineages = [sorted(vault.lineage(round.round_id)) for round in found]
    with opened(filled.folder) as (vault, registry):
        assert lineages == [sorted(vault.lineage(round.round_id)) for round in registry.rounds()]
    assert not list((folder / "trainer").glob("running*"))

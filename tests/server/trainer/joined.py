"""Homes, trainers and deltas for tests of joined rounds."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.numpy import load
from torch import Tensor

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.trainer.joining import PREFIX
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import SumDeltas
from clawloop_shared.deltas import A, B, LoraDelta, Method
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.messages import ForgetRequest
from clawloop_shared.records import Signal, Step

from ..made_deltas import make_delta, send_delta
from .filled import TRAIN, configure

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]
Send = Callable[..., str]
PLAIN: dict[str, object] = {"robust": "mean", "max_norm": math.inf, "duplicate_cosine": 2.0, "cohorts": "off"}
"""no defence, so that the joined update is the weighted mean"""
TARGETS = ("q_proj", "v_proj", "down_proj")
SCALE = 16.0 / 2
"""alpha / rank of the server's adapter"""


@pytest.fixture
def joined_home(home: Home, keys: ServerKeys, vault: Vault) -> Home:
    """A home whose adapter has rank enough to lose nothing in a cut of a few deltas."""
    configure(home, train=TRAIN | {"rank": 16, "alpha": 128.0}, federate=PLAIN)
    return home


@pytest.fixture
def opened(joined_home: Home) -> Iterator[Callable[[], Worker]]:
    """Opens trainers on it, one after the other."""
    found = list[Worker]()

    def another() -> Worker:
        found.append(Worker.open(joined_home))
        return found[-1]

    yield another
    for worker in found:
        worker.close()


@pytest.fixture
def learn(vault: Vault, base: Base, add_device: Callable[..., str]) -> Callable[..., tuple[str, str, LoraDelta]]:
    """Have a (new) device send a delta; its id, the device's, and the delta."""

    def send(seed: int, *, device: str = "", **fields: Any) -> tuple[str, str, LoraDelta]:
        device = device or add_device()
        given: dict[str, Any] = {"targets": TARGETS, "scale": 0.03} | fields
        delta = make_delta(base.shape, base.line_id, seed=seed, **given)
        return send_delta(vault, device, delta), device, delta

    return send


def dense(delta: LoraDelta, path: str) -> Tensor:
    """What a delta of both factors changes in a layer, as a whole matrix."""
    tensors = {name: torch.from_numpy(array.copy()).double() for name, array in load(delta.weights).items()}
    return delta.scale * tensors[path + B] @ tensors[path + A]


def served(files: dict[str, bytes], path: str, *, scale: float = SCALE) -> Tensor:
    """What an adapter of the registry does to a layer, as a whole matrix."""
    tensors = load(files[WEIGHTS_FILE])
    b, a = (torch.from_numpy(tensors[PREFIX + path + part].copy()).double() for part in (B, A))
    return scale * b @ a


def paths_of(base: Base) -> list[str]:
    return [path for path in base.shape.linears() if path.rsplit(".", 1)[1] in TARGETS]


def parts_of(worker: Worker, round_id: str) -> dict[str, float]:
    """What each update of a joined round was multiplied with, as its account says."""
    shares = worker._registry.round(round_id).metrics["joined"]["shares"]
    return {s["source"]: s["weight"] * s["cut_to"] / s["norm"] for s in shares}


def states(vault: Vault, line_id: str) -> dict[str, int]:
    return vault.deltas.counts(line_id)


def make_ready(worker: Worker) -> None:
    assert worker.missing == 0


def _hash(worker: Worker, version: int) -> str:
    files = worker._registry.adapter(version).facts.files
    return next(entry.sha256 for entry in files if entry.name == WEIGHTS_FILE)


def _all(vault: Vault) -> list[Any]:
    devices = [row[0] for row in vault.database.rows("SELECT DISTINCT device_id FROM deltas")]
    return [delta for device in devices for delta in vault.deltas.of_device(device)]


def let_deltas_out(vault: Vault, device: str) -> None:
    with vault.database.write() as database:
        database.run("UPDATE devices SET level = ? WHERE device_id = ?", [Level.DELTAS, device])


def _device(vault: Vault, learn: Any) -> str:
    """A new device that has sent nothing that waits."""
    delta_id, device, _ = learn(99)
    vault.deltas.outdate(delta_id, "only its device is needed")
    return str(device)


def forget_all(vault: Vault, device: str) -> list[int]:
    request = ForgetRequest(request_id=new_id(), device_id=device, at_ms=1, everything=True)
    return vault.forget(request).adapters


def add_sum(vault: Vault, base: Base, members: list[str]) -> None:
    """Have what these devices learned wait as one sum."""
    delta = make_delta(base.shape, base.line_id, seed=1, targets=TARGETS, method=Method.FFA, trajectories=9)
    sum_id = new_id()
    with vault.database.write() as database:
        fields = [sum_id, "task", base.line_id, "done", "", "", 1]
        database.run(
            "INSERT INTO secure_sums (sum_id, task_id, line_id, status, phase, reason, began_ms)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            fields,
        )
        for member in members:
            sql = "INSERT INTO secure_members (sum_id, device_id) VALUES (?, ?)"
            database.run(sql, [sum_id, member])
        assert SumDeltas(database, vault._seals)(sum_id, delta, dict.fromkeys(members, "item")) == ""

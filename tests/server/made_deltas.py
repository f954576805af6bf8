"""Deltas as devices send them, with random numbers in them."""

from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save

from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.deltas import DELTA_KIND, LoraDelta, Method, delta_shapes
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.messages import UploadItem

Tensors = dict[str, Any]


def make_delta(
    shape: ModelShape,
    line_id: str,
    *,
    seed: int = 0,
    rank: int = 2,
    method: Method = Method.LORA,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    scale: float = 0.1,
    **fields: Any,
) -> LoraDelta:
    """A delta of that shape; `fields` are those of `LoraDelta`."""
    rng = np.random.default_rng(seed)
    shapes = delta_shapes(targets, shape, rank=rank, method=method)
    tensors = {name: (scale * rng.standard_normal(size)).astype("<f4") for name, size in shapes.items()}
    given: dict[str, Any] = {
        "task_id": "task",
        "level": Level.DELTAS,
        "alpha": 4.0,
        "trajectories": 5,
        "base_version": 0,
    } | fields
    return LoraDelta(line_id=line_id, method=method, rank=rank, target_modules=targets, weights=save(tensors), **given)


def with_tensors(delta: LoraDelta, tensors: Tensors) -> LoraDelta:
    return msgspec.structs.replace(delta, weights=save(tensors))


def item_of(delta: LoraDelta, item_id: str = "") -> UploadItem:
    return UploadItem(item_id=item_id or new_id(), receipt_id="r", kind=DELTA_KIND, body=wire.encode(delta))


def send_delta(vault: Vault, device: str, delta: LoraDelta, *, item_id: str = "", now_ms: int | None = None) -> str:
    """Have the vault receive it; the id that it has there, if it is kept."""
    before = {d.delta_id for d in vault.deltas.of_device(device)}
    vault.receive(device, [item_of(delta, item_id)], now_ms=now_ms)
    new = {d.delta_id for d in vault.deltas.of_device(device)} - before
    return new.pop() if new else ""

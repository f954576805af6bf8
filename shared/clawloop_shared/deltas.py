"""What a server asks a device to learn at home, and what comes of it: tasks and LoRA deltas, with their rules.

The adapter that the device serves stays as it is beneath; what is learned is another LoRA beside it, whose update of a
linear layer is `alpha / rank * B A` with A (rank, inputs) and B (outputs, rank). Which of the two factors a device
learns, and sends, is the task's method. Knows no tensor library; formats: docs/formats/deltas.md.
"""

import math
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.levels import Level
from clawloop_shared.lora import LINEARS, MAX_RANK, ModelShape
from clawloop_shared.objective import LossSettings, loss_rules
from clawloop_shared.safetensors_header import TensorInfo, read_header

DELTA_KIND = "delta.v1"
"""of an outbox item whose body is a `LoraDelta`"""
MAX_DELTA_BYTES = 1 << 30
MAX_TRAJECTORIES = 1 << 20
MAX_ALPHA = 4096.0
A, B = ".lora_A.weight", ".lora_B.weight"
"""a tensor is named by the full path of its linear layer and one of these"""
FLOATS = frozenset({"F32", "F16", "BF16"})

_Version = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_Id = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z._-]{1,128}\Z")]
_Count = Annotated[int, Meta(ge=1, le=1 << 16)]
_Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Meta(gt=0, le=MAX_ALPHA)]
_Rate = Annotated[float, Meta(gt=0, le=1)]
_Size = Annotated[float, Meta(ge=0, le=1e6)]


class Method(StrEnum):
    """Which factors are learned."""

    LORA = "lora"
    """both, from B = 0 and an A drawn from the task's seed; any rank and alpha that the device likes"""
    FFA = "ffa"
    """B, from 0; A is drawn from the task's seed, the same on all devices (FFA-LoRA, https://arxiv.org/abs/2403.12313)"""
    ROLORA_B = "rolora-b"
    """B's change, from 0; A is the served adapter's, with its rank (RoLoRA, https://arxiv.org/abs/2409.02346)"""
    ROLORA_A = "rolora-a"
    """A's change, from 0; B is the served adapter's"""

    @property
    def learns_a(self) -> bool:
        """Whether A is sent."""
        return self in (Method.LORA, Method.ROLORA_A)

    @property
    def learns_b(self) -> bool:
        """Whether B is sent."""
        return self is not Method.ROLORA_A

    @property
    def is_linear(self) -> bool:
        """Whether the update is a linear function of what is sent, so that sums and noise of it make sense."""
        return self is not Method.LORA


class LearnTask(msgspec.Struct, frozen=True, kw_only=True, tag="learn-task.v1"):
    """What to learn, from which adapter, and how. The device keeps to its own limits where these are tighter.

    `weights_sha256` names the weights file of adapter `base_version` (empty: there is none yet). `clip` bounds the L2
    norm of all that a noised delta sends together, `sigma` is the least noise, in units of it; without noise `clip` is
    0. `secure`: noised deltas go into a sum that hides each of them.
    """

    task_id: _Id
    line_id: _Id
    base_version: _Version
    weights_sha256: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")] = ""
    method: Method = Method.LORA
    rank: _Rank = 8
    alpha: _Alpha = 16.0
    target_modules: Annotated[tuple[str, ...], Meta(min_length=1, max_length=len(LINEARS))] = LINEARS
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    lr: _Rate = 5e-5
    updates: _Count = 5
    batch_trajectories: _Count = 16
    loss: LossSettings = LossSettings()
    reward_low: Annotated[float, Meta(ge=-1, le=1)] = -1.0
    reward_high: Annotated[float, Meta(ge=-1, le=1)] = 1.0
    clip: _Size = 0.0
    sigma: _Size = 0.0
    secure: bool = False


def task_rules(task: LearnTask) -> dict[str, bool]:
    """What must hold of a task's numbers, beyond their own bounds (which what is no number slips through), by what to
    say where it does not."""
    sizes = {"lr": task.lr, "alpha": task.alpha, "clip": task.clip, "sigma": task.sigma}
    return {
        f"reward_low {task.reward_low} is not below reward_high {task.reward_high}": task.reward_low < task.reward_high,
        **{f"{name} is {size}": math.isfinite(size) for name, size in sizes.items()},
        **{f"its loss: {rule}": holds for rule, holds in loss_rules(task.loss).items()},
    }


class LearnReply(msgspec.Struct, frozen=True, kw_only=True, tag="learn-reply.v1"):
    """Whether the device will learn that, when it can; if not, why (naming no content)."""

    task_id: str
    accepted: bool
    reason: Annotated[str, Meta(max_length=300)] = ""


class LoraDelta(msgspec.Struct, frozen=True, kw_only=True, tag=DELTA_KIND):
    """What a device learned, or a noised sum member of it. `weights` is a safetensors file of the learned factors in
    PEFT's layout, under the names of `A` and `B` above.

    `reward` is the mean reward of what was learned from, in [-1, 1]; none where the level does not let it out.
    """

    task_id: _Id
    line_id: _Id
    base_version: _Version
    weights_sha256: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")] = ""
    method: Method
    level: Level
    rank: _Rank
    alpha: _Alpha
    target_modules: Annotated[tuple[str, ...], Meta(min_length=1, max_length=len(LINEARS))]
    weights: bytes
    trajectories: Annotated[int, Meta(ge=1, le=MAX_TRAJECTORIES)]
    clip: _Size = 0.0
    sigma: _Size = 0.0
    reward: Annotated[float, Meta(ge=-1, le=1)] | None = None

    @property
    def scale(self) -> float:
        """What B·A is multiplied with."""
        return float(self.alpha / self.rank)


def delta_tensors(delta: LoraDelta, shape: ModelShape) -> dict[str, TensorInfo]:
    """The header of a delta's weights, if it has exactly the factors that its method sends of each target layer.

    Values are checked elsewhere: that they are finite needs a tensor library.

    Raises:
        AdapterInvalid: a tensor is missing, unknown, or of another shape or type.
    """
    found = read_header(delta.weights, max_bytes=MAX_DELTA_BYTES)
    wanted = delta_shapes(delta.target_modules, shape, rank=delta.rank, method=delta.method)
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise AdapterInvalid(f"delta {delta.task_id}: tensors {odd[:2]} are missing or unknown for {delta.method}")
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS or tensor.shape != wanted[name]:
            raise AdapterInvalid(
                f"delta {delta.task_id}: {name} is {tensor.dtype} {tensor.shape}, must be a float of {wanted[name]}"
            )
    return found


def delta_shapes(
    targets: tuple[str, ...], shape: ModelShape, *, rank: int, method: Method
) -> dict[str, tuple[int, int]]:
    """The tensors of a delta and their shapes, by name.

    Raises:
        AdapterInvalid: a target is no linear layer of this model.
    """
    unknown = sorted(set(targets) - set(shape.targets(targets)))
    if unknown:
        raise AdapterInvalid(f"target modules {unknown} are no linear layers of this model")
    wanted: dict[str, tuple[int, int]] = {}
    for path, (inputs, outputs) in shape.linears().items():
        if path.rsplit(".", 1)[1] in targets:
            wanted |= {path + A: (rank, inputs)} if method.learns_a else {}
            wanted |= {path + B: (outputs, rank)} if method.learns_b else {}
    return wanted

"""What a simulated device says that it learned: random numbers of the right names and sizes.

All that are asked the same have a part in common, so that a round finds something to agree on, and each a part of its
own, so that none is taken for a copy of another.
"""

import numpy as np
from safetensors.numpy import save

from clawloop_shared.deltas import LearnTask, LoraDelta, delta_shapes
from clawloop_shared.levels import Level
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, ModelShape, expected_tensors, parse_config

_SIZE, _OWN = 0.01, 0.5
_CONFIG = (
    b'{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": true,'
    b' "r": 8, "lora_alpha": 16.0,'
    b' "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}'
)


def made_delta(task: LearnTask, shape: ModelShape) -> LoraDelta:
    """An answer to that task.

    Raises:
        AdapterInvalid: the task is for another model.
    """
    common, own = np.random.default_rng(task.seed), np.random.default_rng()
    tensors = {
        name: (_SIZE * (common.standard_normal(size) + _OWN * own.standard_normal(size))).astype("<f4")
        for name, size in delta_shapes(task.target_modules, shape, rank=task.rank, method=task.method).items()
    }
    return LoraDelta(
        task_id=task.task_id,
        line_id=task.line_id,
        base_version=task.base_version,
        weights_sha256=task.weights_sha256,
        method=task.method,
        level=Level.DELTAS,
        rank=task.rank,
        alpha=task.alpha,
        target_modules=task.target_modules,
        weights=save(tensors),
        trajectories=task.batch_trajectories,
    )


def made_adapter(shape: ModelShape) -> dict[str, bytes]:
    """The files of an adapter that the trainer can go on from, of small random numbers."""
    draw = np.random.default_rng()
    tensors = {
        name: (_SIZE * draw.standard_normal(size)).astype("<f4")
        for name, size in expected_tensors(parse_config(_CONFIG), shape).items()
    }
    return {CONFIG_FILE: _CONFIG, WEIGHTS_FILE: save(tensors)}

"""From a job to its updates: the model is loaded, the adapter and what is learned are put on it, the memory is shared
out. Imports MLX; runs in the process that learns."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from clawloop_edge.child import held_bytes
from clawloop_edge.engine.memory import ModelSizes, model_sizes
from clawloop_edge.errors import LearnFailed
from clawloop_edge.learn import attention, model
from clawloop_edge.learn.job import Job
from clawloop_edge.learn.lora import Learner, first_factors, serving
from clawloop_edge.learn.memory import STATE_COPIES, sample_bytes
from clawloop_edge.learn.model import LearningModel
from clawloop_edge.learn.updates import Progress, Updates, fingerprint, plan_of
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.model_line import read_config, read_shape

_CACHE_PART = 8
"""of the memory, what MLX may keep for later"""


def open_job(job: Job, *, kept: bytes, memory_bytes: int) -> Updates:
    """A job, at its start or where the state `kept` is; a state of another job is not gone on from.

    Raises:
        LearnFailed: the model does not fit `memory_bytes` (0: no limit), or nothing can be learned from.
        AdapterInvalid, ConfigError: the adapter or the model folder is not usable.
    """
    _check_adapter(job)
    own_bytes = held_bytes()
    if memory_bytes:
        mx.set_memory_limit(memory_bytes)
        mx.set_cache_limit(memory_bytes // _CACHE_PART)
    config = read_config(job.model)
    vocabulary = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    base = _load(job.model)
    factors = first_factors(job.task, read_shape(job.model), rank=job.rank, adapter=job.adapter)
    served = serving(base, job.adapter)
    learner = Learner(served, factors, scale=job.task.alpha / job.rank)
    arrays = [array for _, array in tree_flatten(learner.model.parameters())]
    fixed = own_bytes + sum(array.nbytes for array in arrays) + STATE_COPIES * factors.size_bytes
    sizes = model_sizes(config, dtype_bytes=_dtype_bytes(arrays))
    room = memory_bytes - fixed - memory_bytes // _CACHE_PART
    if memory_bytes and room < _need(sizes, (2, 1)):
        raise LearnFailed(
            f"the model and what is learned take {fixed} bytes, and learning may take {memory_bytes}; raise [learn]"
            " max_memory_bytes, or lower max_rank"
        )
    learning = LearningModel(base, learner, vocabulary=vocabulary)
    plan = plan_of(job, vocabulary=vocabulary, fits=lambda size: not memory_bytes or _need(sizes, size) <= room)
    progress = _progress(kept, fingerprint(job))
    return Updates(job, plan, learning, learned=factors.learned, progress=progress)


def _check_adapter(job: Job) -> None:
    if job.adapter and not {CONFIG_FILE, WEIGHTS_FILE} <= job.adapter.keys():
        raise LearnFailed(f"the adapter has files {sorted(job.adapter)}, needs {CONFIG_FILE} and {WEIGHTS_FILE}")
    found = hashlib.sha256(job.adapter[WEIGHTS_FILE]).hexdigest() if job.adapter else ""
    if found != job.task.weights_sha256:
        raise LearnFailed(
            f"task {job.task.task_id} begins at weights {job.task.weights_sha256 or 'none'}, and this device has"
            f" {found or 'none'} for version {job.task.base_version}; wait for the next task"
        )


def _load(folder: Path) -> Any:
    try:
        base, _ = load_model(folder)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise LearnFailed(f"mlx-lm cannot load {folder}: {type(error).__name__}") from error
    base.eval()
    return base


def _dtype_bytes(arrays: Sequence[Any]) -> int:
    """Of the numbers that the model computes with: the narrowest float that most of its weights are kept in."""
    sizes: dict[int, int] = {}
    for array in arrays:
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype.size] = sizes.get(array.dtype.size, 0) + array.nbytes
    return max(sizes, key=lambda size: sizes[size])


def _need(sizes: ModelSizes, size: Sequence[int]) -> int:
    tokens, trained = size
    return sample_bytes(
        sizes, tokens=tokens, trained=trained, chunk_bytes=model.CHUNK_BYTES, block_bytes=attention.BLOCK_BYTES
    )


def _progress(kept: bytes, job: bytes) -> Progress:
    if kept:
        found = msgspec.msgpack.decode(kept, type=Progress)
        if found.job == job:
            return found
    return Progress(job=job)

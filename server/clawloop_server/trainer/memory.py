"""How many nodes a packed row may have, from the memory that is free; and what counts as having run out of it.

A row of n nodes needs about `fixed + per_token n + per_pair n^2` bytes beside the model. On CUDA the first two are
measured, by two trial rows forward and backward; elsewhere, where a peak cannot be measured, they are reckoned from
the model's shape: what a LoRA layer keeps for its backward pass, or its input alone if it is computed again.

`per_pair` is the dense mask. With it a row has at most `DENSE_NODES` nodes, and several trajectories in a row together
at most `DENSE_JOINED`; measured on tiny models on one core (seconds of CPU, forward and backward):

    nodes in a row at most                               1024   2048   8192
    one trajectory of 16 turns, append-only              1.94   1.28    .29
    the same with its history rewritten each turn        1.25    .78    .56
    24 calls that share a system prompt alone             .50    .47    .73
    12 trajectories that share one, joined               .46    .55    .83

Knows no engine, and no sample.
"""

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clawloop_server.trainer.head import CHUNK_BYTES

MOST_NODES = 65_536
"""longer rows are not faster, and an out-of-memory error then costs more work"""
LEAST_NODES = 256
DENSE_NODES = 8192
DENSE_JOINED = 1024
TRIALS = (1024, 3072)
_PART_USED = {"cuda": 0.85, "mps": 0.6, "cpu": 0.6}
_SLACK = 1.3
"""over what layers keep: what they hold while they compute"""


@dataclass(frozen=True)
class Need:
    """Bytes that a row of n nodes needs: fixed + per_token n + per_pair n^2."""

    fixed: float
    per_token: float
    per_pair: float = 0.0

    def nodes(self, free_bytes: float) -> int:
        """How many nodes fit; 0 if none does."""
        room = free_bytes - self.fixed
        if room <= 0:
            return 0
        # The positive root of per_pair n^2 + per_token n = room, in the form that has no division by per_pair.
        return int(2 * room / (self.per_token + math.sqrt(self.per_token**2 + 4 * self.per_pair * room)))


def row_budget(need: Need, *, free_bytes: float) -> int:
    """The most nodes of a row: what fits, in whole blocks, within bounds."""
    most = DENSE_NODES if need.per_pair else MOST_NODES
    return max(LEAST_NODES, min(most, need.nodes(free_bytes)) // 128 * 128)


def estimate(base: Any, *, checkpointing: bool, flex: bool) -> Need:
    """What a row needs by the shape of the model (a transformers causal LM, not wrapped)."""
    config, weight = base.config, base.get_input_embeddings().weight
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width
    used = getattr(config, "num_experts_per_tok", None) or 1
    inner = used * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    layers, item = config.num_hidden_layers, weight.element_size()
    # Inputs of the two norms, of four kinds of LoRA layers, of the products; queries and keys thrice for their norms
    # and their rotation.
    within = 6 * hidden + 6 * query + 6 * key + 4 * inner
    kept = layers * hidden + within if checkpointing else layers * within
    return Need(
        fixed=2.0 * CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"]),
        per_token=_SLACK * item * (kept + 4 * hidden),
        per_pair=0.0 if flex else item + 3.0,
    )


def measure(trial: Callable[[int], None], device: torch.device, *, estimated: Need) -> Need:
    """What `trial(n)`, a row of n nodes forward and backward, needs at its peak on a CUDA device. The mask's part stays
    as estimated, and all of it if the trials themselves run out of memory."""
    peaks = []
    try:
        trial(TRIALS[0])  # compiles, and takes what is kept from then on
        for nodes in TRIALS:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            trial(nodes)
            peaks.append(torch.cuda.max_memory_allocated(device) - before - estimated.per_pair * nodes**2)
    except torch.OutOfMemoryError:
        return estimated
    finally:
        release()
    return fitted(TRIALS, peaks, per_pair=estimated.per_pair)


def fitted(nodes: tuple[int, int], peaks: list[float], *, per_pair: float) -> Need:
    """The line through two peaks."""
    slope = (peaks[1] - peaks[0]) / (nodes[1] - nodes[0])
    per_token = max(slope, peaks[1] / nodes[1] / 2)  # a peak elsewhere may hide the slope; never take it for nothing
    return Need(fixed=max(0.0, peaks[1] - per_token * nodes[1]), per_token=per_token, per_pair=per_pair)


def free_bytes(device: torch.device) -> float:
    """What rows may use of what is free: not all, since others live here too and memory gets scattered."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = _free_ram()
    return _PART_USED[device.type] * free


def _free_ram(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the system says is available; half of the RAM where it does not say."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch's own class; CPU, MPS and CUDA's libraries say it in words
    alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = (
        "can't allocate memory",
        "not enough memory",
        "MPS backend out of memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()

"""How much arithmetic a step of LoRA on a frozen base needs at least, and how fast a device multiplies matrices.

A multiplication with an addition counts as two. Forward, a token costs 2 a weight of the linear maps. Backward it costs
another 2 for the gradient of the input and none for that of the weight, which is frozen: 4 a weight in all, not 6. The
first layer's q, k and v need no gradient of their input, which is the frozen embedding. The adapter's own weights cost
6. A pair of a token and one that it sees costs 4 a dimension and head forward (scores, values) and 8 backward. The head
costs 4 a weight, for trained tokens alone. What is computed again (checkpoints, chunks, flash attention) does not
count: it is no use to the one who waits.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from trainer_bench.shapes import ModelShape, Work

_QKV = 3


def useful_flops(shape: ModelShape, work: Work, *, rank: int) -> float:
    """Of forward and backward of `work`, with LoRA of `rank` on every linear map of every layer."""
    weights = shape.layers * sum(wide * narrow for wide, narrow in shape.linears)
    adapter = shape.layers * sum(rank * (wide + narrow) for wide, narrow in shape.linears)
    unneeded = sum(wide * narrow + rank * wide for wide, narrow in shape.linears[:_QKV])
    of_a_token = 4 * weights + 6 * adapter - 2 * unneeded
    of_a_pair = 12 * shape.layers * shape.heads * shape.head_dim
    of_a_trained = 4 * shape.vocab * shape.hidden
    return float(work.tokens * of_a_token + work.pairs * of_a_pair + work.trained * of_a_trained)


def matmul_rate(device: torch.device, *, size: int, seconds: float = 1.0) -> float:
    """Operations a second of square bfloat16 products of `size`: the median of those that fit into `seconds`."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(one, other)
    taken, began = list[float](), time.perf_counter()
    while not taken or time.perf_counter() - began < seconds:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(one, other)
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2.0 * size**3 / median(taken)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

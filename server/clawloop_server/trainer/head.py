"""Log-probabilities of given tokens under a frozen head, and their slope, without ever holding all logits.

With z = W h / T, the slope of log p(y) by h is (W_y - sum_v p_v W_v) / T: a vector of the width of h, known as soon as
the logits are. So the forward pass finds it chunk by chunk, and the backward pass is one product; no logits are kept or
computed again. (Gradients in the forward pass: Liger, https://arxiv.org/abs/2410.10989.) Exact, for any chunk.

At most `CHUNK_BYTES` of logits, with what is derived from them, exist at once. Logits and all that follows are float32
at least, also of a bfloat16 model: rounding them costs .06 nats at a logit of 20.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20, "mps": 256 << 20}
_UPCAST_ROWS = 8192


def chunk_rows(vocabulary: int, *, dtype: torch.dtype, device: str, entropy: bool) -> int:
    """How many positions go through the head at once: their logits, and as much again where entropy is asked for."""
    wide = torch.promote_types(dtype, torch.float32)
    copies = (2 if entropy else 1) * wide.itemsize + (dtype.itemsize if dtype != wide else 0)
    return max(1, CHUNK_BYTES.get(device, 128 << 20) // (vocabulary * copies))


def head_logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """logits_BV in float32 at least, summed in it too, without a float32 copy of the whole head; under autocast too."""
    with torch.autocast(weight_VD.device.type, enabled=False):
        return _logits(hidden_BD, weight_VD)


def _logits(hidden_BD: Tensor, weight_VD: Tensor) -> Tensor:
    if weight_VD.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.linear(hidden_BD, weight_VD)
    if weight_VD.device.type == "cuda":
        return torch.mm(hidden_BD, weight_VD.t(), out_dtype=torch.float32)
    logits_BV = hidden_BD.new_empty(len(hidden_BD), len(weight_VD), dtype=torch.float32)
    for at in range(0, len(weight_VD), _UPCAST_ROWS):
        part = slice(at, at + _UPCAST_ROWS)
        logits_BV[:, part] = hidden_BD.float() @ weight_VD[part].float().t()
    return logits_BV


def head_logprobs(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    target_P: Tensor,
    temperature_P: Tensor,
    *,
    entropy: bool = False,
    rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """logprobs_P of the targets, with gradient for `hidden_PD` alone, and entropy_P (no gradient) if asked for."""
    if rows is None:
        rows = chunk_rows(len(weight_VD), dtype=weight_VD.dtype, device=hidden_PD.device.type, entropy=entropy)
    logprobs_P, entropy_P = _Head.apply(hidden_PD, weight_VD, target_P, temperature_P, entropy, rows)  # type: ignore[no-untyped-call]
    return logprobs_P, entropy_P if entropy else None


class _Head(torch.autograd.Function):
    """Logprobs and entropies forward; backward the slopes that the forward pass found."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        target_P: Tensor,
        temperature_P: Tensor,
        entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_PD.dtype, torch.float32)
        logprobs_P, entropy_P = (hidden_PD.new_empty(len(target_P), dtype=wide) for _ in range(2))
        slope_PD = torch.empty_like(hidden_PD) if ctx.needs_input_grad[0] else None
        for at in range(0, len(target_P), rows):
            part = slice(at, at + rows)
            logprobs_P[part], entropy_P[part], slope = _chunk(
                hidden_PD[part],
                weight_VD,
                target_P[part],
                temperature_P[part],
                entropy=entropy,
                slope=slope_PD is not None,
            )
            if slope_PD is not None and slope is not None:
                slope_PD[part] = slope
        if slope_PD is not None:
            ctx.save_for_backward(slope_PD)
        ctx.mark_non_differentiable(entropy_P)
        return logprobs_P, entropy_P

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (slope_PD,) = ctx.saved_tensors
        return (outputs[0][:, None] * slope_PD).to(slope_PD.dtype), None, None, None, None, None


def _chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, temperature_C: Tensor, *, entropy: bool, slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprobs_C, entropy_C, slope_CD) of a chunk; entropy 0 and slope None where they are not asked for."""
    scores_CV = head_logits(hidden_CD, weight_VD).div_(temperature_C[:, None])
    scores_CV.sub_(scores_CV.amax(-1, keepdim=True))
    target_C1 = target_C[:, None]
    chosen_C = scores_CV.gather(-1, target_C1).squeeze(-1)
    parts_CV = scores_CV.exp() if entropy else scores_CV.exp_()
    total_C = parts_CV.sum(-1)
    entropy_C = torch.zeros_like(total_C)
    if entropy:
        mean_C = torch.bmm(parts_CV[:, None, :], scores_CV[:, :, None]).flatten() / total_C
        entropy_C = total_C.log() - mean_C
        del scores_CV
    logprobs_C = chosen_C - total_C.log()
    if not slope:
        return logprobs_C, entropy_C, None
    parts_CV.mul_(-1.0 / (total_C * temperature_C)[:, None])
    parts_CV.scatter_add_(-1, target_C1, (1.0 / temperature_C.to(parts_CV.dtype))[:, None])
    return logprobs_C, entropy_C, parts_CV.to(weight_VD.dtype) @ weight_VD

"""Who sees whom in a packed row, in the two forms that attention takes: a dense mask, or blocks for FlexAttention.

The rule is that of packing.py: node i attends to node j iff `j <= i < end[j]`. Blocks are found from `end` alone, in
memory and time O((T / 128)^2): of the blocks below the diagonal one is seen iff any of its nodes ends behind the first
node that looks, and seen whole iff all end behind the last one. Nothing of the size T x T exists.

A model is told once (`use_flex`); whatever comes without a block mask (generation with a cache) goes to torch's
scaled_dot_product_attention as ever. On CUDA FlexAttention is compiled, forward and backward, for any length by one
kernel; elsewhere the same operator runs in eager mode, which is exact and needs T x T scores: for checks, not speed.

Sources: FlexAttention, https://arxiv.org/abs/2412.05496; tree masks for shared prefixes: docs/training.md.
"""

import functools
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from clawloop_server.trainer.packing import PackedRow

NAME = "clawloop_flex"
BLOCK = 128
_SHORTEST = 2 * BLOCK
"""one block alone would be compiled for by itself, and less than one goes to another kernel"""
_MOST_APART = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
_log = logging.getLogger("clawloop.trainer")


def use_flex(base: Any) -> None:
    """Let a transformers model (not wrapped) attend by block masks from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)


def uses_flex(base: Any) -> bool:
    """Whether the model attends by block masks, so that a row's cost is what its nodes see."""
    return bool(base.config._attn_implementation == NAME)


def model_inputs(base: Any, row: PackedRow, *, dtype: torch.dtype) -> dict[str, Tensor | BlockMask | None]:
    """A row as what a transformers decoder takes: ids and positions (1, T or more), and who sees whom."""
    if not uses_flex(base):
        mask = None if row.is_causal else dense_bias(row, dtype)
        return {"input_ids": row.token_ids_T[None], "position_ids": row.positions_T[None], "attention_mask": mask}
    size = len(row.end_T)
    more = max(_SHORTEST, -(-size // BLOCK) * BLOCK) - size
    # What fills the last block sees itself alone, and nobody sees it.
    alone = torch.arange(size + 1, size + more + 1, device=row.end_T.device)
    pad = functools.partial(torch.nn.functional.pad, pad=(0, more))
    return {
        "input_ids": pad(row.token_ids_T)[None],
        "position_ids": pad(row.positions_T)[None],
        "attention_mask": block_mask(torch.cat([row.end_T, alone])),
    }


def dense_bias(row: PackedRow, dtype: torch.dtype) -> Tensor:
    """The mask (1, 1, T, T) as what is added to scores. As a bool, torch would convert it anew in each layer, forward
    and back."""
    sees_TT = row.sees_TT()
    return torch.zeros(sees_TT.shape, dtype=dtype, device=sees_TT.device).masked_fill_(~sees_TT, -torch.inf)[None, None]


def block_mask(end_T: Tensor) -> BlockMask:
    """The rule `j <= i < end[j]` over blocks of 128 x 128 nodes, from `end` alone."""
    size = len(end_T)
    count = -(-size // BLOCK)
    padded = torch.nn.functional.pad(end_T, (0, count * BLOCK - size)).view(count, BLOCK)
    first_K = torch.arange(count, device=end_T.device) * BLOCK
    below_QK = first_K[:, None] > first_K[None, :]
    # A block that reaches over the end has padding with end 0, so it counts as whole for nobody; the kernel need not
    # know where the row stops.
    whole_QK = below_QK & (padded.amin(1)[None, :] >= first_K[:, None] + BLOCK)
    seen_QK = below_QK & (padded.amax(1)[None, :] > first_K[:, None])
    part_QK = (seen_QK & ~whole_QK) | torch.eye(count, dtype=torch.bool, device=end_T.device)
    return BlockMask.from_kv_blocks(
        *_ordered(part_QK), *_ordered(whole_QK), BLOCK_SIZE=BLOCK, mask_mod=_rule(end_T), seq_lengths=(size, size)
    )


def _ordered(seen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries sees, and which, those first (1, 1, Q) and (1, 1, Q, K)."""
    which_QK = seen_QK.int().argsort(dim=-1, descending=True, stable=True)
    return seen_QK.sum(-1, dtype=torch.int32)[None, None], which_QK.int()[None, None]


def _rule(end_T: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    end_T = end_T.int()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    return sees


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (1, heads, T, width) to (1, T, heads, width).

    Raises:
        NotImplementedError: the model caps its scores or has sinks, which a block mask does not carry.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockMask):
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f'attention with {name} needs [train] attention = "dense"')
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return attend_by_blocks(query, key, value, attention_mask, scale=scale).transpose(1, 2).contiguous(), None


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float) -> Tensor:
    """FlexAttention of (1, heads, T, width); several heads of queries may share one of keys."""
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # kernels want a power of two
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.device.type == "cuda":
        found: Tensor = _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
        return found
    # The public function refuses gradients on other devices; the operator below it has them.
    eager = torch.ops.higher_order.flex_attention
    output: Tensor = eager(query, key, value, lambda score, *_: score, mask.as_tuple(), scale, {})[0]
    return output


@functools.cache
def _compiled() -> Any:
    """One kernel for all lengths. `fullgraph`, so that what cannot be compiled is an error and not slow in silence."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def why_not_flex(base: Any, *, device: torch.device, dtype: torch.dtype) -> str:
    """Why FlexAttention cannot be used for this model on this device; empty: it can, and agrees with dense attention.

    Compiles it, forward and backward, for the model's heads: half a minute on CUDA, once.
    """
    config = base.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        apart = max(_apart(size, heads, config.num_key_value_heads, width, device, dtype) for size in (256, 640))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return "" if apart <= _MOST_APART.get(dtype, 1e-6) else f"it is {apart:.3g} off dense attention (relative)"


def _apart(size: int, heads: int, kv_heads: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """How far FlexAttention is from dense attention on a forked row: output and gradients, relative to the largest."""
    generator = torch.Generator().manual_seed(size)
    shapes = ((1, heads, size, width), (1, kv_heads, size, width), (1, kv_heads, size, width))
    query, key, value = (torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)
    half = size // 2
    end_T = torch.full((size,), size, device=device)
    end_T[half // 2 : half] = half
    node = torch.arange(size, device=device)
    sees_TT = (node[None, :] <= node[:, None]) & (node[:, None] < end_T[None, :])
    weight = torch.randn(shapes[0], generator=generator).to(device, dtype)
    found = []
    for output in (
        attend_by_blocks(query, key, value, block_mask(end_T), scale=width**-0.5),
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sees_TT, enable_gqa=True),
    ):
        found.append([output.detach(), *torch.autograd.grad((output * weight).sum(), (query, key, value))])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))

"""Log-probabilities of the trained tokens of a packed row under a causal language model.

The decoder runs once over the row; the head runs only on the nodes that predict a trained token, in chunks that are
recomputed in the backward pass, so that no more than `chunk` rows of logits exist at once. Works for any transformers
causal LM whose layers all attend to the whole context (Qwen3, Llama, ...), bare or wrapped by peft.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clawloop_server.trainer.packing import PackedRow

CHUNK = 256


def score_row(model: Any, row: PackedRow, *, chunk: int = CHUNK, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """logprobs_P of the row's targets at their temperatures, and, if asked for, entropy_P (no gradient)."""
    hidden_PD = hidden_states(model, row)[row.predictor_P]
    head = bare(model).get_output_embeddings().weight
    logprobs, entropies = [], []
    parts = zip(*(torch.split(each, chunk) for each in (hidden_PD, row.target_P, row.temperature_P)), strict=True)
    for hidden, target, temperature in parts:
        inputs = (hidden, head, target, temperature, entropy)
        # A single chunk is held for the backward pass either way, so recomputing it would save nothing.
        many = len(row.target_P) > chunk and torch.is_grad_enabled()
        found = checkpoint(_head, *inputs, use_reentrant=False, preserve_rng_state=False) if many else _head(*inputs)
        logprobs.append(found[0])
        entropies.append(found[1])
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def hidden_states(model: Any, row: PackedRow) -> Tensor:
    """hidden_TD: the last hidden state of each node of the row."""
    mask = None if row.is_causal else _bias(row, next(model.parameters()).dtype)
    output = bare(model).get_decoder()(
        input_ids=row.token_ids_T[None],
        position_ids=row.positions_T[None],
        attention_mask=mask,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _bias(row: PackedRow, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores. As a bool, torch would convert it anew in each layer, forward and back."""
    sees_TT = row.sees_TT()
    return torch.zeros(sees_TT.shape, dtype=dtype, device=sees_TT.device).masked_fill_(~sees_TT, -torch.inf)[None, None]


def bare(model: Any) -> Any:
    """The transformers model inside peft's wrapper; its LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, temperature_C: Tensor, entropy: bool) -> Any:
    """(logprobs_C, entropy_C) of a chunk; logits in at least float32."""
    logits_CV = F.linear(hidden_CD, weight_VD)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)) / temperature_C[:, None]
    norm_C = logits_CV.logsumexp(-1)
    logprobs_C = logits_CV.gather(-1, target_C[:, None]).squeeze(-1) - norm_C
    if not entropy:
        return logprobs_C, logprobs_C.detach()
    with torch.no_grad():
        chances_CV = (logits_CV - norm_C[:, None]).exp()
        entropy_C = norm_C - (chances_CV * logits_CV).sum(-1)
    return logprobs_C, entropy_C

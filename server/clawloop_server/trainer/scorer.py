"""Log-probabilities of the trained tokens of a packed row under a causal language model.

The decoder runs once over the row; the head runs only on the nodes that predict a trained token, in chunks (head.py).
Works for any transformers causal LM whose layers all attend to the whole context (Qwen3, Llama, ...), bare or wrapped
by peft.
"""

from typing import Any

from torch import Tensor

from clawloop_server.trainer.attention import model_inputs
from clawloop_server.trainer.device import arithmetic
from clawloop_server.trainer.head import head_logprobs
from clawloop_server.trainer.packing import PackedRow


def score_row(
    model: Any, row: PackedRow, *, chunk: int | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """logprobs_P of the row's targets at their temperatures, and, if asked for, entropy_P (no gradient). `chunk`: how
    many positions go through the head at once; by default as many as its bytes allow."""
    hidden_PD = hidden_states(model, row)[row.predictor_P]
    head = bare(model).get_output_embeddings().weight
    return head_logprobs(hidden_PD, head, row.target_P, row.temperature_P, entropy=entropy, rows=chunk)


def hidden_states(model: Any, row: PackedRow) -> Tensor:
    """hidden_TD: the last hidden state of each node of the row."""
    base = bare(model)
    with arithmetic(base):
        inputs = model_inputs(base, row, dtype=base.get_input_embeddings().weight.dtype)
        output = base.get_decoder()(**inputs, use_cache=False)
    hidden: Tensor = output.last_hidden_state[0, : len(row.token_ids_T)]
    return hidden


def bare(model: Any) -> Any:
    """The transformers model inside peft's wrapper; its LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

"""What learning from one sample takes, and whether that fits. Arithmetic on sizes; imports no framework.

The coefficients are measured (docs/benchmarks.md, "Learning at home") and a third larger than what was found.
"""

from clawloop_edge.engine.memory import ModelSizes

HEAD_COPIES, BLOCK_COPIES, STATE_COPIES = 5, 8, 8
"""how often a chunk of logits, a block of attention scores, and the learned factors exist at a time: the last with
their gradients, AdamW's two moments, and the new ones of all of these"""


def sample_bytes(sizes: ModelSizes, *, tokens: int, trained: int, chunk_bytes: int, block_bytes: int) -> int:
    """What the gradient of one sample takes beside the model: the input of each layer, one layer with its gradients,
    a block of its attention, and a chunk of logits."""
    attention = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    layer = 12 * sizes.hidden + 16 * sizes.intermediate + 10 * attention
    block = max(4 * sizes.heads * tokens, min(block_bytes, 4 * sizes.heads * tokens * tokens))
    chunk = max(4 * sizes.vocab, min(chunk_bytes, 4 * sizes.vocab * trained))
    inputs = sizes.layers * sizes.hidden * sizes.dtype_bytes
    return tokens * (inputs + 4 * layer) + BLOCK_COPIES * block + HEAD_COPIES * chunk

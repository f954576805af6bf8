"""First weights that can copy: look-back heads in layer 0, matching heads in layers 1 and 2, before any training.

A model this small does not find in-context copying by itself in the minutes that it is trained for (measured: README),
and copying is nearly all that a tool call needs. So its first weights hold the known circuit (Olsson et al. 2022, "In-
context Learning and Induction Heads"): layer 0 adds to each position rotated copies of the one and of the two tokens
before. Layer 1 goes on with a copy: it looks for a token whose token-before is the one here, and predicts it. Layer 2
begins one: it looks for a token that stands two behind the token-before-here (`command: echo` for `"command": "`), and
predicts it. All of it stays trainable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

# Small, so that the embeddings can still take up classes (a city, a key, a name) within a few hundred steps.
EMBEDDING_STD = 0.05
FINAL_GAIN = 3.0
# What the random rest of a layer writes is made small against the embeddings, or it drowns what is copied.
QUIET = 0.05
# Sharpness of the attention, by the weights of the query and key norms.
LOOK_BACK_GAIN, MATCH_GAIN = 2.0, 2.2
# Energy of the previous-token query in the first rotary pairs: no distance below 64 comes near distance 1.
_PAIR_WEIGHTS = (0.6, 0.3, 0.1)


def _orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    rotation: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return rotation


def _constant(model: Qwen3ForCausalLM, *, distance: int) -> torch.Tensor:
    """A query [head_dim] whose rotary product with the one of distance 0 peaks where the key is `distance` before."""
    size = model.config.head_dim
    theta = model.config.rope_parameters["rope_theta"]
    query = torch.zeros(size)
    for pair, weight in enumerate(_PAIR_WEIGHTS):
        angle = distance * theta ** (-2 * pair / size)
        query[pair] = math.sqrt(weight) * math.cos(angle)
        query[pair + size // 2] = -math.sqrt(weight) * math.sin(angle)
    return query


@dataclass(frozen=True)
class _Rooms:
    """How the hidden vector is divided at the start: content, two slots for the tokens before, and one constant."""

    content: int
    slot: int

    @classmethod
    def of(cls, hidden: int) -> _Rooms:
        return cls(content=hidden // 2 - 1, slot=hidden // 4)

    def begin(self, slot: int) -> int:
        """First dimension of slot 0 (one token back) or 1 (two tokens back)."""
        return self.content + slot * self.slot


@torch.no_grad()
def plant(model: Qwen3ForCausalLM, *, seed: int) -> None:
    """Write the circuit into a fresh model, in place.

    Raises ValueError unless the shape can hold it: hidden = kv heads x head_dim, 2 query heads a kv head, 3 layers.
    """
    config = model.config
    hidden, size, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    if hidden != groups * size or config.num_attention_heads != 2 * groups or config.num_hidden_layers < 3:
        raise ValueError(
            f"hidden {hidden} must be kv heads x head_dim = {groups * size}, with 2 heads each and 3 layers"
        )
    generator = torch.Generator().manual_seed(seed)
    rooms = _Rooms.of(hidden)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * EMBEDDING_STD)
    embedding[:, rooms.content :] *= QUIET
    embedding[:, -1] = EMBEDDING_STD * 2  # the same for every token: what a head that looks at positions only can read
    model.model.norm.weight.fill_(FINAL_GAIN)
    shrink = _orthogonal(rooms.content, generator)[: rooms.slot] * math.sqrt(rooms.content / rooms.slot)
    same = torch.zeros(hidden, hidden)
    same[: rooms.content, : rooms.content] = torch.eye(rooms.content)
    slots = []
    for slot in range(2):
        turn = torch.zeros(hidden, hidden)
        turn[rooms.begin(slot) : rooms.begin(slot + 1), : rooms.content] = shrink
        slots.append(turn)
    rest = [(same, None)] * (config.num_hidden_layers - 1)
    for layer, writes in zip(model.model.layers, [tuple(slots), *rest], strict=True):
        _copy_values(layer, writes, content=_orthogonal(hidden, generator), size=size)
    _look_back(model)
    read = torch.zeros(rooms.slot, hidden)
    read[:, : rooms.content] = shrink
    back = [torch.eye(hidden)[rooms.begin(slot) : rooms.begin(slot + 1)] for slot in range(2)]
    # A match: what is looked for, as seen from here, against what stands before the token that is copied.
    _match(model.model.layers[1].self_attn, read, there=back[0])
    _match(model.model.layers[2].self_attn, back[0], there=back[1])


def _copy_values(
    layer: Qwen3DecoderLayer, writes: tuple[torch.Tensor | None, ...], *, content: torch.Tensor, size: int
) -> None:
    """Let the heads of each group write `writes[head in group]` times what they look at; quiet what is random."""
    attention = layer.self_attn
    attention.v_proj.weight.copy_(content)
    attention.o_proj.weight *= QUIET
    layer.mlp.down_proj.weight *= QUIET
    for head in range(attention.o_proj.weight.shape[1] // size):
        write = writes[head % 2]
        if write is not None:
            part = content[head // 2 * size : (head // 2 + 1) * size]
            attention.o_proj.weight[:, head * size : (head + 1) * size] = write @ part.T * EMBEDDING_STD


def _match(attention: Qwen3Attention, here: torch.Tensor, *, there: torch.Tensor) -> None:
    """The first head of each group attends where `there` of the key equals `here` of the query, both [slot, hidden].

    Only the slow half of the rotary pairs is used, so that the distance does not matter.
    """
    size, quarter = attention.head_dim, attention.head_dim // 4
    slow = [*range(quarter, 2 * quarter), *range(3 * quarter, size)]
    for head in range(attention.k_proj.weight.shape[0] // size):
        for projection, first, what in ((attention.q_proj, 2 * head, here), (attention.k_proj, head, there)):
            rows = torch.zeros(size, what.shape[1])
            rows[slow] = what
            projection.weight[first * size : (first + 1) * size] = rows
    attention.q_norm.weight.fill_(MATCH_GAIN)
    attention.k_norm.weight.fill_(MATCH_GAIN)


def _look_back(model: Qwen3ForCausalLM) -> None:
    """Layer 0: the first head of each group looks one position back, the second two, whatever the tokens are."""
    attention, size = model.model.layers[0].self_attn, model.config.head_dim
    attention.q_norm.weight.fill_(LOOK_BACK_GAIN)
    attention.k_norm.weight.fill_(LOOK_BACK_GAIN)
    for projection, distances in ((attention.q_proj, (1, 2)), (attention.k_proj, (0,))):
        projection.weight *= QUIET
        for head in range(len(projection.weight) // size):
            constant = _constant(model, distance=distances[head % len(distances)])
            projection.weight[head * size : (head + 1) * size, -1] = constant

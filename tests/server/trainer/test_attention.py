"""Block masks are the dense mask in other words: the same blocks, logprobs and gradients, for any trie."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from clawloop_server.trainer.attention import attend_by_blocks, block_mask, use_flex, why_not_flex
from clawloop_server.trainer.packing import PackedRow, pack
from clawloop_server.trainer.scorer import bare, score_row
from clawloop_shared.rows import Sample

Session = Callable[..., list[Sample]]


def ends(size: int, seed: int, *, restarts: float) -> Tensor:
    """The `end` of a random forest in pre-order: long runs, forks and new roots."""
    rng, depths = random.Random(seed), [0]
    while len(depths) < size:
        fork = rng.random() < restarts
        depths.append(rng.choice([0, depths[-1] // 2, max(0, depths[-1] - 3)]) if fork else depths[-1] + 1)
    found, path = [size] * size, list[int]()
    for node, depth in enumerate(depths):
        while path and depths[path[-1]] >= depth:
            found[path.pop()] = node
        path.append(node)
    return torch.tensor(found)


def blocks(number: Tensor, indices: Tensor) -> list[set[int]]:
    return [set(which[:count].tolist()) for which, count in zip(indices[0, 0], number[0, 0].tolist(), strict=True)]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 1100), st.integers(0, 1000), st.sampled_from([0.0, 0.003, 0.02, 0.3]))
def test_blocks_are_those_that_evaluating_the_whole_mask_finds(size: int, seed: int, restarts: float) -> None:
    end_T = ends(size, seed, restarts=restarts)

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    wanted, found = create_block_mask(rule, None, None, size, size, device="cpu"), block_mask(end_T)
    assert found.shape == wanted.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        names = (f"{kind}_num_blocks", f"{kind}_indices")
        assert blocks(*(getattr(found, n) for n in names)) == blocks(*(getattr(wanted, n) for n in names)), kind


def test_long_rows_have_whole_blocks_and_small_masks() -> None:
    size = 65_536
    end_T = torch.cat([torch.full((size // 2,), size // 2), torch.full((size // 2,), size)])
    mask = block_mask(end_T)
    count = size // 128
    assert int(mask.kv_num_blocks.sum()) == count  # the diagonal
    assert mask.full_kv_num_blocks is not None
    assert int(mask.full_kv_num_blocks.sum()) == 2 * (count // 2) * (count // 2 - 1) // 2
    held = [value for value in vars(mask).values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in held) < 8 << 20  # the dense mask has 4 GiB


def dense(query: Tensor, key: Tensor, value: Tensor, end_T: Tensor) -> Tensor:
    node = torch.arange(len(end_T))
    sees_TT = (node[None, :] <= node[:, None]) & (node[:, None] < end_T[None, :])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sees_TT, enable_gqa=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2)], ids=["power of two", "three to one"])
def test_attention_by_blocks_is_dense_attention(heads: int, kv_heads: int) -> None:
    end_T = ends(300, 3, restarts=0.02)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, 300, 16), (1, kv_heads, 300, 16), (1, kv_heads, 300, 16))
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    found = []
    for output in (attend_by_blocks(query, key, value, block_mask(end_T), scale=0.25), dense(query, key, value, end_T)):
        found.append([output.detach(), *torch.autograd.grad((output * weight).sum(), (query, key, value))])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_public_function_takes_the_mask_as_it_is() -> None:
    end_T = ends(300, 5, restarts=0.02)
    query, key, value = torch.randn(3, 1, 2, 300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = flex_attention(query, key, value, block_mask=block_mask(end_T))
        assert isinstance(found, Tensor)
        assert torch.allclose(found, dense(query, key, value, end_T), atol=1e-10)


def test_rows_of_other_lengths_and_shapes_are_not_compiled_for_again() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    seen = []
    with torch.no_grad():
        for size in (256, 640, 384, 512, 768):
            query, key = torch.zeros(1, 4, size, 16), torch.zeros(1, 2, size, 16)
            mask = block_mask(ends(size, size, restarts=0.02))
            compiled(query, key, key, block_mask=mask, scale=0.25, enable_gqa=True)
            seen.append(counter.frame_count)
    assert seen[1:] == [seen[1]] * 4


def scored(model: Any, row: PackedRow) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs_P, _ = score_row(model, row)
    torch.autograd.backward((logprobs_P * row.advantage_P).sum())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logprobs_P.detach(), found


@pytest.mark.parametrize("forks", [False, True], ids=["append-only", "forks"])
def test_a_model_gives_the_same_logprobs_and_gradients_by_blocks(
    peft_model: Any, session: Session, forks: bool
) -> None:
    unrelated = [
        Sample(s.step_id, s.trajectory + 9, s.token_ids, s.trained, s.logprobs, s.advantages) for s in session(4)
    ]
    (row,) = pack(session(3, trajectories=6, turns=5, forks=forks) + unrelated, row_tokens=4096, fill=True)
    assert len(row.token_ids_T) > 256  # several blocks
    assert int((row.positions_T == 0).sum()) == 2  # several roots
    plain, wanted = scored(peft_model, row)
    use_flex(bare(peft_model))
    found, gradients = scored(peft_model, row)
    assert float((found - plain).abs().max()) < 1e-6
    assert max(float((gradients[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3


def test_generation_with_a_cache_is_the_same_under_a_model_that_attends_by_blocks(
    engine: Any, session: Session
) -> None:
    from clawloop_server.trainer.generation import Sampling

    prompts = [list(s.token_ids)[: 20 + 3 * n] for n, s in enumerate(session(8, trajectories=4, turns=1))]
    sampling = Sampling(max_tokens=12, eos_ids=frozenset({1}), temperature=0.0)
    wanted = engine.generate(prompts, sampling=sampling)
    use_flex(bare(engine.model))
    assert engine.generate(prompts, sampling=sampling) == wanted


def test_what_a_block_mask_does_not_carry_is_refused() -> None:
    from clawloop_server.trainer.attention import attend

    query = torch.zeros(1, 2, 128, 16)
    mask = block_mask(torch.full((128,), 128))
    assert isinstance(mask, BlockMask)
    with pytest.raises(NotImplementedError, match=r'softcap needs .* attention = "dense"'):
        attend(None, query, query, query, mask, softcap=30.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_flex_compiles_on_a_gpu_and_agrees_with_dense_attention(dtype: torch.dtype) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=64
    )
    base = Qwen3ForCausalLM(config).to("cuda", dtype)
    assert why_not_flex(base, device=torch.device("cuda"), dtype=dtype) == ""

"""The chunked head gives the logprobs, entropies and gradients of all logits at once, and needs a fraction of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clawloop_server.trainer.head import CHUNK_BYTES, chunk_rows, head_logits, head_logprobs

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def parts(seed: int, *, count: int = 9, dtype: torch.dtype = torch.float64) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(31, 6, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(31, (count,), generator=generator)
    return hidden, weight, target, 0.5 + torch.rand(count, generator=generator)


def reference(hidden: Tensor, weight: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    scores = (hidden @ weight.t() / temperature.double()[:, None]).log_softmax(-1)
    return scores.gather(-1, target[:, None]).squeeze(-1), -(scores.exp() * scores).sum(-1)


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_any_chunk_gives_what_all_logits_give(seed: int, count: int, rows: int, entropy: bool) -> None:
    hidden, weight, target, temperature = parts(seed, count=count)
    slopes = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hidden.requires_grad_()
    wanted, wanted_entropy = reference(hidden, weight, target, temperature)
    (gradient,) = torch.autograd.grad((wanted * slopes).sum(), hidden)
    found, found_entropy = head_logprobs(hidden, weight, target, temperature, entropy=entropy, rows=rows)
    (mine,) = torch.autograd.grad((found * slopes).sum(), hidden)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(mine, gradient, atol=1e-12)
    assert (found_entropy is None) != entropy
    if found_entropy is not None:
        assert not found_entropy.requires_grad
        assert torch.allclose(found_entropy, wanted_entropy, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    hidden, weight, target, temperature = parts(3)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: head_logprobs(h, weight, target, temperature.double(), rows=4)[0], (hidden,)
    )


def test_a_bfloat16_head_sums_in_float32() -> None:
    hidden, weight, target, temperature = parts(5, count=40, dtype=torch.bfloat16)
    hidden = (8 * hidden).requires_grad_()
    found, _ = head_logprobs(hidden, weight, target, temperature, rows=7)
    exact = hidden.detach().double().requires_grad_()
    wanted, _ = reference(exact, weight.double(), target, temperature)
    assert found.dtype == torch.float32
    assert float((found - wanted).detach().abs().max()) < 1e-4  # bfloat16 logits are off by .1 here
    rounded = ((hidden @ weight.t()).double() / temperature.double()[:, None]).log_softmax(-1)
    off = rounded.gather(-1, target[:, None]).squeeze(-1) - wanted
    assert float(off.detach().abs().max()) > 1e-2
    (mine,) = torch.autograd.grad(found.sum(), hidden)
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    assert mine.dtype == torch.bfloat16
    assert float((mine.double() - gradient).abs().max() / gradient.abs().max()) < 0.02


def test_a_bfloat16_head_sums_in_float32_under_autocast_too() -> None:
    hidden, weight, _, _ = parts(5, count=40, dtype=torch.bfloat16)
    wanted = head_logits(8 * hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_logits(8 * hidden, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not torch.equal(found, found.bfloat16().float())


def test_without_a_gradient_nothing_is_kept_for_one() -> None:
    hidden, weight, target, temperature = parts(1)
    found, _ = head_logprobs(hidden, weight, target, temperature, rows=4)
    assert not found.requires_grad
    assert torch.allclose(found, reference(hidden, weight, target, temperature)[0])


def test_a_logit_that_is_not_finite_is_not_hidden() -> None:
    hidden, weight, target, temperature = parts(2)
    hidden[4] = math.inf
    found, _ = head_logprobs(hidden, weight, target, temperature, rows=3)
    assert found.isfinite().tolist() == [at != 4 for at in range(9)]


@pytest.mark.parametrize("entropy", [False, True])
def test_a_chunk_and_what_is_made_of_it_keep_to_the_bytes_allowed(entropy: bool) -> None:
    rows = chunk_rows(151_936, dtype=torch.float32, device="cpu", entropy=entropy)
    copies = 2 if entropy else 1
    assert rows * 151_936 * 4 * copies <= CHUNK_BYTES["cpu"] < (rows + 1) * 151_936 * 4 * copies
    assert chunk_rows(10**12, dtype=torch.float32, device="cpu", entropy=entropy) == 1

"""The packed, shared, chunked forward gives the logprobs and gradients of one plain forward a call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clawloop_server.trainer.losses import LossInputs, policy_loss
from clawloop_server.trainer.packing import PackedRow, pack
from clawloop_server.trainer.scorer import score_row
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample

Session = Callable[..., list[Sample]]
OPEN = LossSettings(kl_beta=0.0, veto=0.0, anchor=0.01, max_trajectory_share=1.0)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def backward(model: Any, rows: list[PackedRow], total: int, *, chunk: int = 256) -> None:
    for row in rows:
        logprobs_P, _ = score_row(model, row, chunk=chunk)
        names = ("behaviour_P", "advantage_P", "unit_P", "weight_U")
        fields = {name: getattr(row, name) for name in names}
        fields |= {"gap_U": torch.zeros_like(row.trajectory_U), "cap_U": torch.ones_like(row.weight_U)}
        loss, _ = policy_loss(LossInputs(logprobs_P=logprobs_P, normalizer=float(total), **fields), OPEN)
        torch.autograd.backward(loss)


def plain_logprobs(model: Any, sample: Sample) -> Tensor:
    """Of one call by itself, from all its logits."""
    ids = torch.tensor([list(sample.token_ids)])
    scores = (model(input_ids=ids).logits[0].double() / sample.temperature).log_softmax(-1)
    at = torch.tensor(list(sample.trained))
    found: Tensor = scores[at - 1, ids[0, at]]
    return found


def plain_loss(model: Any, samples: list[Sample]) -> Tensor:
    """The loss without packing, rows or masks: one forward a call, a unit a trajectory."""
    total = sum(len(s.trained) for s in samples)
    losses = torch.zeros((), dtype=torch.float64)
    for trajectory in {s.trajectory for s in samples}:
        mine = [s for s in samples if s.trajectory == trajectory]
        lp = torch.cat([plain_logprobs(model, s) for s in mine])
        mu = torch.tensor([x for s in mine for x in s.logprobs])
        adv = torch.tensor([x for s in mine for x in s.advantages])
        ell = lp.detach() - mu
        stop = (adv < 0) & (-ell.mean() > OPEN.opsm_delta)
        term = -(~stop).double() * ell.exp().clamp(max=2.0) * adv * lp + OPEN.anchor * (lp - mu).square() / 2
        losses = losses + mine[0].weight * term.sum() / total
    return losses


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    assert len(one) == 28  # A and B of seven linear layers of two layers
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("forks", [False, True], ids=["append-only", "forks"])
def test_gradients_of_packed_rows_are_those_of_single_calls_and_of_a_plain_reference(
    peft_model: Any, session: Session, forks: bool
) -> None:
    samples = session(3, trajectories=4, turns=3, forks=forks)
    total = sum(len(s.trained) for s in samples)
    packed = pack(samples, row_tokens=4096)
    assert len(packed) == 1
    backward(peft_model, packed, total)
    shared = gradients(peft_model)
    backward(peft_model, packed, total, chunk=3)
    chunked = gradients(peft_model)
    torch.autograd.backward(plain_loss(peft_model, samples))
    plain = gradients(peft_model)
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 1e-3
    assert worst(shared, plain) < 1e-6
    assert worst(chunked, plain) < 1e-6


def test_rows_of_a_small_budget_and_of_several_roots_give_the_same_gradients(peft_model: Any, session: Session) -> None:
    # One call a trajectory, so that a unit is whole in every packing.
    samples = session(4, trajectories=3, turns=1) + [
        Sample(s.step_id, s.trajectory + 3, s.token_ids, s.trained, s.logprobs, s.advantages)
        for s in session(9, trajectories=2, turns=1)
    ]
    total = sum(len(s.trained) for s in samples)
    found = []
    for row_tokens, fill in ((1, False), (64, False), (4096, True)):
        backward(peft_model, pack(samples, row_tokens=row_tokens, fill=fill), total)
        found.append(gradients(peft_model))
    assert worst(found[0], found[1]) < 1e-6
    assert worst(found[0], found[2]) < 1e-6


def test_logprobs_and_entropy_are_those_of_the_whole_vocabulary(peft_model: Any, session: Session) -> None:
    samples = session(1, trajectories=2, turns=2)
    (row,) = pack(samples, row_tokens=4096)
    logprobs_P, entropy_P = score_row(peft_model, row, entropy=True)
    parts = torch.split(logprobs_P, list(row.counts_S))
    for member, part in zip(row.members_S, parts, strict=True):
        assert part.tolist() == pytest.approx(plain_logprobs(peft_model, samples[member]).tolist(), abs=1e-6)
    assert entropy_P is not None
    assert not entropy_P.requires_grad
    sample = samples[row.members_S[0]]
    logits = peft_model(input_ids=torch.tensor([list(sample.token_ids)])).logits[0, sample.trained[0] - 1]
    wanted = torch.distributions.Categorical(logits=logits / sample.temperature).entropy()  # type: ignore[no-untyped-call]
    assert float(entropy_P[0]) == pytest.approx(float(wanted.detach()), abs=1e-6)

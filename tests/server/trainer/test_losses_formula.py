"""Every policy term and the whole loss against their papers' formulas, token by token in Python floats.

The reference knows trajectories, calls and tokens; rows are only how the loss gets them. Gradients of the terms that
their papers differentiate (PPO, GSPO) are also those of finite differences of the objective itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.trainer.losses import POLICIES, Calls, Distance, LossInputs, policy_loss
from clawloop_shared.objective import LossSettings, clips_of
from clawloop_shared.whole_step import share_caps

REAL = torch.float64
CONFIDENCE = (1.0, 0.3, 0.6, 0.9)
GAPS = (0, 1, 2, 5)


@dataclass(frozen=True)
class Token:
    """One trained token: now, then, its advantage, the base's, and whose it is."""

    now: float
    then: float
    advantage: float
    base: float
    trajectory: int = 0
    call: int = 0
    row: int = 0


# the reference


def reference(tokens: Sequence[Token], s: LossSettings) -> tuple[float, list[float]]:
    """The loss and its gradient by each token's logprob."""
    caps = caps_of(tokens, s)
    total = sum(caps[t.trajectory] for t in tokens)
    value, gradient = 0.0, list[float]()
    for t in tokens:
        own = [u for u in tokens if u.trajectory == t.trajectory]
        drifts = [cut(u.now - u.then) for u in own]
        mean = sum(drifts) / len(drifts)
        g = GAPS[t.trajectory] <= s.max_staleness_versions and math.exp(min(drifts)) >= s.veto
        g = g and s.geometric_low <= math.exp(mean) <= s.geometric_high
        moved = math.exp(t.now) - math.exp(t.then)
        m = not (t.advantage < 0 and -mean > s.opsm_delta)
        m = m and not (t.advantage > 0 and moved > s.trust_region)
        m = m and not (t.advantage < 0 and -moved > s.trust_region)
        share = caps[t.trajectory]
        policy, slope = TERMS[s.policy](t, tokens, s)
        drift = cut(t.now - t.then)
        weight = min(math.exp(drift), s.tis_cap)
        term = m * policy + s.kl_beta * weight * 0.5 * (t.now - t.base) ** 2 + s.anchor * 0.5 * drift**2
        slope = m * slope + s.kl_beta * weight * (t.now - t.base) + s.anchor * drift
        value += CONFIDENCE[t.trajectory] * share * g * term / total
        gradient.append(CONFIDENCE[t.trajectory] * share * g * slope / total)
    return value, gradient


def caps_of(tokens: Sequence[Token], s: LossSettings) -> dict[int, float]:
    """The largest limit that is no more than the share of what counts under it, found by halving; none of the
    trajectories where even the smallest is more than its share."""
    sizes = {t.trajectory: 0.0 for t in tokens}
    for trajectory in sizes:
        own = [u for u in tokens if u.trajectory == trajectory]
        sizes[trajectory] = float(len({u.call for u in own}) if s.policy == "gspo" else len(own))

    def holds(limit: float) -> bool:
        return limit <= s.max_trajectory_share * sum(min(limit, size) for size in sizes.values()) * (1 + 1e-12)

    low, high = min(sizes.values()), max(sizes.values())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    limit = high if holds(high) else low
    return {trajectory: min(1.0, limit / size) for trajectory, size in sizes.items()}


def cut(drift: float) -> float:
    return max(-20.0, min(20.0, drift))


def tis(t: Token, tokens: Sequence[Token], s: LossSettings) -> tuple[float, float]:
    weight = min(math.exp(cut(t.now - t.then)), s.tis_cap)
    return -weight * t.advantage * t.now, -weight * t.advantage


def cispo(t: Token, tokens: Sequence[Token], s: LossSettings) -> tuple[float, float]:
    low, high = clips_of(s)
    weight = min(max(math.exp(cut(t.now - t.then)), 1 - low), 1 + high)
    return -weight * t.advantage * t.now, -weight * t.advantage


def surrogate(ratio: float, advantage: float, s: LossSettings) -> tuple[float, bool]:
    """-min(r A, clip(r) A), and whether it is the first that is smaller."""
    low, high = clips_of(s)
    plain, clipped = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
    return -min(plain, clipped), plain <= clipped


def ppo(t: Token, tokens: Sequence[Token], s: LossSettings) -> tuple[float, float]:
    ratio = math.exp(cut(t.now - t.then))
    value, moves = surrogate(ratio, t.advantage, s)
    return value, -ratio * t.advantage * moves


def gspo(t: Token, tokens: Sequence[Token], s: LossSettings) -> tuple[float, float]:
    """In units of the mean over tokens, in which the rest of the loss is: N / S of the mean over sequences."""
    own = [u for u in tokens if u.call == t.call]
    ratio = math.exp(sum(cut(u.now - u.then) for u in own) / len(own))
    value, moves = surrogate(ratio, t.advantage, s)
    caps = caps_of(tokens, s)
    calls = {u.call: caps[u.trajectory] for u in tokens}
    scale = sum(caps[u.trajectory] for u in tokens) / sum(calls.values()) / len(own)
    return scale * value, -scale * ratio * t.advantage * moves


TERMS: dict[str, Callable[[Token, Sequence[Token], LossSettings], tuple[float, float]]] = {
    "tis": tis,
    "cispo": cispo,
    "ppo": ppo,
    "gspo": gspo,
}

# what is tested


def inputs_of(tokens: Sequence[Token], row: int, settings: LossSettings) -> LossInputs:
    """What the loss gets of a row, its calls and trajectories numbered as they come."""
    here = [t for t in tokens if t.row == row]
    units, calls = (list(dict.fromkeys(getattr(t, name) for t in here)) for name in ("trajectory", "call"))

    def real(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=REAL)

    def drifts(unit: int) -> list[float]:
        return [cut(t.now - t.then) for t in tokens if t.trajectory == unit]

    sizes = Counter(t.trajectory for t in tokens)
    if settings.policy == "gspo":
        sizes = Counter({t.call: t.trajectory for t in tokens}.values())
    caps = share_caps(sizes, settings.max_trajectory_share)
    split = [u for u in units if any(t.trajectory == u and t.row != row for t in tokens)]
    whole = Distance(
        real([sum(drifts(u)) / len(drifts(u)) if u in split else math.nan for u in units]),
        real([min(drifts(u)) if u in split else math.nan for u in units]),
    )
    return LossInputs(
        logprobs_P=real([t.now for t in here]).requires_grad_(),
        behaviour_P=real([t.then for t in here]),
        advantage_P=real([t.advantage for t in here]),
        unit_P=torch.tensor([units.index(t.trajectory) for t in here]),
        weight_U=real([CONFIDENCE[u] for u in units]),
        gap_U=torch.tensor([GAPS[u] for u in units]),
        cap_U=real([caps[u] for u in units]),
        normalizer=sum(caps[t.trajectory] for t in tokens),
        reference_P=real([t.base for t in here]),
        calls=Calls(
            torch.tensor([calls.index(t.call) for t in here]),
            total=sum({t.call: caps[t.trajectory] for t in tokens}.values()),
        ),
        whole=whole if split else None,
    )


def ours(tokens: Sequence[Token], settings: LossSettings) -> tuple[float, list[float]]:
    """The loss of all rows together, and its gradient by each token's logprob."""
    value = 0.0
    gradient = [0.0] * len(tokens)
    for row in sorted({t.row for t in tokens}):
        inputs = inputs_of(tokens, row, settings)
        loss, _ = policy_loss(inputs, settings)
        torch.autograd.backward(loss)
        assert inputs.logprobs_P.grad is not None
        value += float(loss.detach())
        places = [at for at, t in enumerate(tokens) if t.row == row]
        for at, slope in zip(places, inputs.logprobs_P.grad.tolist(), strict=True):
            gradient[at] = slope
    return value, gradient


logprob = st.floats(-6, -0.01)
drift = st.floats(-1.5, 1.5) | st.floats(-0.01, 0.01) | st.just(0.0)
numbers = st.tuples(logprob, drift, st.floats(-3, 3), logprob)
calls = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.lists(numbers, min_size=1, max_size=5)), min_size=1, max_size=7
)


def tokens_of(drawn: list[tuple[int, int, list[tuple[float, float, float, float]]]]) -> list[Token]:
    return [
        Token(now, min(now - far, 0.0), advantage, base, trajectory, call, row)
        for call, (trajectory, row, own) in enumerate(drawn)
        for now, far, advantage, base in own
    ]


loss_settings = st.builds(
    LossSettings,
    policy=st.sampled_from(sorted(POLICIES)),
    tis_cap=st.sampled_from([1.1, 2.0]),
    opsm_delta=st.sampled_from([0.05, math.inf]),
    geometric_low=st.sampled_from([0.0, 0.8]),
    geometric_high=st.sampled_from([1.25, math.inf]),
    veto=st.sampled_from([0.0, 0.3]),
    trust_region=st.sampled_from([0.05, math.inf]),
    max_staleness_versions=st.sampled_from([1, 16]),
    kl_beta=st.sampled_from([0.0, 0.05]),
    anchor=st.sampled_from([0.0, 1e-3]),
    max_trajectory_share=st.sampled_from([0.1, 0.3, 0.4, 0.6, 1.0]),
)


@given(calls, loss_settings, st.sampled_from([None, 0.1]), st.sampled_from([None, 0.2]))
def test_the_loss_and_its_gradient_are_those_of_the_formula(
    drawn: list[tuple[int, int, list[tuple[float, float, float, float]]]],
    settings: LossSettings,
    low: float | None,
    high: float | None,
) -> None:
    if settings.policy != "tis":
        settings = with_clips(settings, low, high)
    tokens = tokens_of(drawn)
    value, gradient = ours(tokens, settings)
    expected, slopes = reference(tokens, settings)
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert gradient == pytest.approx(slopes, rel=1e-6, abs=1e-6)


def with_clips(settings: LossSettings, low: float | None, high: float | None) -> LossSettings:
    return msgspec.structs.replace(settings, clip_low=low, clip_high=high)


@given(calls, st.sampled_from(sorted(POLICIES)))
def test_each_policy_term_alone_is_its_formula(
    drawn: list[tuple[int, int, list[tuple[float, float, float, float]]]], policy: str
) -> None:
    settings = LossSettings(policy=policy, kl_beta=0.0, opsm_delta=math.inf, veto=0.0, max_trajectory_share=1.0)
    tokens = [replace(t, trajectory=0) for t in tokens_of(drawn)]
    terms = [TERMS[policy](t, tokens, settings) for t in tokens]
    value, gradient = ours(tokens, settings)
    assert value == pytest.approx(sum(v for v, _ in terms) / len(tokens), rel=1e-6, abs=1e-6)
    assert gradient == pytest.approx([slope / len(tokens) for _, slope in terms], rel=1e-6, abs=1e-6)


def gspo_objective(tokens: Sequence[Token], s: LossSettings) -> float:
    """Eq. 5 of the paper, a call a sequence, its advantage that of its first token."""
    total, sequences = 0.0, {t.call for t in tokens}
    for call in sequences:
        own = [t for t in tokens if t.call == call]
        likelier = math.exp(sum(t.now for t in own) - sum(t.then for t in own)) ** (1 / len(own))
        total += surrogate(likelier, own[0].advantage, s)[0]
    return total / len(sequences)


def ppo_objective(tokens: Sequence[Token], s: LossSettings) -> float:
    return sum(surrogate(math.exp(t.now - t.then), t.advantage, s)[0] for t in tokens) / len(tokens)


@pytest.mark.parametrize(("policy", "objective"), [("gspo", gspo_objective), ("ppo", ppo_objective)])
@given(drawn=calls)
def test_the_gradient_is_that_of_the_objective_as_the_paper_states_it(
    policy: str,
    objective: Callable[[Sequence[Token], LossSettings], float],
    drawn: list[tuple[int, int, list[tuple[float, float, float, float]]]],
) -> None:
    settings = LossSettings(policy=policy, kl_beta=0.0, opsm_delta=math.inf, veto=0.0, max_trajectory_share=1.0)
    tokens = [replace(t, trajectory=0) for t in tokens_of(drawn)]
    firsts = {t.call: t.advantage for t in reversed(tokens)}
    tokens = [replace(t, advantage=firsts[t.call]) for t in tokens]
    value, gradient = ours(tokens, settings)
    assert value == pytest.approx(objective(tokens, settings), abs=1e-6)
    step = 1e-6
    for at, t in enumerate(tokens):
        around = [
            objective([*tokens[:at], replace(t, now=t.now + h), *tokens[at + 1 :]], settings)
            for h in (-step, 0.0, step)
        ]
        left, right = (around[1] - around[0]) / step, (around[2] - around[1]) / step
        corner = abs(left - right)  # where there is no derivative, it is one side's
        assert abs(gradient[at] - (left + right) / 2) <= 1e-6 + corner

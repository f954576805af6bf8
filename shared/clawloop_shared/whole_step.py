"""What is known of an optimizer step as a whole: how much each trajectory of it may count, and what it is watched by.

Each row of it, on the server, and each sample of it, at home, holds only a part. Knows no tensor library; the formula
of the loss is in docs/training.md.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample

MAX_LOG_RATIO = 20.0
"""beyond which the log ratio of a token is cut"""


def cut_log_ratio(drift: float) -> float:
    """l of one token, as the loss has it."""
    return min(MAX_LOG_RATIO, max(-MAX_LOG_RATIO, drift))


@dataclass(frozen=True)
class Sums:
    """What a step is watched by, as sums over its tokens, so that rows add up."""

    tokens: float = 0.0
    loss: float = 0.0
    kept: float = 0.0
    kept_stale: float = 0.0
    kept_veto: float = 0.0
    kept_geometric: float = 0.0
    kept_opsm: float = 0.0
    kept_trust: float = 0.0
    clipped: float = 0.0
    log_ratio: float = 0.0
    k3: float = 0.0
    weight: float = 0.0
    weight_squared: float = 0.0
    base_distance: float = 0.0
    entropy: float = 0.0
    surprise: float = 0.0
    positive: float = 0.0
    negative: float = 0.0
    max_log_ratio: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        """Both together; the largest log ratio is the larger one."""
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Sums(**total | {"max_log_ratio": max(self.max_log_ratio, other.max_log_ratio)})

    def metrics(self) -> dict[str, float]:
        """Means over tokens, and the effective sample size (sum w)^2 / (N sum w^2) in (0, 1].

        `surprise` is the mean of -log mu: what the entropy of the policy that sampled was, as these very tokens tell
        it.
        """
        count = max(self.tokens, 1.0)
        shares = {f.name: getattr(self, f.name) / count for f in fields(self) if f.name.startswith("kept")}
        return shares | {
            "loss": self.loss,
            "tokens": self.tokens,
            "mean_log_ratio": self.log_ratio / count,
            "max_log_ratio": self.max_log_ratio,
            "k3": self.k3 / count,
            "ess": self.weight**2 / (count * self.weight_squared) if self.weight_squared else 0.0,
            "k2_base": self.base_distance / count,
            "entropy": self.entropy / count,
            "surprise": self.surprise / count,
            "clipped": self.clipped / count,
            "positive_tokens": self.positive,
            "negative_tokens": self.negative,
        }


@dataclass(frozen=True)
class WholeStep:
    """The step's trained tokens and calls, as far as its trajectories may count; of each trajectory what its tokens are
    scaled with to that end, its calls, and the largest gap of its versions; and how far those are from who sampled them
    of which a row has only a part (mean and lowest log ratio)."""

    normalizer: float
    caps: dict[int, float]
    calls: Counter[int]
    gaps: dict[int, int]
    all_calls: float
    split: dict[int, tuple[float, float]]

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        settings: LossSettings,
        *,
        normalizer: float | None,
        split: dict[int, tuple[float, float]],
    ) -> Self:
        """The step that these samples are, or, with a `normalizer`, the part of one that they are."""
        calls, tokens = Counter[int](), Counter[int]()
        for sample in samples:
            calls[sample.trajectory] += 1
            tokens[sample.trajectory] += len(sample.trained)
        caps = share_caps(calls if settings.policy == "gspo" else tokens, settings.max_trajectory_share)
        counted = sum(cap * tokens[t] for t, cap in caps.items())
        whole = normalizer or counted
        return cls(
            normalizer=whole,
            caps=caps,
            calls=calls,
            gaps={s.trajectory: s.version_gap for s in sorted(samples, key=lambda s: s.version_gap)},
            all_calls=sum(cap * calls[t] for t, cap in caps.items()) * (whole / max(counted, 1e-9)),
            split=split,
        )


def share_caps(sizes: Mapping[int, float], share: float) -> dict[int, float]:
    """s_i: what each trajectory's tokens are scaled with so that none has more than `share` of what all count together.

    `sizes` are n_i: its trained tokens in the step, or its calls where each of these weighs the same (`gspo`). With
    s_i n_i = min(n_i, c), the limit is c = share sum_j min(n_j, c); of the k largest cut and r the sum of the others,
    c = share r / (1 - k share). Where so few cannot keep to it, all count the same.
    """
    ordered = sorted(sizes.values(), reverse=True)
    rest, limit = float(sum(ordered)), min(ordered, default=0.0)
    for cut, size in enumerate(ordered):
        if cut * share >= 1.0:
            break
        if share * rest >= size * (1.0 - cut * share):
            limit = share * rest / (1.0 - cut * share)
            break
        rest -= size
    return {trajectory: min(1.0, limit / size) if size else 1.0 for trajectory, size in sizes.items()}

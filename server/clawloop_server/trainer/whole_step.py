"""What a row must know of the whole optimizer step, of which it holds a part."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clawloop_server.trainer.losses import Calls, Distance, share_caps
from clawloop_server.trainer.packing import PackedRow
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample


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
    ) -> "WholeStep":
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

    def of_units(self, row: PackedRow, known: Callable[[int], float]) -> torch.Tensor:
        """What is known of the trajectory of each unit."""
        return row.weight_U.new_tensor([known(trajectory) for trajectory in row.trajectory_U.tolist()])

    def calls_of(self, row: PackedRow) -> Calls:
        """The calls of a row."""
        return Calls(
            call_P=torch.repeat_interleave(torch.tensor(row.counts_S)).to(row.unit_P.device), total=self.all_calls
        )

    def distance_of(self, row: PackedRow) -> Distance | None:
        """How far the trajectories are that a row has only a part of; NaN for the others."""
        if not self.split:
            return None
        return Distance(
            self.of_units(row, lambda t: self.split.get(t, (math.nan, math.nan))[0]),
            self.of_units(row, lambda t: self.split.get(t, (math.nan, math.nan))[1]),
        )

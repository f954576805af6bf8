"""What a row must know of the whole optimizer step, of which it holds a part."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clawloop_server.trainer.losses import Calls, Distance
from clawloop_server.trainer.packing import PackedRow
from clawloop_shared.whole_step import WholeStep


@dataclass(frozen=True)
class PackedStep(WholeStep):
    """The step, for the tensors of its rows."""

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

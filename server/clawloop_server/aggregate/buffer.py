"""When the deltas that wait make a round (FedBuff, https://arxiv.org/abs/2106.06639). Pure; knows no torch.

Who lies need not learn, and answers first. So a round is of more than half of those that learn, not of the first few.
"""

from __future__ import annotations

from clawloop_server.aggregate.settings import FederateSettings

MOST_WAITED_FOR = 64
"""devices: of so many that come in any order most are honest, where most of all are"""
LEAST = 3
"""of fewer there is no majority"""


def buffer_size(settings: FederateSettings, devices: int) -> int:
    """How many devices' deltas make a round where so many devices let them out: `buffer`, or more than half of them, at
    least 3 where there are so many, and at most 64."""
    wanted = settings.buffer or max(LEAST, min(MOST_WAITED_FOR, devices // 2 + 1))
    return max(1, settings.min_devices, min(wanted, devices))


def makes_round(settings: FederateSettings, waiting: int, *, devices: int, oldest_s: float) -> bool:
    """Whether deltas of so many devices make a round without trajectories: as many as the buffer takes, or
    `min_devices` once the oldest waited for `max_wait_s`. `devices`: how many there are that let deltas out."""
    if waiting < max(1, settings.min_devices):
        return False
    return oldest_s >= settings.max_wait_s or waiting >= buffer_size(settings, devices)

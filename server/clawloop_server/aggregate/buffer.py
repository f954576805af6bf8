"""When the deltas that wait make a round (FedBuff, https://arxiv.org/abs/2106.06639). Pure; knows no torch."""

from __future__ import annotations

from clawloop_server.aggregate.settings import FederateSettings


def buffer_size(settings: FederateSettings, devices: int) -> int:
    """How many devices' deltas make a round where so many devices learn: `buffer`, or a quarter of them, 2 to 8."""
    wanted = settings.buffer or min(8, max(2, -(-devices // 4)))
    return max(1, settings.min_devices, min(wanted, devices))


def makes_round(settings: FederateSettings, waiting: int, *, devices: int, oldest_s: float) -> bool:
    """Whether deltas of so many devices make a round without trajectories: as many as the buffer takes, or
    `min_devices` once the oldest waited for `max_wait_s`. `devices`: how many there are in all."""
    if waiting < max(1, settings.min_devices):
        return False
    return oldest_s >= settings.max_wait_s or waiting >= buffer_size(settings, devices)

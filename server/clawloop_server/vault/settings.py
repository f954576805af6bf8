"""What an operator can set about rewards: the `[reward]` table of the server's configuration."""

from typing import Annotated

from msgspec import Meta

from clawloop_shared.signals import RewardRules

_Wait = Annotated[float, Meta(ge=0, le=30 * 86_400)]


class RewardSettings(RewardRules, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How signals are weighed, and how long trajectories wait for more of them."""

    settle_s: _Wait = 60.0
    """nothing must have come for so long before a judged trajectory, or a group of them, is learned from"""
    group_timeout_s: _Wait = 3600.0
    """after so long without news, what is judged of an incomplete group goes without the rest"""


DEFAULT_SETTINGS = RewardSettings()

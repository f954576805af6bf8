"""What a policy is trained for, wherever that happens: the terms of the loss and their bounds.

The server's `[train.loss]`, and what it asks devices that learn at home to use. Knows no tensor library; formulas:
docs/training.md.
"""

import math

import msgspec

CLIPS = {"ppo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 0.28)}
"""how far below and above 1 each policy term cuts a ratio, by its paper: DAPO's clip-higher; GSPO; MiniMax-M1, which
has no lower bound (1 below 1 is none)"""
POLICIES = ("tis", *CLIPS)


class LossSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The loss: which tokens count, how much, and what holds the policy back."""

    policy: str = "tis"
    """the policy term: `tis`, `ppo`, `gspo` or `cispo`"""
    tis_cap: float = 2.0
    """upper bound of a token's importance weight"""
    clip_low: float | None = None
    """how far below 1 a ratio is cut by `ppo`, `gspo` and `cispo`; none: as their papers do"""
    clip_high: float | None = None
    """how far above 1"""
    opsm_delta: float = 0.05
    """a trajectory further than this from the policy that sampled it (mean nats a token) teaches no negative lesson"""
    geometric_low: float = 0.0
    """trajectories whose geometric mean ratio lies outside [low, high] are left out"""
    geometric_high: float = math.inf
    veto: float = 1e-4
    """a trajectory with one ratio below this is left out"""
    trust_region: float = math.inf
    """a token whose probability already moved this far in the wanted direction is not pushed further"""
    max_staleness_versions: int = 16
    """trajectories sampled by an adapter older than this many versions are left out"""
    kl_beta: float = 0.02
    """weight of the distance to the base model"""
    anchor: float = 0.0
    """weight of the distance to the policy that sampled"""
    max_trajectory_share: float = 0.1
    """the largest part of an update that one trajectory may have, by its tokens"""

    @property
    def judges_trajectories(self) -> bool:
        """Whether a mask looks at all of a trajectory at once."""
        band = self.geometric_low > 0 or self.geometric_high < math.inf
        return band or self.veto > 0 or self.opsm_delta < math.inf


def clips_of(settings: LossSettings) -> tuple[float, float]:
    """How far below and above 1 the policy term of these settings cuts a ratio."""
    low, high = CLIPS[settings.policy]
    return (
        low if settings.clip_low is None else settings.clip_low,
        high if settings.clip_high is None else settings.clip_high,
    )


def loss_rules(loss: LossSettings) -> dict[str, bool]:
    """What must hold of the loss, by what to say where it does not."""
    low, high = loss.clip_low, loss.clip_high
    return {
        f"loss.policy {loss.policy!r}: known are {POLICIES}": loss.policy in POLICIES,
        "loss.clip_low and clip_high say nothing to policy 'tis'; set tis_cap": (
            loss.policy != "tis" or (low is None and high is None)
        ),
        f"loss.clip_low {low} is not in (0, 1]": low is None or 0 < low <= 1,
        f"loss.clip_high {high} is not above 0": high is None or high > 0,
        f"loss.tis_cap {loss.tis_cap} is not above 0": loss.tis_cap > 0,
        f"loss.kl_beta {loss.kl_beta} is below 0": 0 <= loss.kl_beta < math.inf,
        f"loss.anchor {loss.anchor} is below 0": 0 <= loss.anchor < math.inf,
        f"loss.max_trajectory_share {loss.max_trajectory_share} is not in (0, 1]": 0 < loss.max_trajectory_share <= 1,
        f"loss.geometric_low {loss.geometric_low} is not below 1, or geometric_high not above": (
            loss.geometric_low < 1 < loss.geometric_high
        ),
        f"loss.opsm_delta {loss.opsm_delta} is below 0": loss.opsm_delta >= 0,
        f"loss.veto {loss.veto} is not in [0, 1)": 0 <= loss.veto < 1,
        f"loss.trust_region {loss.trust_region} is not above 0": loss.trust_region > 0,
        f"loss.max_staleness_versions {loss.max_staleness_versions} is below 0": loss.max_staleness_versions >= 0,
    }

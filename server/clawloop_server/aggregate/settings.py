"""What an operator can set about learning together: the `[federate]` table of the server's configuration.

Knows no torch, so that reading a configuration costs nothing. What each means in practice: docs/federation.md.
"""

import math

import msgspec

from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import MAX_RANK

LEARNED = ("lora", "ffa", "rolora")
AGGREGATIONS = ("svd", "fedavg")
ROBUST = ("gate", "multi-krum", "geometric-median", "mean")
COHORTS = ("auto", "off")


class FederateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What devices learn at home, when their deltas make a round, and what of them counts."""

    learn_at_home: bool = True
    """ask devices that let deltas out to learn at home"""
    method: str = "lora"
    """what they learn: `lora` both factors, `ffa` B alone, `rolora` B and A in turn; noised deltas are never `lora`"""
    rank: int = 8
    """of what they learn; a device may choose a lower one"""
    alpha: float = 16.0
    lr: float = 0.0
    """0: as `[train] lr`"""
    updates: int = 5
    batch_trajectories: int = 16
    clip: float = 1.0
    """the L2 norm of all that one noised delta sends, at most"""
    sigma: float = 0.0
    """the least noise of one, in units of `clip`; each device adds more where its own budget asks for it"""
    aggregation: str = "svd"
    """`svd`: the exact mean of the updates, cut to `[train] rank`; `fedavg`: the mean of the factors, for comparison"""
    buffer: int = 0
    """devices whose deltas make a round; 0: more than half of those that let them out, at least 3 if there are so many,
    at most 64"""
    max_wait_s: float = 1800.0
    """fewer make one after so long"""
    max_staleness: int = 4
    """versions; an older delta is not used, a younger one counts 1 / sqrt(1 + its age)"""
    min_devices: int = 2
    """devices that a round with deltas must come from, those whose trajectories it learned from among them"""
    server_lr: float = 1.0
    """what part of the joined update is made"""
    robust: str = "gate"
    """`gate`: by the cosine with the server's own update, or with what most agree on where there is none; `multi-krum`,
    `geometric-median`; `mean`: no defence, for comparison"""
    max_norm: float = 1.0
    """an update is cut to so many times the median norm, of three or more one five times longer is left out; inf:
    neither"""
    min_cosine: float = 0.0
    """an update whose cosine with that is lower is left out, by `gate`"""
    duplicate_cosine: float = 0.98
    """updates of different devices that are so much alike count as one; above 1: they do not"""
    attackers: float = 0.25
    """the part of the devices that `multi-krum` assumes to lie"""
    max_tail: float = 0.3
    """a round whose joined update loses more than this part of its norm by the cut to the rank says so loudly"""
    secure: bool = False
    """noised deltas are summed so that the server sees no single one"""
    secure_min_devices: int = 5
    """of one secure sum, at least"""
    secure_phase_s: float = 600.0
    """how long a phase of one waits for its devices"""
    cohorts: str = "auto"
    """`auto`: devices whose updates keep conflicting learn apart; `off`: one adapter for all"""
    conflict_cosine: float = -0.1
    """a mean cosine between two groups of devices below this is a conflict"""
    conflict_rounds: int = 3
    """rounds in a row of it that split them"""


def check_federate(settings: FederateSettings) -> FederateSettings:
    """Return `settings` if rounds can be run with them.

    Raises:
        ConfigError: a value is out of bounds; the message names it.
    """
    s = settings
    rules = {
        f"method {s.method!r}: known are {LEARNED}": s.method in LEARNED,
        f"aggregation {s.aggregation!r}: known are {AGGREGATIONS}": s.aggregation in AGGREGATIONS,
        f"robust {s.robust!r}: known are {ROBUST}": s.robust in ROBUST,
        f"cohorts {s.cohorts!r}: known are {COHORTS}": s.cohorts in COHORTS,
        f"rank {s.rank} is not in 1..{MAX_RANK}": 1 <= s.rank <= MAX_RANK,
        f"alpha {s.alpha} is not in (0, 4096]": 0 < s.alpha <= 4096,
        f"lr {s.lr} is not in [0, 1]": 0 <= s.lr <= 1,
        f"updates {s.updates} is not in 1..65536": 1 <= s.updates <= 1 << 16,
        f"batch_trajectories {s.batch_trajectories} is not in 1..65536": 1 <= s.batch_trajectories <= 1 << 16,
        f"clip {s.clip} is not above 0": 0 < s.clip <= 1e6,
        f"sigma {s.sigma} is below 0": 0 <= s.sigma <= 1e6,
        f"buffer {s.buffer} is below 0": s.buffer >= 0,
        f"max_wait_s {s.max_wait_s} is not above 0": 0 < s.max_wait_s < math.inf,
        f"max_staleness {s.max_staleness} is below 0": s.max_staleness >= 0,
        f"min_devices {s.min_devices} is below 1": s.min_devices >= 1,
        f"server_lr {s.server_lr} is not in (0, 10]": 0 < s.server_lr <= 10,
        f"max_norm {s.max_norm} is not above 0": s.max_norm > 0,
        f"min_cosine {s.min_cosine} is not in [-1, 1]": -1 <= s.min_cosine <= 1,
        f"duplicate_cosine {s.duplicate_cosine} is not above 0": s.duplicate_cosine > 0,
        f"attackers {s.attackers} is not in [0, 0.5)": 0 <= s.attackers < 0.5,
        f"max_tail {s.max_tail} is not in [0, 1]": 0 <= s.max_tail <= 1,
        f"secure_min_devices {s.secure_min_devices} is below 3": s.secure_min_devices >= 3,
        f"secure_phase_s {s.secure_phase_s} is not above 0": 0 < s.secure_phase_s <= 86_400,
        f"conflict_cosine {s.conflict_cosine} is not in [-1, 1]": -1 <= s.conflict_cosine <= 1,
        f"conflict_rounds {s.conflict_rounds} is below 1": s.conflict_rounds >= 1,
        "secure sums need method 'ffa' or 'rolora'": not s.secure or s.method != "lora",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigError(f"[federate] {'; '.join(broken)}")
    return settings

"""What an operator can set about training: the `[train]` and `[classifier]` tables of the server's configuration.

A limit is switched off by the value that can never bite (`inf`, or 0 for a lower bound), not by a flag beside it.
Defaults of the loss: docs/training.md. Knows no torch, so that reading a configuration costs nothing.
"""

import math

import msgspec

from clawloop_shared.advantages import ADVANTAGES, GROUP_ADVANTAGES
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import LINEARS, MAX_RANK
from clawloop_shared.objective import LossSettings, loss_rules

_MAX_ALPHA = 4096.0
DEVICES = ("auto", "cpu", "mps", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "dense", "flex")
SWITCHES = ("auto", "on", "off")
CREDITS = ("trajectory", "step")


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A round of training. `loss` is a table of its own."""

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = LINEARS
    device: str = "auto"
    """`cpu`, `mps` or `cuda`; `auto` takes the fastest there is"""
    dtype: str = "auto"
    """of the base: `float32` or `bfloat16`; `auto` is bfloat16 on a GPU. The adapter is always float32"""
    attention: str = "auto"
    """`dense` or `flex`; `auto` is flex on CUDA"""
    activation_checkpointing: str = "auto"
    """`on` or `off`: whether activations are computed again in the backward pass; `auto` is on for a GPU"""
    lr: float = 5e-5
    """for models of 4 to 8 billion parameters; tiny ones need far more"""
    warmup_updates: int = 10
    decay_to: float = 0.2
    """part of `lr` that is left after `planned_updates`; the way there is linear"""
    planned_updates: int = 0
    """0: the learning rate does not decay"""
    batch_trajectories: int = 64
    updates_per_round: int = 5
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    advantage: str = "ema"
    """what a trajectory of no group is compared with: `ema` or `tracker`"""
    group_advantage: str = "dr-grpo"
    """what a trajectory is compared with whose group has others: `dr-grpo`, `loo` or `grpo`; `none`: as the rest"""
    credit: str = "trajectory"
    """`trajectory`: each step gets the reward of all; `step`: each gets what was said of it and of what came after"""
    discount: float = 1.0
    """how much of a later step's reward counts for the one before it, with `credit = "step"`"""
    reward_low: float = -1.0
    """rewards in [reward_low, reward_high] become [0, 1] for the baseline"""
    reward_high: float = 1.0
    hindsight: float = 0.5
    """how much the advantage of a token gains for each nat by which a hint makes it likelier; 0: hints are not used"""
    hindsight_clip: float = 1.0
    """the most nats that count"""
    row_tokens: int = 0
    """token budget of a packed row; 0: what fits the free memory, and less after it did not fit"""
    max_sample_tokens: int = 32768
    seed: int = 0
    threads: int = 1
    """for models of a few million parameters more threads are slower, far slower beside other busy processes"""
    min_ess: float = 0.5
    """a round whose effective sample size is below this is not published"""
    min_kept: float = 0.3
    """a round of which less than this part of the tokens could be used is not published"""
    max_entropy_fall: float = 0.5
    """a round whose entropy falls by more than this part is not published"""
    max_entropy_rise: float = 1.0
    """nor one whose entropy rises by more than this part; 1: to twice as much"""
    checkpoint_every_s: float = 120.0
    """how much work at most is done again after a crash; 0: the state is saved after each update"""
    processes: int = 1
    """processes on this machine that train together, a GPU each, by FSDP2"""
    loss: LossSettings = LossSettings()

    @property
    def round_trajectories(self) -> int:
        """How many rewarded trajectories a round needs."""
        return self.batch_trajectories * self.updates_per_round

    def lr_at(self, update: int) -> float:
        """The learning rate of the global update `update` (from 0): linear warm-up, then linear decay if planned."""
        warm = min(1.0, (update + 1) / max(1, self.warmup_updates))
        done = min(1.0, update / self.planned_updates) if self.planned_updates else 0.0
        return self.lr * warm * (1.0 - (1.0 - self.decay_to) * done)


def check_settings(settings: TrainSettings) -> TrainSettings:
    """Return `settings` if a round can be run with them.

    Raises:
        ConfigError: a value is out of bounds; the message names it.
    """
    loss = settings.loss
    rules = {
        f"rank {settings.rank} is not in 1..{MAX_RANK}": 1 <= settings.rank <= MAX_RANK,
        f"target_modules {settings.target_modules}: known are {LINEARS}": set(settings.target_modules) <= set(LINEARS),
        "target_modules is empty": bool(settings.target_modules),
        f"alpha {settings.alpha} is not in (0, {_MAX_ALPHA:g}]": 0 < settings.alpha <= _MAX_ALPHA,
        f"lr {settings.lr} is not above 0": 0 < settings.lr < math.inf,
        f"beta1 {settings.beta1} or beta2 {settings.beta2} is not in [0, 1)": _are_decays(settings),
        f"weight_decay {settings.weight_decay} is below 0": 0 <= settings.weight_decay < math.inf,
        f"clip_norm {settings.clip_norm} is not above 0": settings.clip_norm > 0,
        f"decay_to {settings.decay_to} is not in [0, 1]": 0 <= settings.decay_to <= 1,
        f"advantage {settings.advantage!r}: known are {sorted(ADVANTAGES)}": settings.advantage in ADVANTAGES,
        f"batch_trajectories {settings.batch_trajectories} is below 1": settings.batch_trajectories >= 1,
        f"updates_per_round {settings.updates_per_round} is below 1": settings.updates_per_round >= 1,
        f"hindsight {settings.hindsight} is below 0": 0 <= settings.hindsight < math.inf,
        f"hindsight_clip {settings.hindsight_clip} is not above 0": 0 < settings.hindsight_clip < math.inf,
        f"reward_low {settings.reward_low} is not below reward_high": settings.reward_low < settings.reward_high,
        f"device {settings.device!r}: known are {DEVICES}": settings.device in DEVICES,
        f"dtype {settings.dtype!r}: known are {DTYPES}": settings.dtype in DTYPES,
        f"attention {settings.attention!r}: known are {ATTENTIONS}": settings.attention in ATTENTIONS,
        f"activation_checkpointing {settings.activation_checkpointing!r}: known are {SWITCHES}": (
            settings.activation_checkpointing in SWITCHES
        ),
        f"credit {settings.credit!r}: known are {CREDITS}": settings.credit in CREDITS,
        f"discount {settings.discount} is not in [0, 1]": 0 <= settings.discount <= 1,
        f"max_entropy_fall {settings.max_entropy_fall} is not above 0": settings.max_entropy_fall > 0,
        f"max_entropy_rise {settings.max_entropy_rise} is not above 0": settings.max_entropy_rise > 0,
        f"checkpoint_every_s {settings.checkpoint_every_s} is below 0": settings.checkpoint_every_s >= 0,
        f"processes {settings.processes} is below 1": settings.processes >= 1,
        f"row_tokens {settings.row_tokens} is below 0": settings.row_tokens >= 0,
        f"max_sample_tokens {settings.max_sample_tokens} is below 2": settings.max_sample_tokens >= 2,
        f"threads {settings.threads} is below 1": settings.threads >= 1,
        f"group_advantage {settings.group_advantage!r}: known are {sorted(GROUP_ADVANTAGES)} and 'none'": (
            settings.group_advantage in {*GROUP_ADVANTAGES, "none"}
        ),
        f"min_ess {settings.min_ess} is not in [0, 1]": 0 <= settings.min_ess <= 1,
        f"min_kept {settings.min_kept} is not in [0, 1]": 0 <= settings.min_kept <= 1,
        **loss_rules(loss),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigError(f"[train] {'; '.join(broken)}")
    return settings


def _are_decays(settings: TrainSettings) -> bool:
    return 0 <= settings.beta1 < 1 and 0 <= settings.beta2 < 1


class ClassifierSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model judges what devices sent, and how sure its word is. Without a path none does."""

    path: str = ""
    label: int = 1
    """the label that means good, where there are several"""
    weight: float = 0.5
    max_tokens: int = 2048
    """of a prompt with its answer; the prompt loses its beginning"""
    batch: int = 8


def check_classifier(settings: ClassifierSettings) -> ClassifierSettings:
    """Return `settings` if a classifier can be run with them.

    Raises:
        ConfigError: a value is out of bounds; the message names it.
    """
    rules = {
        f"label {settings.label} is below 0": settings.label >= 0,
        f"weight {settings.weight} is not in (0, 1]": 0 < settings.weight <= 1,
        f"max_tokens {settings.max_tokens} is below 16": settings.max_tokens >= 16,
        f"batch {settings.batch} is below 1": settings.batch >= 1,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigError(f"[classifier] {'; '.join(broken)}")
    return settings

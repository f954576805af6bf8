"""Which scorers run on this edge, and how (`[signals]`). Every key is described in docs/configuration.md."""

from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_edge.signals.limits import ScorerLimits
from clawloop_edge.signals.model_settings import (
    HindsightSettings,
    JudgeSettings,
    NextStateSettings,
    RewardModelSettings,
)

_Weight = Annotated[float, Meta(ge=0, le=1)]


class RuleSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The owner's own function, `module:name`; `path` is the folder to import it from.

    `call_s` is how long one call may take, `timeout_s` how long one may wait for its turn as well. `memory_bytes` is
    the address space of its process.
    """

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 120.0
    at_once: Annotated[int, Meta(ge=1, le=64)] = 32
    function: str = ""
    path: str = ""
    call_s: Annotated[float, Meta(gt=0, le=600)] = 2.0
    memory_bytes: Annotated[int, Meta(ge=64 << 20, le=1 << 40)] = 1 << 30


class ExactSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metadata's answer against the last reply. `keys` is where the metadata may have it, `.` leads inwards."""

    keys: tuple[str, ...] = ("answer", "reward_model.ground_truth")
    ignore_case: bool = True


class RegexSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A pattern whose first group in the last reply is compared with the metadata's answer; the metadata's
    `answer_regex` goes before it."""

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 120.0
    at_once: Annotated[int, Meta(ge=1, le=64)] = 32
    pattern: str = ""
    keys: tuple[str, ...] = ("answer", "reward_model.ground_truth")
    ignore_case: bool = True
    call_s: Annotated[float, Meta(gt=0, le=600)] = 2.0


class ToolOutcomeSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the outcome of a tool call is worth: `failed` and `repeated` are the weights of a value of -1, `worked` that
    of a value of 1, once a run."""

    failed: _Weight = 0.5
    repeated: _Weight = 0.3
    worked: _Weight = 0.05


class SignalsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which scorers are asked, when a run counts as left alone, and how often one that failed is asked again.

    `untrainable`: they also judge runs of which nothing may be learned, for drills and for reports on other servers.
    `compute_reward` names the scorer of Claw-R1's `/compute_reward`; empty: the first configured one that can.
    """

    scorers: tuple[str, ...] = ("tool-outcome", "next-state")
    compute_reward: str = ""
    untrainable: bool = False
    idle_s: Annotated[float, Meta(ge=0, le=365 * 86_400)] = 900.0
    tries: Annotated[int, Meta(ge=1, le=100)] = 8
    retry_after_s: Annotated[float, Meta(ge=0, le=3_600)] = 10.0
    rule: RuleSettings = RuleSettings()
    exact: ExactSettings = ExactSettings()
    regex: RegexSettings = RegexSettings()
    tool_outcome: ToolOutcomeSettings = ToolOutcomeSettings()
    next_state: NextStateSettings = NextStateSettings()
    judge: JudgeSettings = JudgeSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    hindsight: HindsightSettings = HindsightSettings()

    def of(self, scorer: str) -> ScorerLimits:
        """The settings of one scorer, by its name."""
        found: ScorerLimits = getattr(self, scorer.replace("-", "_"))
        return found

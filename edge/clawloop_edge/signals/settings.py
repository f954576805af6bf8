"""Which scorers run on this edge, and how (`[signals]`). Every key is described in docs/configuration.md."""

from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_edge.signals.limits import ScorerLimits


class RuleSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The owner's own function, `module:name`, imported with `path` before all else on the way.

    `memory_bytes` is the address space of its process, `cpu_s` what one judgement may compute.
    """

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 10.0
    function: str = ""
    path: str = ""
    memory_bytes: Annotated[int, Meta(ge=64 << 20, le=1 << 40)] = 1 << 30


class ExactSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The metadata's answer against the last reply; `key` is where the metadata has it."""

    key: str = "answer"
    ignore_case: bool = True


class RegexSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A pattern whose first group in the last reply is the answer; the metadata's `answer_regex` goes before it."""

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 10.0
    pattern: str = ""
    key: str = "answer"
    ignore_case: bool = True


class ToolOutcomeSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the outcome of a tool call is worth: `failed` and `repeated` are the weights of a value of -1, `worked` that
    of a value of 1, once a run."""

    failed: Annotated[float, Meta(ge=0, le=1)] = 0.5
    repeated: Annotated[float, Meta(ge=0, le=1)] = 0.3
    worked: Annotated[float, Meta(ge=0, le=1)] = 0.05


class SignalsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which scorers are asked, in this order, when a run is over for want of more, and how often one is tried again.

    `compute_reward` names the scorer of Claw-R1's `/compute_reward`; empty: the first configured that can.
    """

    scorers: tuple[str, ...] = ("tool-outcome", "next-state")
    compute_reward: str = ""
    idle_s: Annotated[float, Meta(ge=0, le=86_400 * 365)] = 900.0
    tries: Annotated[int, Meta(ge=1, le=100)] = 5
    retry_after_s: Annotated[float, Meta(ge=0, le=86_400)] = 5.0
    rule: RuleSettings = RuleSettings()
    exact: ExactSettings = ExactSettings()
    regex: RegexSettings = RegexSettings()
    tool_outcome: ToolOutcomeSettings = ToolOutcomeSettings()

"""How the scorers work that read what people say, or ask a model. Every key is described in docs/configuration.md."""

from typing import Annotated, Literal

from msgspec import Meta

from clawloop_edge.signals.limits import ScorerLimits

_Weight = Annotated[float, Meta(ge=0, le=1)]
"""0: what it would weigh gives no verdict"""
LOCAL = "local"
"""as a URL: the model that this edge serves"""


class NextStateSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the user's next turn is worth by what it is, and the tables it is looked up in.

    `overlap` is how much of a request must be the same (Dice's measure of its words) for it to be a repetition.
    """

    languages: tuple[str, ...] = ("en", "de")
    reaction: _Weight = 1.0
    correction: _Weight = 0.8
    repetition: _Weight = 0.7
    thanks: _Weight = 0.6
    retry: _Weight = 0.3
    abandonment: _Weight = 0.2
    overlap: Annotated[float, Meta(ge=0.5, le=1)] = 0.8


class EndpointSettings(ScorerLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a model is asked. `remote` allows an address that is not of this machine: life goes to a third party.

    The key is in the environment variable `key_env` or in the 0600 file `key_file`, and never in the configuration.
    `max_chars` are shown of each judged text, its head and its tail.
    """

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 120.0
    url: str = ""
    model: str = ""
    key_env: str = ""
    key_file: str = ""
    remote: bool = False
    max_chars: Annotated[int, Meta(ge=200, le=1_000_000)] = 8_000


class AskedSettings(EndpointSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model that writes: the base URL of an OpenAI-compatible server, or `local` for the one that is served here.

    `schema` says whether its answer is forced into a form; `auto` leaves it when a server refuses that.
    """

    url: str = LOCAL
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.6
    max_tokens: Annotated[int, Meta(ge=16, le=32_768)] = 400
    schema: Literal["auto", "off"] = "auto"


class JudgeSettings(AskedSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A generative reward model: how many samples of it vote on a case, and what a unanimous vote weighs."""

    votes: Annotated[int, Meta(ge=1, le=15)] = 3
    weight: Annotated[float, Meta(gt=0, le=1)] = 0.8


class RewardModelSettings(EndpointSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A classifier behind HTTP (vLLM's `/classify`).

    `value` says how the number of the class `positive` is read (where there is one class, its number): a `probability`,
    or a raw `score`, of which `tanh(score / scale)` is taken.
    """

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    value: Literal["probability", "score"] = "probability"
    positive: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    scale: Annotated[float, Meta(gt=0, le=1_000)] = 1.0
    weight: Annotated[float, Meta(gt=0, le=1)] = 0.5


class HindsightSettings(AskedSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who writes what an answer should have known, how long that may be, and what its verdict weighs."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.2
    hint_chars: Annotated[int, Meta(ge=20, le=2_000)] = 400
    weight: Annotated[float, Meta(gt=0, le=1)] = 0.7

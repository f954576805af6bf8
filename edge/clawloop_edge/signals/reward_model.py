"""The scorer `reward-model`: a classifier behind HTTP is given the conversation as one text, and says how good it is.

The form is that of vLLM's `/classify` (docs.vllm.ai, pooling models; SGLang has it as `/v1/classify`): `{"model",
"input"}` in, `{"data": [{"label", "probs", "num_classes"}]}` out. Its calls are no calls of an agent.
"""

import math
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.engine.aside import shortened, unmarked
from clawloop_edge.errors import ScorerFailed
from clawloop_edge.signals.asking import Clearing, Endpoint, checked_url
from clawloop_edge.signals.judge import answer_of
from clawloop_edge.signals.model_settings import RewardModelSettings
from clawloop_edge.signals.next_state import last_turn
from clawloop_edge.signals.protocol import Case, Moment, Verdict
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.signals.registry import Deps

SOURCE = "reward-model"
_WHERE = "signals.reward_model"


class Classified(msgspec.Struct, frozen=True):
    """What a classifier says of one text: a number a class, in their order."""

    probs: list[float]


class _Answer(msgspec.Struct):
    data: list[Classified]


class RewardModelScorer:
    """Asks a classifier once a case. It sees request and answer: reward models know nothing of what came next."""

    name = SOURCE
    moments = frozenset({Moment.FOLLOWED, Moment.ENDED})

    def __init__(self, deps: "Deps") -> None:
        """Raises ConfigError: no classifier to ask, or it may not be asked."""
        self._settings = deps.settings.reward_model
        if not self._settings.url:
            raise ConfigError(f"[{_WHERE}] url is empty; name a classifier, like http://127.0.0.1:8000/classify")
        url = checked_url(self._settings.url, _WHERE)
        self._endpoint = Endpoint(url, self._settings, where=_WHERE, deps=deps)
        self._clearing = Clearing(deps.border, remote=self._endpoint.remote)

    async def score(self, case: Case) -> list[Verdict]:
        """What the classifier makes of the conversation.

        Raises:
            ScorerFailed: it cannot be asked now, or says what cannot be read.
            NotScorable: the conversation may not be shown to it.
        """
        texts = [last_turn(case.steps[0].messages), answer_of(case.steps)]
        if not all(text.strip() for text in texts):
            return []
        most = self._settings.max_chars
        request, answer = (shortened(unmarked(t), most) for t in await self._clearing.texts(case, texts))
        body = {"model": self._settings.model, "input": f"User: {request}\n\nAssistant: {answer}"}
        status, data = await self._endpoint.post(body)
        if status >= 300:
            raise ScorerFailed(f"the reward model refuses the request ({status}); check [{_WHERE}] url and model")
        value = value_of(read(data), self._settings)
        return [Verdict(value=value, weight=self._settings.weight, evidence=f"by {self._settings.value}")]

    async def close(self) -> None:
        """Close its connections."""
        await self._endpoint.close()


def read(data: bytes) -> Classified:
    """What an answer says of the one text. Raises ScorerFailed: it is none of this form."""
    try:
        found = msgspec.json.decode(data, type=_Answer).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ScorerFailed(f"the reward model's answer is not of /classify's form; check [{_WHERE}] url") from error
    if len(found) != 1 or not found[0].probs or not all(map(math.isfinite, found[0].probs)):
        raise ScorerFailed("the reward model answered without one finite number a class")
    return found[0]


def value_of(found: Classified, settings: RewardModelSettings) -> float:
    """A value in [-1, 1]: `2 p - 1` of the positive class, or `tanh(score / scale)` of a raw number.

    Raises:
        ScorerFailed: it has no such class, or its number is no probability.
    """
    at = 0 if len(found.probs) == 1 else settings.positive
    if at >= len(found.probs):
        raise ScorerFailed(f"the reward model has {len(found.probs)} classes and no {at}; set [{_WHERE}] positive")
    number = found.probs[at]
    if settings.value == "score":
        return math.tanh(number / settings.scale)
    if not -1e-6 <= number <= 1 + 1e-6:
        raise ScorerFailed(f"the reward model says {number:g}, no probability; set [{_WHERE}] value = 'score'")
    return min(1.0, max(-1.0, 2 * number - 1))

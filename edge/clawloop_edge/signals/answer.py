"""Is it the answer that the metadata names? `ExactScorer` compares the whole of the last reply, `RegexScorer` the part
that a pattern finds in it. Without an answer in the metadata neither has an opinion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from clawloop_edge.errors import NotScorable
from clawloop_edge.sessions.tree import text_of
from clawloop_edge.signals.protocol import Case, Moment, Verdict
from clawloop_edge.signals.rule import RuleChild
from clawloop_edge.signals.rule_child import Begin, Found, Match

if TYPE_CHECKING:
    from clawloop_edge.pool.records import Json
    from clawloop_edge.signals.settings import ExactSettings, RegexSettings

_MOMENTS = frozenset({Moment.ENDED})
_REGEX_KEY = "answer_regex"
_MAX_DIGITS = 100
_THINK_END = "</think>"
_CHILD_BYTES = 1 << 30


class ExactScorer:
    """1 if the last reply is the answer, else -1."""

    name = "exact"
    moments = _MOMENTS

    def __init__(self, settings: ExactSettings) -> None:
        self._settings = settings

    async def score(self, case: Case) -> list[Verdict]:
        """Compare; no verdict where the metadata has no answer."""
        answers = answers_in(case.metadata, self._settings.keys)
        return _verdict(final_text(case), answers, ignore_case=self._settings.ignore_case)

    async def close(self) -> None:
        """Nothing is open."""


class RegexScorer:
    """1 if the pattern finds the answer in the last reply, else -1. The pattern runs where it can be stopped."""

    name = "regex"
    moments = _MOMENTS

    def __init__(self, settings: RegexSettings) -> None:
        self._settings = settings
        self.child = RuleChild(Begin("", "", settings.call_s, _CHILD_BYTES), name=self.name)

    async def score(self, case: Case) -> list[Verdict]:
        """Search and compare. Raises as `RuleChild.ask` does."""
        pattern = case.metadata.get(_REGEX_KEY) or self._settings.pattern
        answers = answers_in(case.metadata, self._settings.keys)
        if not pattern or not answers or not isinstance(pattern, str):
            return []
        question = Match(_json(pattern), _json(final_text(case)), self._settings.ignore_case)
        found = await self.child.ask(question)
        if not isinstance(found, Found):
            raise NotScorable("regex: its process answered something else")
        if found.text is None:
            return [Verdict(value=-1.0, evidence="the pattern finds nothing")]
        return _verdict(json.loads(found.text), answers, ignore_case=self._settings.ignore_case)

    async def close(self) -> None:
        """End its process."""
        await self.child.close()


def answers_in(metadata: Json, keys: Sequence[str]) -> list[str]:
    """The right answers that metadata name: the first key that is there; a list is a choice of them."""
    for key in keys:
        found: Any = metadata
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        choices = found if isinstance(found, list) else [found]
        texts = [str(each) for each in choices if isinstance(each, str | int | float) and not isinstance(each, bool)]
        if texts:
            return texts
    return []


def final_text(case: Case) -> str:
    """What the last reply says, without the thoughts before it."""
    text = text_of(case.answer.reply.get("content"))
    return text.rpartition(_THINK_END)[2].strip()


def same_answer(said: str, wanted: str, *, ignore_case: bool) -> bool:
    """Whether two texts are the same but for white space; numbers are compared as numbers: 1,000 is 1000.0."""
    left, right = (" ".join(text.split()) for text in (said, wanted))
    if ignore_case:
        left, right = left.casefold(), right.casefold()
    if left == right:
        return bool(left)
    numbers = _number(left), _number(right)
    return None not in numbers and numbers[0] == numbers[1]


def _number(text: str) -> Decimal | None:
    plain = text.strip(" $€£%").rstrip(".").replace(",", "")
    if not plain or len(plain) > _MAX_DIGITS or not any(c.isdigit() for c in plain):
        return None
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return None
    return number if math.isfinite(number) else None


def _verdict(said: str, answers: Sequence[str], *, ignore_case: bool) -> list[Verdict]:
    if not answers:
        return []
    right = any(same_answer(said, wanted, ignore_case=ignore_case) for wanted in answers)
    evidence = "the reply is the answer" if right else "the reply is not the answer"
    return [Verdict(value=1.0 if right else -1.0, evidence=evidence)]


def _json(text: str) -> bytes:
    return json.dumps(text).encode()

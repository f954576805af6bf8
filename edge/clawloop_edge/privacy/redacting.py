"""Steps as they may leave at level `redacted`: ids without secrets, and only logprobs that are still true of them.

A logprob says how likely a token was after all before it. Where a token was replaced there is none; behind the first
replaced one the kept ones are of a text that is not sent, so they are computed again under the very same adapter, or
left out. Knows no pattern and no process: `search` finds, `rescore` computes. Rules: docs/redaction.md.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from clawloop_edge.engine.protocol import Engine
from clawloop_edge.errors import EngineBusy, EngineError, EngineGone
from clawloop_edge.privacy.redact.tokens import Redaction
from clawloop_edge.privacy.redact_worker import JobFailed
from clawloop_shared.errors import ClawloopError
from clawloop_shared.records import Policy, Step

log = logging.getLogger(__name__)

MOST_MASKED = 0.2
"""part of a response that may lack logprobs, where they could not be computed again"""
RESCORE_S = 300.0


class Search(Protocol):
    """Finds and takes out what must not leave: `redact_worker.RedactWorker`, or `redact.turns.TurnSearch` itself."""

    def learn(self, ids: Sequence[int], *, session_id: str) -> None: ...
    def redact(self, ids: Sequence[int], *, session_id: str, also: Iterable[str]) -> Redaction: ...
    def texts(self, ids: Sequence[int]) -> list[str]: ...
    def text(self, text: str, *, session_id: str) -> str: ...
    def close(self) -> None: ...


class Rescore(Protocol):
    """Logprobs (nats) of a response under a policy, one an id; None: that policy is not at hand."""

    def __call__(
        self, prompt_ids: list[int], response_ids: list[int], *, policy: Policy, temperature: float
    ) -> list[float] | None: ...


Opinion = Callable[[Sequence[str]], Iterable[str]]
"""Further things to take out of these texts (second_opinion.py)."""


class Counts(msgspec.Struct):
    """What became of the steps that were redacted: `failed` ones could not be searched, `dropped` ones had too little
    left, `cut` ones end where the first secret was."""

    clean: int = 0
    rescored: int = 0
    cut: int = 0
    dropped: int = 0
    failed: int = 0


class Redactor:
    """Redacts steps, oldest first. Calls wait for the search and for the engine: not for the event loop."""

    def __init__(self, search: Search, *, rescore: Rescore | None = None, opinion: Opinion | None = None) -> None:
        self._search, self._rescore, self._opinion = search, rescore, opinion
        self.counts = Counts()

    def learn(self, steps: Iterable[Step]) -> None:
        """Look at steps that will be redacted together: what one gives away is taken out of all of its session."""
        for step in steps:
            try:
                self._search.learn(step.token_ids, session_id=step.session_id)
            except JobFailed as error:
                log.warning("step %s: %s", step.step_id, error)

    def step(self, step: Step) -> Step | None:
        """The step without what must not leave, token for token; None if it must not leave at all.

        Raises:
            RedactionError: nothing can be searched at the moment.
            EngineGone, EngineBusy: the engine cannot score now.
        """
        try:
            redaction = self._redact(step)
        except JobFailed as error:
            log.warning("step %s: %s", step.step_id, error)
            self.counts.failed += 1
            return None
        if redaction.ids == step.token_ids:
            self.counts.clean += 1
            return step
        return self._scored(step, redaction)

    def text(self, text: str, *, session_id: str = "") -> str:
        """A text without what must not leave. Raises RedactionError."""
        return self._search.text(text, session_id=session_id) if text else text

    def is_clean(self, ids: Sequence[int], *, session_id: str) -> bool:
        """Whether nothing would be taken out of tokens that are no step. Raises RedactionError."""
        try:
            return not self._search.redact(ids, session_id=session_id, also=()).spans
        except JobFailed:
            return False

    def close(self) -> None:
        """End what searches."""
        self._search.close()

    def _redact(self, step: Step) -> Redaction:
        more = self._opinion(self._search.texts(step.token_ids)) if self._opinion else ()
        return self._search.redact(step.token_ids, session_id=step.session_id, also=more)

    def _scored(self, step: Step, redaction: Redaction) -> Step | None:
        """The step with the new ids, and each logprob that is true of them."""
        prompt, ids = len(step.prompt_ids), redaction.ids
        logprobs = kept_logprobs(step, redaction)
        hidden = {at - prompt for start, length in redaction.spans for at in range(start, start + length)}
        open_places = [at for at, logprob in enumerate(logprobs) if logprob is None and at not in hidden]
        again = self._again(step, redaction) if open_places else None
        for at in open_places:
            logprobs[at] = true_logprob(again[at]) if again else None
        masked = sum(logprob is None for logprob in logprobs)
        cut = any(logprobs[at] is None for at in open_places)
        if masked == len(logprobs) or (cut and masked > MOST_MASKED * len(logprobs)):
            self.counts.dropped += 1
            return None
        self.counts.cut += cut
        self.counts.rescored += not cut
        return msgspec.structs.replace(
            step,
            prompt_ids=ids[:prompt],
            response_ids=ids[prompt:],
            response_logprobs=logprobs,
            redacted=redaction.spans,
        )

    def _again(self, step: Step, redaction: Redaction) -> list[float] | None:
        if self._rescore is None:
            return None
        prompt = len(step.prompt_ids)
        found = self._rescore(
            redaction.ids[:prompt],
            redaction.ids[prompt:],
            policy=step.policy,
            temperature=step.sampling.temperature,
        )
        return found if found is not None and len(found) == len(step.response_ids) else None


def kept_logprobs(step: Step, redaction: Redaction) -> list[float | None]:
    """The logprobs of a step up to its first replaced token, and None from there on."""
    before = max(0, redaction.spans[0][0] - len(step.prompt_ids))
    kept = list(step.response_logprobs[:before])
    return kept + [None] * (len(step.response_ids) - len(kept))


def true_logprob(value: float) -> float | None:
    """A logprob as a record may have it: a number that is not above 0 but by rounding; None otherwise."""
    return min(value, 0.0) if math.isfinite(value) and value <= 1e-4 else None


def rescore_with(engine: Engine, loop: asyncio.AbstractEventLoop, *, within_s: float = RESCORE_S) -> Rescore:
    """Rescoring by the edge's own engine, between the steps of its batch, so that no call waits for it.

    Raises, when called, EngineGone or EngineBusy: it cannot be done now, but may be later.
    """

    async def score(
        prompt_ids: list[int], response_ids: list[int], *, policy: Policy, temperature: float
    ) -> list[float]:
        if engine.policy_of(policy.version) != policy:
            raise EngineError(f"adapter {policy.version} is loaded with other weights than those that sampled the step")
        return await engine.score(prompt_ids, response_ids, version=policy.version, temperature=temperature)

    def rescore(
        prompt_ids: list[int], response_ids: list[int], *, policy: Policy, temperature: float
    ) -> list[float] | None:
        work = score(prompt_ids, response_ids, policy=policy, temperature=temperature)
        answer = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return answer.result(within_s)
        except (EngineGone, EngineBusy):
            raise
        except ClawloopError as error:
            log.info("a redacted step is cut instead of scored again: %s", error)
        except TimeoutError:
            answer.cancel()
            log.warning("a redacted step is cut instead of scored again: not done within %.0f s", within_s)
        return None

    return rescore

"""Claw-R1's `/compute_reward`: a response, judged by a scorer. Nothing is kept. docs/claw-r1.md."""

import asyncio

import msgspec
from aiohttp import web

from clawloop_edge.engine.protocol import ChatTokenizer
from clawloop_edge.errors import NotScorable, RequestError, ScorerFailed
from clawloop_edge.gateway.body import Json, convert_body, decode_json
from clawloop_edge.gateway.connections import body_of
from clawloop_edge.gateway.prompt import check_ids
from clawloop_edge.gateway.serving import now_ms
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.signals.protocol import Case, Moment, Scorer
from clawloop_shared.ids import new_id
from clawloop_shared.records import Policy, Sampling, Step, Target

TIMEOUT_S = 300.0


class RewardBody(msgspec.Struct):
    """A response to be judged."""

    prompt_ids: list[int]
    response_ids: list[int]
    dataset_fields: Json = {}


class RewardHandler:
    """The endpoint. No scorer: none is configured. No tokenizer: the model's server says no token ids."""

    def __init__(self, scorer: Scorer | None, tokenizer: ChatTokenizer | None) -> None:
        self._scorer, self._tokenizer = scorer, tokenizer

    async def handle(self, request: web.Request) -> web.Response:
        """POST /compute_reward: a score in [-1, 1], or null where the scorer has no opinion."""
        body = convert_body(decode_json(await body_of(request)), RewardBody)
        if self._scorer is None or self._tokenizer is None:
            raise RequestError(
                "no scorer is configured on this edge; name one in [signals] scorers, or in [signals] compute_reward",
                status=503,
                code="no_scorer",
            )
        check_ids(body.prompt_ids, self._tokenizer, param="prompt_ids")
        check_ids(body.response_ids, self._tokenizer, param="response_ids")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                verdicts = await self._scorer.score(_case(body, self._tokenizer))
        except NotScorable as error:
            raise RequestError(str(error), status=422, code="not_scorable") from error
        except (ScorerFailed, TimeoutError) as error:
            problem = str(error) or f"{self._scorer.name} gave no answer within {TIMEOUT_S:g} s"
            raise RequestError(problem, status=503, code="scorer_failed") from error
        said = verdicts[0] if verdicts else None
        info: Json = {"scorer": self._scorer.name}
        if said is not None:
            info |= {"weight": said.weight, "evidence": said.evidence, "comment": said.comment}
        return web.json_response({"reward_score": said.value if said else None, "reward_extra_info": info})


def _case(body: RewardBody, tokenizer: ChatTokenizer) -> Case:
    """What is judged: the prompt, as it was rendered, is one message."""
    at_ms, text = now_ms(), tokenizer.visible(body.response_ids)
    step = Step(
        step_id=new_id(),
        session_id="",
        run_id="",
        prompt_ids=body.prompt_ids,
        response_ids=body.response_ids,
        response_logprobs=[],
        policy=Policy("unknown"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=at_ms,
        untrainable="not kept",
    )
    kept = KeptStep(
        step=step,
        messages=[{"role": "user", "content": tokenizer.decode(body.prompt_ids)}],
        reply={"role": "assistant", "content": text},
        text=text,
        started_ms=at_ms,
        finished_ms=at_ms,
    )
    return Case(
        moment=Moment.ENDED,
        target=Target.TRAJECTORY,
        target_id=step.step_id,
        steps=[kept],
        metadata=body.dataset_fields,
    )

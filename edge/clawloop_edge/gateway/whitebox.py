"""Claw-R1's endpoints for programs that hold the tokens themselves: `/generate`, `/submit_steps`.

A submitted step is learned from only if we sampled it: if it is, or begins, what `/generate` gave for its prompt. Then
our own logprobs are kept. Anything else is kept and says why it is not learned from. docs/claw-r1.md.
"""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from hashlib import sha256
from typing import Annotated, Any, Protocol

import msgspec
from aiohttp import web
from msgspec import Meta

from clawloop_edge.engine.protocol import ChatTokenizer
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.body import Json, One, Refused, convert_body, decode_json, pinned_version, unsupported
from clawloop_edge.gateway.call import Call
from clawloop_edge.gateway.chat_request import Count, MinP, Seed, Temperature, TopK, TopP, sampling_of
from clawloop_edge.gateway.connections import body_of
from clawloop_edge.gateway.draws import Draw, Draws
from clawloop_edge.gateway.prompt import check_ids
from clawloop_edge.gateway.recorder import SEAT_INDEX, reason_after, seat_key
from clawloop_edge.gateway.serving import Service, now_ms
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.gateway.trajectories import (
    SOURCE,
    KeepsSignals,
    Reward,
    TrajectoryAccess,
    check_metadata,
    check_name,
    check_reward,
    group_of,
    signal_id,
)
from clawloop_edge.gateway.trajectory_store import Entry, Facts, TrajectoryStore
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions.identity import identify
from clawloop_edge.sessions.names import SessionNames
from clawloop_shared.errors import ClawloopError, RecordError
from clawloop_shared.ids import new_id
from clawloop_shared.records import MAX_STEP_TOKENS, Channel, Policy, Sampling, Signal, Step, Target, check_step

_LOG = logging.getLogger(__name__)
NOT_DRAWN = "not sampled here"
IMAGES = "images are not supported"
_TOLERANCE = 1e-4


class StepPool(KeepsSignals, Protocol):
    """The part of the pool that steps need."""

    def keep_step(self, kept: KeptStep, *, index: dict[str, bytes]) -> "Future[None]": ...
    def find_step_by(self, name: str, value: bytes, *, session_id: str | None = None) -> str | None: ...
    def get_step(self, step_id: str) -> KeptStep | None: ...


TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0})]


class SamplingParams(msgspec.Struct):
    """How `/generate` samples; further fields are ignored."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    repetition_penalty: One = None
    stop: Refused = None
    model: str | None = None


class GenerateBody(msgspec.Struct):
    """A prompt of token ids, to be continued."""

    prompt_ids: Annotated[list[TokenId], Meta(min_length=1)]
    sampling_params: SamplingParams = msgspec.field(default_factory=SamplingParams)
    image_data: Refused = None
    video_data: Refused = None


class StepPayload(msgspec.Struct):
    """One step as a client hands it in."""

    prompt_ids: Annotated[list[TokenId], Meta(min_length=1)]
    response_ids: Annotated[list[TokenId], Meta(min_length=1)]
    multi_modal_data: Any = None
    reward: Reward | None = None
    rollout_log_probs: list[float | None] | None = None
    trajectory_uid: str = ""
    prompt_uid: str = ""
    step_index: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    is_last: bool = False
    metadata: Json | None = None


class SubmitBody(msgspec.Struct):
    """Steps of any trajectories."""

    steps: list[Json]


class _New(msgspec.Struct, kw_only=True):
    """A step that is to be kept."""

    where: str
    payload: StepPayload
    entry: Entry
    draw: Draw | None = None


class WhiteboxHandler:
    """The endpoints. No tokenizer: the model's server says no token ids, and nothing is generated."""

    def __init__(
        self,
        service: Service,
        pool: StepPool,
        *,
        settings: GatewaySettings,
        store: TrajectoryStore,
        access: TrajectoryAccess,
        draws: Draws,
        tokenizer: ChatTokenizer | None,
        names: SessionNames,
    ) -> None:
        self._service, self._pool, self._settings = service, pool, settings
        self._store, self._access, self._draws = store, access, draws
        self._tokenizer, self._names = tokenizer, names
        self._proving = asyncio.Lock()

    async def generate(self, request: web.Request) -> web.Response:
        """POST /generate: token ids in; sampled ids, their logprobs and why it ended out."""
        if self._tokenizer is None:
            raise RequestError("the model's server gives no token ids; use /v1/chat/completions", status=400)
        data = await body_of(request)
        body, incognito = convert_body(decode_json(data), GenerateBody), identify(request.headers).incognito
        live = await self._service.sample(request, _generation(body, self._settings), size_bytes=len(data))
        draw = Draw(
            draw_id=new_id(),
            created_ms=live.started_ms,
            response_ids=live.reply.ids,
            logprobs=live.reply.logprobs,
            policy=live.answer.policy,
            sampling=live.call.sampling,
            finish_reason=live.reply.ended,
            untrainable=reason_after(live),
        )
        if not incognito:
            await self._keep_draw(body.prompt_ids, draw)
        given = {"token_ids": draw.response_ids, "log_probs": draw.logprobs, "stop_reason": draw.finish_reason}
        return web.json_response(given)

    async def _keep_draw(self, prompt_ids: list[int], draw: Draw) -> None:
        try:
            await self._draws.keep(prompt_ids, draw)
        except ClawloopError as error:  # the user is served first: what is not kept proves no step
            _LOG.error("what /generate gave could not be kept: %s", type(error).__name__)

    async def submit(self, request: web.Request) -> web.Response:
        """POST /submit_steps: keep steps; the answer says how many of them are on disk now."""
        channel = _channel(request.query.get("channel", Channel.TRAIN.value))
        body = convert_body(decode_json(await body_of(request)), SubmitBody)
        payloads = [
            (f"steps[{i}]", convert_body(step, StepPayload, where=f"steps[{i}]")) for i, step in enumerate(body.steps)
        ]
        for where, payload in payloads:
            self._check(payload, where)
            payload.trajectory_uid = self._names.id_of(payload.trajectory_uid)
        payloads.sort(key=lambda named: (named[1].trajectory_uid, named[1].step_index))
        await asyncio.shield(self._take(request.headers, payloads, channel))  # a client that goes away leaves no half
        return web.json_response({"accepted": len(payloads)})

    async def _take(
        self, headers: Mapping[str, str], payloads: list[tuple[str, StepPayload]], channel: Channel
    ) -> None:
        async with AsyncExitStack() as held:
            entries = await self._enter(headers, payloads, held=held)
            new = [
                _New(where=where, payload=payload, entry=entries[payload.trajectory_uid])
                for where, payload in await asyncio.to_thread(self._missing, payloads)
            ]
            async with self._proving:  # until they are used, what proves one step would prove another
                await self._prove(new)
                await self._keep(new, channel)

    def _check(self, payload: StepPayload, where: str) -> None:
        for name, ids in (("prompt_ids", payload.prompt_ids), ("response_ids", payload.response_ids)):
            check_ids(ids, self._tokenizer, param=f"{where}.{name}")
        tokens = len(payload.prompt_ids) + len(payload.response_ids)
        if tokens > MAX_STEP_TOKENS:
            raise RequestError(f"{where} has {tokens} tokens; the limit is {MAX_STEP_TOKENS}", param=where)
        check_name(payload.trajectory_uid, f"{where}.trajectory_uid")
        group_of(payload.prompt_uid)
        check_reward(payload.reward, f"{where}.reward")
        check_metadata(payload.metadata, f"{where}.metadata")

    async def _enter(
        self, headers: Mapping[str, str], payloads: list[tuple[str, StepPayload]], *, held: AsyncExitStack
    ) -> dict[str, Entry]:
        """The trajectories of these steps, each for this request alone until `held` lets go."""
        entries: dict[str, Entry] = {}
        for name in sorted({payload.trajectory_uid for _, payload in payloads}):
            entry = entries[name] = await self._access.enter(headers, name, make=True)
            held.enter_context(self._store.using(entry))
            await held.enter_async_context(entry.lock)
        return entries

    def _missing(self, payloads: list[tuple[str, StepPayload]]) -> list[tuple[str, StepPayload]]:
        """Those steps that are not kept yet. Blocking.

        Raises:
            RequestError: a step of the same number is kept, or stands beside it, with other tokens (409).
        """
        missing: dict[tuple[str, int], tuple[str, StepPayload]] = {}
        for where, payload in payloads:
            place = (payload.trajectory_uid, payload.step_index)
            beside = missing.get(place)
            same = beside[1] if beside else self._kept(*place)
            if same is None:
                missing[place] = (where, payload)
            else:
                _check_same(same, payload, where)
        return list(missing.values())

    async def _prove(self, new: list[_New]) -> None:
        """Find the draw of each step that was sampled here; a draw proves one step alone.

        Raises:
            RequestError: a step has other logprobs than its draw.
        """
        used: set[str] = set()
        for item in new:
            item.draw = await self._draws.find(item.payload.prompt_ids, item.payload.response_ids, but=used)
            if item.draw is not None:
                used.add(item.draw.draw_id)
                _check_logprobs(item.draw, item.payload, item.where)

    def _kept(self, trajectory_id: str, index: int) -> Step | None:
        step_id = self._pool.find_step_by(SEAT_INDEX, seat_key(trajectory_id, index))
        kept = self._pool.get_step(step_id) if step_id else None
        return kept.step if kept else None

    async def _keep(self, new: list[_New], channel: Channel) -> None:
        """Keep steps, then what judges them, and return when all of it is on disk."""
        writes: list[Future[None]] = []
        for item in new:
            kept = self._kept_step(item, channel)
            index = {SEAT_INDEX: seat_key(item.payload.trajectory_uid, item.payload.step_index)}
            writes.append(self._pool.keep_step(kept, index=index))
            if item.payload.reward is not None:
                writes.append(self._pool.keep_signal(_signal(kept.step, item.payload.reward)))
        await asyncio.gather(*map(asyncio.wrap_future, writes))
        await self._draws.forget([item.draw.draw_id for item in new if item.draw is not None])

    def _kept_step(self, item: _New, channel: Channel) -> KeptStep:
        """The record of a submitted step; its trajectory's row goes to the disk before it."""
        payload, old = item.payload, item.entry.row
        facts = old.bound(group_id=group_of(payload.prompt_uid), channel=channel)
        at_ms = max(now_ms(), old.last_ms + 1)
        self._store.update(
            item.entry,
            metadata=payload.metadata or None,
            facts=facts,
            last_ms=at_ms,
            next_index=max(old.next_index, payload.step_index + 1),
            completed=old.completed or payload.is_last,
        )
        step = _step(item, at_ms, facts=facts, channel=facts.channel or channel)
        text = self._tokenizer.decode(payload.response_ids) if self._tokenizer else ""
        return KeptStep(
            step=step,
            messages=[],
            reply={"role": "assistant", "content": text},
            text=text,
            app=SOURCE,
            started_ms=at_ms,
            finished_ms=at_ms,
            trajectory_step=payload.step_index,
        )


def _generation(body: GenerateBody, settings: GatewaySettings) -> Call:
    params = body.sampling_params
    for name in ("image_data", "video_data"):
        if getattr(body, name):
            raise unsupported(name, f"{name} is not supported")
    if params.repetition_penalty not in (None, 1):
        raise unsupported("sampling_params.repetition_penalty", "repetition_penalty is not supported")
    if params.stop:
        raise unsupported("sampling_params.stop", "stop is not supported; cut the ids yourself")
    return Call(
        messages=[],
        raw=body.prompt_ids,
        verbatim=True,
        sampling=sampling_of(
            settings,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=params.seed,
        ),
        max_tokens=params.max_tokens or settings.default_max_tokens,
        version=pinned_version(params.model or "clawloop"),
    )


def _step(item: _New, at_ms: int, *, facts: Facts, channel: Channel) -> Step:
    payload, draw = item.payload, item.draw
    length = len(payload.response_ids)
    whole = draw is not None and length == len(draw.response_ids)
    step = Step(
        step_id=_step_id(payload),
        session_id=payload.trajectory_uid,
        run_id=payload.trajectory_uid,
        trajectory_id=payload.trajectory_uid,
        group_id=facts.group_id,
        group_size=facts.group_size,
        channel=channel,
        prompt_ids=payload.prompt_ids,
        response_ids=payload.response_ids,
        response_logprobs=draw.logprobs[:length] if draw else [],
        policy=draw.policy if draw else Policy("unknown"),
        sampling=draw.sampling if draw else Sampling(),
        finish_reason=draw.finish_reason if draw and whole else "length",
        created_ms=at_ms,
        untrainable=IMAGES if payload.multi_modal_data else draw.untrainable if draw else NOT_DRAWN,
    )
    if step.untrainable:
        return step
    try:
        return check_step(step)
    except RecordError:
        return msgspec.structs.replace(step, untrainable="no logprob for every token")


def _step_id(payload: StepPayload) -> str:
    """The same step handed in again has the same id."""
    named = (payload.trajectory_uid, payload.step_index, payload.prompt_ids, payload.response_ids)
    return f"step-{sha256(msgspec.json.encode(named)).hexdigest()[:32]}"


def _signal(step: Step, reward: float) -> Signal:
    return Signal(
        signal_id=signal_id(step.step_id, repr(reward)),
        target=Target.STEP,
        target_id=step.step_id,
        source=SOURCE,
        value=reward,
        created_ms=step.created_ms,
    )


def _check_same(kept: Step | StepPayload, payload: StepPayload, where: str) -> None:
    if (kept.prompt_ids, kept.response_ids) != (payload.prompt_ids, payload.response_ids):
        raise RequestError(
            f"{where}: step {payload.step_index} of this trajectory is there, with other tokens",
            status=409,
            param=f"{where}.step_index",
        )


def _check_logprobs(draw: Draw, payload: StepPayload, where: str) -> None:
    pairs = zip(draw.logprobs, payload.rollout_log_probs or [], strict=False)
    wrong = [at for at, (ours, theirs) in enumerate(pairs) if theirs is not None and abs(ours - theirs) > _TOLERANCE]
    if wrong:
        raise RequestError(
            f"{where}.rollout_log_probs[{wrong[0]}] is not what /generate gave; send that, or null",
            param=f"{where}.rollout_log_probs",
        )


def _channel(name: str) -> Channel:
    try:
        return Channel(name)
    except ValueError as error:
        raise RequestError("channel must be train or val", param="channel") from error

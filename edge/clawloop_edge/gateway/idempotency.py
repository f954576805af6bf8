"""A request that is sent again with the same `Idempotency-Key` and body is one step: it waits for the first one, and
gets its answer. A finished one is answered from the pool, so that a restart forgets nothing.

An attempt that failed or was cancelled does not count. Knows no wire format: an answer is replies, and a head for them.
Retries that the official SDKs mark by `x-stainless-retry-count` are joined alike where the caller says so, for a short
while after the first attempt.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from hashlib import sha256
from typing import Protocol

import msgspec

from clawloop_edge.engine.protocol import ChatTokenizer, Token
from clawloop_edge.engine.thinking import Reasoning
from clawloop_edge.engine.tool_calls import Piece, ToolCall
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.call import Call, Delta, Head, Usage
from clawloop_edge.gateway.reply import Reply, logprob_entry
from clawloop_edge.gateway.stops import StopMatcher
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.records import Policy

_LOG = logging.getLogger(__name__)
HEADER = "Idempotency-Key"
REPLAYED = "x-clawloop-replayed"
FINISHED = ("stop", "length")
_RETRY_COUNT = "x-stainless-retry-count"
_RETRY_WINDOW_MS = 60_000
_KEY = re.compile(r"\A[\x20-\x7e]{1,200}\Z")
_COUNT = re.compile(r"\A[0-9]{1,9}\Z")
_KEY_INDEX, _BODY_INDEX = "idempotency", "idempotency body"


class RetryKey(msgspec.Struct, frozen=True, kw_only=True):
    """What makes two requests one. `name` stands for the scope and the client's key, `body` for what was sent.

    `implied`: the client sent no key; then `again` says that it calls this a retry.
    """

    name: bytes
    body: bytes
    implied: bool = False
    again: bool = True

    @property
    def lookups(self) -> dict[str, bytes]:
        """What a step that answers it is found by."""
        return {_KEY_INDEX: self.name, _BODY_INDEX: self.name + self.body}


def retry_key(headers: Mapping[str, str], data: bytes, *, scope: str, implied: bool = False) -> RetryKey | None:
    """The key of a request with the body `data`; None if it has none. `scope` is the path, and whose keys are told
    apart; with `implied`, what an SDK calls a retry is one too.

    Raises:
        RequestError: a key that is empty, too long, or not printable ASCII.
    """
    given, body = headers.get(HEADER), sha256(data).digest()
    if given is not None:
        if not _KEY.match(given):
            raise RequestError(f"{HEADER} must be 1 to 200 printable ASCII characters", code="invalid_header")
        return RetryKey(name=_digest(scope, "key", given), body=body)
    count = headers.get(_RETRY_COUNT, "") if implied else ""
    if not _COUNT.match(count):
        return None
    return RetryKey(name=_digest(scope, "body", body.hex()), body=body, implied=True, again=int(count) > 0)


def _digest(*parts: str) -> bytes:
    return sha256(msgspec.json.encode(parts)).digest()


class Answered(msgspec.Struct, kw_only=True):
    """An answer that is complete: all that is needed to write it once more."""

    head: Head
    replies: Sequence[Reply]
    usage: Usage
    headers: dict[str, str]

    def deltas(self) -> list[Delta]:
        """It, as a stream would bring it: one delta a choice."""
        return [Delta(i, pieces_of(reply), reply.entries, reply.ids) for i, reply in enumerate(self.replies)]


class Attempt:
    """The first request with its key, from its claim until its steps are on disk. To be ended by `give` or `fail`."""

    def __init__(self, key: RetryKey, forget: Callable[["Attempt"], None]) -> None:
        self.key, self._forget = key, forget
        self.result: asyncio.Future[Answered | None] = asyncio.get_running_loop().create_future()
        self._writes: Sequence[Future[None]] = ()

    @property
    def over(self) -> bool:
        """Whether it is answered, and the pool has it or will not have it."""
        return self.result.done() and all(write.done() for write in self._writes)

    def give(self, answered: Answered, writes: Sequence["Future[None]"] = ()) -> None:
        """It is answered; `writes` are resolved when its steps are on disk."""
        self._writes = writes
        self.result.set_result(answered)
        if self.over:
            self._forget(self)

    def fail(self) -> None:
        """It brought no answer; whoever waits tries by itself. Does nothing after `give`."""
        if not self.result.done():
            self.result.set_result(None)
            self._forget(self)


class FindsSteps(Protocol):
    """The part of the pool that is asked."""

    def find_steps_by(
        self, name: str, value: bytes, *, session_id: str | None = None, limit: int = 16
    ) -> list[str]: ...
    def get_step(self, step_id: str) -> KeptStep | None: ...


class Retries:
    """The requests with keys, on the event loop's thread."""

    def __init__(
        self, pool: FindsSteps, *, clock_ms: Callable[[], int], tokenizer: ChatTokenizer | None = None
    ) -> None:
        """No tokenizer: the model's server says no token ids."""
        self._pool, self._clock_ms, self._tokenizer = pool, clock_ms, tokenizer
        self._attempts: dict[bytes, Attempt] = {}

    def __len__(self) -> int:
        return len(self._attempts)

    def drop(self) -> None:
        """Let go of answers that are only still here because nobody asked since."""
        for over in [attempt for attempt in self._attempts.values() if attempt.over]:
            self._forget(over)

    async def begin(self, key: RetryKey, call: Call) -> Answered | Attempt:
        """What the same request was answered before; else a claim, and the caller has to answer.

        Raises:
            RequestError: the key was sent with another body (400).
        """
        self.drop()
        while key.again and (first := self._attempts.get(key.name)) is not None and not first.over:
            _check_same(first.key.body == key.body)
            answered = await asyncio.shield(first.result)
            if answered is not None:
                return answered
        attempt = self._attempts[key.name] = Attempt(key, self._forget)
        if not key.again:
            return attempt
        try:
            found = await self._found(key, call)
        except BaseException:
            attempt.fail()
            raise
        if found is None:
            return attempt
        attempt.give(found)
        return found

    def _forget(self, attempt: Attempt) -> None:
        if self._attempts.get(attempt.key.name) is attempt:
            del self._attempts[attempt.key.name]

    async def _found(self, key: RetryKey, call: Call) -> Answered | None:
        try:
            return await asyncio.to_thread(self._kept, key, call)
        except RequestError:
            raise
        except Exception as error:  # noqa: BLE001 - the user is served first: without the earlier answer a call gets a new one
            _LOG.warning(
                "an earlier answer could not be looked up, the call is answered anew: %s", type(error).__name__
            )
            return None

    def _kept(self, key: RetryKey, call: Call) -> Answered | None:
        """The answer in the pool: all choices of one completion."""
        if not self._pool.find_steps_by(_KEY_INDEX, key.name, limit=1):
            return None
        same = self._pool.find_steps_by(_BODY_INDEX, key.name + key.body, limit=2 * call.n)
        _check_same(bool(same))
        each = ([first_id, *(f"{first_id}-{index}" for index in range(1, call.n))] for first_id in same)
        # Of one that was cancelled some choices lack the key: it is kept, and answers nothing.
        for ids in filter(set(same).issuperset, each):
            steps = [kept for step_id in ids if (kept := self._pool.get_step(step_id)) is not None]
            recent = not key.implied or self._clock_ms() - steps[0].finished_ms <= _RETRY_WINDOW_MS
            if len(steps) == call.n and recent:
                return answered_by(steps, call, tokenizer=self._tokenizer)
        return None


def reply_headers(
    step_ids: Sequence[str], policy: Policy, *, reason: str, trajectory_step: int | None
) -> dict[str, str]:
    """What an answer says of itself: its steps (one a choice), who gave it, why nothing may be learned from it (empty:
    it may), and the number of the first step in its trajectory."""
    return {
        "x-clawloop-step": ",".join(step_ids),
        "x-clawloop-policy": f"{policy.line}@{policy.version}",
        "x-clawloop-trainable": f"no ({reason})" if reason else "yes",
        **({} if trajectory_step is None else {"x-clawloop-trajectory-step": str(trajectory_step)}),
    }


def answered_by(steps: Sequence[KeptStep], call: Call, *, tokenizer: ChatTokenizer | None) -> Answered:
    """An answer as its kept steps, one a choice, tell it; what was not kept of it (the likeliest tokens beside each
    sampled one, how much of the prompt was cached) is left out."""
    first = steps[0].step
    completion = sum(len(kept.step.response_ids) for kept in steps)
    return Answered(
        head=Head(
            step_id=first.step_id,
            created_s=steps[0].started_ms // 1000,
            model=f"clawloop@{first.policy.version}",
            fingerprint=first.policy.line,
            prompt_ids=first.prompt_ids,
        ),
        replies=[_reply(kept, call, tokenizer) for kept in steps],
        usage=Usage(prompt=len(first.prompt_ids), completion=completion),
        headers=reply_headers(
            [kept.step.step_id for kept in steps],
            first.policy,
            reason=first.untrainable,
            trajectory_step=steps[0].trajectory_step,
        ),
    )


def pieces_of(reply: Reply) -> list[Piece]:
    """What a client was given of a reply: thoughts, text, calls."""
    thought: list[Piece] = [Reasoning(reply.reasoning)] if reply.reasoning else []
    text: list[Piece] = [reply.content] if reply.content else []
    return [*thought, *text, *reply.calls]


def _reply(kept: KeptStep, call: Call, tokenizer: ChatTokenizer | None) -> Reply:
    reply, message = Reply(), kept.reply
    pieces: list[Piece] = []
    if message.get("reasoning_content"):
        pieces.append(Reasoning(message["reasoning_content"]))
    if message.get("content"):
        pieces.append(message["content"])
    for made in message.get("tool_calls") or []:
        pieces.append(ToolCall(made["id"], made["function"]["name"], made["function"]["arguments"]))
    reply.ids, reply.logprobs = kept.step.response_ids, kept.step.logprobs
    if call.logprobs and tokenizer:
        sampled = zip(reply.ids, reply.logprobs, strict=True)
        reply.entries = [logprob_entry(tokenizer, Token(token_id, logprob)) for token_id, logprob in sampled]
    reply.take(pieces)
    reply.ended = kept.step.finish_reason
    matcher = StopMatcher(call.stops)
    matcher.feed(kept.text)
    reply.stopped_by = matcher.met
    return reply


def _check_same(same: bool) -> None:
    if not same:
        raise RequestError(
            f"this {HEADER} was sent before with another body; send a new key with a new request",
            param=HEADER,
            code="idempotency_key_reused",
        )

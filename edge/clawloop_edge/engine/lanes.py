"""One batch of calls that share a policy and a way of sampling, on mlx-lm's BatchGenerator.

Only calls of one lane can be one batch: another adapter is another model, another temperature another divisor of the
logits. Lanes live in the engine's thread and end with their last row.
"""

import gc
import importlib
import time
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from clawloop_edge.engine.grammar import Constraint
from clawloop_edge.engine.memory import batch_tokens
from clawloop_edge.engine.protocol import GenerateRequest, Token
from clawloop_edge.engine.sampling import AtTemperature, Constrained, likeliest, logit_temperature, make_sampler
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.engine.stream import TokenStream
from clawloop_shared.records import Policy, Sampling


@dataclass(eq=False)
class Call:
    """A call inside the engine. `uid` is its row while it runs; `over` once nothing may be delivered any more."""

    request: GenerateRequest
    policy: Policy
    stream: TokenStream
    constraint: Constraint | None = None
    since_s: float = field(default_factory=time.monotonic)
    lane: "Lane | None" = None
    uid: int = -1
    over: bool = False

    @property
    def tokens(self) -> int:
        """Its length at most, prompt and response."""
        return len(self.request.prompt_ids) + self.request.max_tokens


@dataclass(frozen=True)
class Finished:
    """What a finished row leaves behind: all its ids and their attention cache, the last sampled token included."""

    call: Call
    token_ids: list[int]
    cache: list[Any]


class Lane:
    """A BatchGenerator and the calls in it."""

    def __init__(self, model: Any, sampling: Sampling, *, settings: EngineSettings, stop_ids: frozenset[int]) -> None:
        self._calls: dict[int, Call] = {}
        generate = importlib.import_module("mlx_lm.generate")
        self._generator = generate.BatchGenerator(
            AtTemperature(model, logit_temperature(sampling)),
            sampler=make_sampler(sampling),
            stop_tokens=[[i] for i in sorted(stop_ids)],
            completion_batch_size=settings.completion_batch_size,
            prefill_batch_size=settings.prefill_batch_size,
            prefill_step_size=settings.prefill_step_size,
            stream=mx.default_stream(mx.default_device()),
        )

    def __len__(self) -> int:
        return len(self._calls)

    def calls(self) -> list[Call]:
        """The calls in this lane."""
        return list(self._calls.values())

    @property
    def kv_tokens(self) -> int:
        """Tokens in its attention cache at its largest."""
        return batch_tokens(call.tokens for call in self._calls.values())

    def growth(self, call: Call) -> int:
        """By how many tokens its attention cache would be larger with `call` in it."""
        return batch_tokens([call.tokens, *(other.tokens for other in self._calls.values())]) - self.kv_tokens

    def add(self, call: Call, *, cache: Any | None, cached: int) -> None:
        """Start a call whose first `cached` prompt ids are in `cache`; at least one more id must follow."""
        prompt = call.request.prompt_ids
        (call.uid,) = self._generator.insert(
            [prompt[cached:]],
            max_tokens=[call.request.max_tokens],
            caches=None if cache is None else [cache],
            all_tokens=[prompt[:cached]],
            logits_processors=None if call.constraint is None else [[Constrained(call.constraint)]],
        )
        call.lane, call.stream.cached_tokens = self, cached
        self._calls[call.uid] = call

    def step(self) -> tuple[list[tuple[Call, Token]], list[Finished]]:
        """One step of the batch: at most one token a call, and the calls that ended with it."""
        _, responses = self._generator.next()
        tokens, finished = [], []
        for row in responses:
            call = self._calls[row.uid]
            # The row is evaluated, so the buffer is read in place; `.item()` would cost an op and an eval a row.
            logprobs = memoryview(row.logprobs)
            top = likeliest(logprobs, call.request.top_logprobs) if call.request.top_logprobs else ()
            tokens.append((call, Token(row.token, logprobs[row.token], row.finish_reason, top)))
            if row.finish_reason:
                del self._calls[row.uid]
                finished.append(Finished(call, row.all_tokens, row.prompt_cache))
        return tokens, finished

    def stuck(self) -> list[Call]:
        """Calls whose grammar gave up."""
        return [call for call in self._calls.values() if call.constraint is not None and call.constraint.error]

    def remove(self, call: Call) -> None:
        """Take a call out of the batch."""
        del self._calls[call.uid]
        self._generator.remove([call.uid])

    def close(self) -> None:
        """Let the generator go."""
        self._generator.close()


def leave_wired_limit_alone() -> None:
    """Keep mlx-lm from wiring all recommended memory for each BatchGenerator: the attributed trigger of macOS kernel
    panics under concurrency (mlx issue 3186)."""
    generate: Any = importlib.import_module("mlx_lm.generate")
    generate.maybe_set_recommended_wired_limit = lambda: None


def keep_collections_short() -> None:
    """Leave what was loaded so far out of later garbage collections. With the libraries' million objects a full one
    holds every stream up for 160 ms. An engine that is closed leaves no cycle behind, so nothing is unfrozen ever."""
    gc.collect()
    gc.freeze()


def let_arrays_go() -> None:
    """Free what nobody names any more and wait for steps that were begun ahead, all in the thread that made them: an
    array or a step that outlives its thread can abort the process at exit."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()

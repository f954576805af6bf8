"""The real engine: a model folder served by MLX, token-exact, with adapters swapped in while it serves.

This is the asyncio side; the model lives in the worker's thread and is touched by nobody else.
"""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clawloop_edge.engine.grammar import Grammars
from clawloop_edge.engine.lanes import Call, keep_collections_short, leave_wired_limit_alone
from clawloop_edge.engine.memory import MemoryPlan, make_plan, model_sizes
from clawloop_edge.engine.protocol import ChatTokenizer, EngineHealth, GenerateRequest, Generation
from clawloop_edge.engine.sampling import check_sampling
from clawloop_edge.engine.scheduler import Scheduler
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.engine.stream import StreamGeneration, TokenStream
from clawloop_edge.engine.tokenizer import HfChatTokenizer
from clawloop_edge.engine.versions import Versions
from clawloop_edge.engine.worker import Worker
from clawloop_edge.errors import EngineBusy, EngineError, EngineGone, PromptTooLong
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.model_line import ModelLine, read_config, read_line
from clawloop_shared.records import Policy

T = TypeVar("T")
_BUSY_S = 10.0
"""a turn that takes longer is told by `health`"""


class MlxEngine:
    """An `Engine` on mlx-lm. Make one with `await MlxEngine.open(folder)`."""

    line: ModelLine
    tokenizer: ChatTokenizer

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Start the thread, which loads the model; `open` waits for it."""
        self._folder, self._settings = folder, settings
        self._worker = Worker(self._load_model)

    @classmethod
    async def open(cls, folder: Path, settings: EngineSettings | None = None) -> "MlxEngine":
        """Load the model in `folder` (a local folder in Hugging Face's layout, quantised by MLX or not).

        Raises:
            ConfigError: it is no such folder, or a part of it is missing.
            EngineError: mlx-lm cannot load it.
        """
        engine = cls(folder, settings or EngineSettings())
        try:
            await asyncio.wrap_future(engine._worker.ready)
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def policy(self) -> Policy:
        """What a call that asks for no version gets now."""
        return self._versions.current

    def policy_of(self, version: int) -> Policy:
        """The policy of a loaded version. Raises UnknownVersion."""
        return self._versions.policy(version)

    async def generate(self, request: GenerateRequest) -> Generation:
        """Start a call; it may have to wait for a place, and ends with EngineBusy if that takes too long.

        Raises:
            PromptTooLong: it fits neither the model's context nor the memory budget, even alone.
            EngineBusy, EngineGone, UnknownVersion: it cannot be served now, at all, or by that version.
            RequestError: no text matches its grammar, or the grammar is too costly.
            EngineError: bad ids or bad sampling.
        """
        request = self._checked(request)
        constraint = None
        if request.grammar:
            constraint = await asyncio.to_thread(self._grammars.constraint, request.grammar)
        if self._versions.pins >= self._settings.max_queue:
            raise EngineBusy(f"{self._versions.pins} calls are in flight; try again in a moment")
        stream = TokenStream(asyncio.get_running_loop())
        call = Call(request, self._versions.pin(request.version), stream, constraint)
        try:
            self._worker.post(lambda: self._scheduler.submit(call))
        except EngineError:
            self._versions.unpin(call.policy)
            raise
        return StreamGeneration(call.policy, stream, cancel=lambda: self._cancel(call))

    async def load(self, policy: Policy, files: dict[str, bytes]) -> None:
        """Make a verified adapter ready beside the ones loaded.

        Raises:
            AdapterInvalid: it is for another line, or its names, shapes or values are wrong.
            EngineError: its number is taken by other weights.
        """
        if policy.line != self.line.line_id:
            raise AdapterInvalid(f"adapter {policy.version} is for model line {policy.line}, not {self.line.line_id}")
        await self._do(lambda: self._load_adapter(policy, files))

    async def unload(self, version: int) -> None:
        """Forget a loaded version; its calls in flight finish first. Raises UnknownVersion or EngineError."""
        await self._ask(lambda: self._scheduler.forget(self._versions.unload(version)))

    async def use(self, version: int) -> Policy:
        """Make a loaded version (0: the base) the current one. Raises UnknownVersion."""
        await self._ask(lambda: self._scheduler.forget(self._versions.use(version)))
        return self._versions.policy(version)

    async def score(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        *,
        version: int,
        temperature: float = 1.0,
        exact: bool = False,
    ) -> list[float]:
        """Teacher-forced logprobs of the response under a loaded version, in pieces between steps of the batch; with
        `exact`, of the same weights computed with in float32, which takes twice the memory of a call.

        Raises:
            UnknownVersion: no such version is loaded.
            PromptTooLong: prompt and response do not fit the context.
            EngineError: an id is outside the vocabulary, or there is no prompt.
        """
        self._check_ids(prompt_ids, response_ids)
        tokens = len(prompt_ids) + len(response_ids)
        if tokens > self._most_tokens():
            raise PromptTooLong(f"{tokens} tokens to score; {self._bound(self._most_tokens())}")
        return await self._do(
            lambda: self._score(prompt_ids, response_ids, version=version, temperature=temperature, exact=exact),
            kv_bytes=tokens * self._plan.token * (2 if exact else 1),
        )

    async def forget_prompts(self) -> None:
        """Let go of the attention caches that no call in flight uses. Raises EngineGone."""
        await self._ask(self._scheduler.forget_prompts)

    def health(self) -> EngineHealth:
        """The truth about the engine's thread, and about memory as it was after the last step."""
        busy_s, work = self._worker.busy_s, self._scheduler
        return EngineHealth(
            alive=self._worker.alive,
            in_flight=self._versions.pins,
            versions=self._versions.numbers(),
            detail=f"busy for {busy_s:.0f} s" if busy_s > _BUSY_S else work.last_error,
            waiting=work.waiting,
            memory_bytes=work.memory_bytes,
            budget_bytes=self._plan.budget,
            cache_bytes=work.cache_bytes,
        )

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        await asyncio.to_thread(self._worker.stop)

    def _checked(self, request: GenerateRequest) -> GenerateRequest:
        check_sampling(request.sampling)
        self._check_ids(request.prompt_ids)
        most = self._most_tokens()
        room = most - len(request.prompt_ids)
        if room < 1:
            raise PromptTooLong(f"prompt of {len(request.prompt_ids)} tokens; {self._bound(most)}")
        if request.max_tokens < 1:
            raise EngineError(f"max_tokens is {request.max_tokens}; ask for at least one")
        return msgspec.structs.replace(request, max_tokens=min(request.max_tokens, room))

    def _most_tokens(self) -> int:
        """The longest that a call can be, prompt and response."""
        return min(self.tokenizer.context_length, self._plan.most_tokens(self._versions.adapter_bytes))

    def _bound(self, most: int) -> str:
        if most == self.tokenizer.context_length:
            return f"the model's context holds {most}"
        return f"the memory budget of {self._plan.budget} bytes holds {most}; raise [engine] memory_budget_bytes"

    def _check_ids(self, prompt_ids: list[int], response_ids: list[int] | None = None) -> None:
        if not prompt_ids:
            raise EngineError("the prompt is empty; send at least one token")
        ids = prompt_ids + response_ids if response_ids else prompt_ids
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise EngineError(f"a token id is outside the model's vocabulary of {self._vocab_size}")

    def _cancel(self, call: Call) -> None:
        with contextlib.suppress(EngineGone):  # then the call has ended anyway
            self._worker.post(lambda: self._scheduler.cancel(call))

    async def _ask(self, question: Callable[[], T]) -> T:
        answer: Future[T] = self._worker.ask(question)
        return await asyncio.wrap_future(answer)

    async def _do(self, start: Callable[[], Generator[None, None, T]], *, kv_bytes: int = 0) -> T:
        """Have long work done in pieces, between steps of the batch."""
        answer: Future[T] = Future()
        self._worker.post(lambda: self._scheduler.chores.add(start, answer, kv_bytes=kv_bytes))
        return await asyncio.wrap_future(answer)

    # What follows runs in the worker's thread.

    def _load_model(self) -> Scheduler:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        leave_wired_limit_alone()
        mx.random.seed(int.from_bytes(os.urandom(8)) if self._settings.seed is None else self._settings.seed)
        self.line = read_line(self._folder)
        self.tokenizer = HfChatTokenizer(self._folder)
        try:
            model, _ = load_model(self._folder)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise EngineError(f"mlx-lm cannot load {self._folder}: {error}") from error
        model.eval()
        self._vocab_size = _vocab_size(self._folder)
        self._plan = self._make_plan(model)
        if self._settings.wired_limit_bytes:
            mx.set_wired_limit(self._settings.wired_limit_bytes)
        eos_ids = self.tokenizer.eos_ids
        self._grammars = Grammars(self._folder, vocab_size=self._vocab_size, eos_ids=eos_ids)
        self._versions = Versions(Policy(self.line.line_id), model, keep=self._settings.keep_versions)
        self._scheduler = Scheduler(self._versions, settings=self._settings, stop_ids=eos_ids, plan=self._plan)
        keep_collections_short()
        return self._scheduler

    def _make_plan(self, model: Any) -> MemoryPlan:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        arrays = [array for _, array in tree_flatten(model.parameters())]
        kinds: Counter[int] = Counter()
        for array in arrays:
            if mx.issubdtype(array.dtype, mx.floating):
                kinds[array.dtype.size] += array.nbytes
        settings = self._settings
        return make_plan(
            model_sizes(read_config(self._folder), dtype_bytes=kinds.most_common(1)[0][0]),
            weights=sum(array.nbytes for array in arrays),
            asked=settings.memory_budget_bytes,
            prompt_tokens=settings.prefill_batch_size * settings.prefill_step_size,
            rows=settings.completion_batch_size,
            working_set=int(mx.device_info().get("max_recommended_working_set_size", 0)),  # Metal alone tells it
        )

    def _load_adapter(self, policy: Policy, files: dict[str, bytes]) -> Generator[None, None, None]:
        from clawloop_edge.adapters.convert import factor_pieces
        from clawloop_edge.engine.lora import with_adapter

        factors = yield from factor_pieces(files, rank_max=self._settings.lora_rank_max)
        model = with_adapter(self._versions.model_of(0), factors)
        size = sum(array.nbytes for pair in factors.values() for array in pair)
        self._scheduler.forget(self._versions.add(policy, model, size_bytes=size))

    def _score(
        self, prompt_ids: list[int], response_ids: list[int], *, version: int, temperature: float, exact: bool
    ) -> Generator[None, None, list[float]]:
        from clawloop_edge.engine.lora import in_float32
        from clawloop_edge.engine.scoring import score

        self._versions.policy(version)
        model = self._versions.model_of(version)
        if exact:
            model = in_float32(model)
        step = self._settings.prefill_step_size
        return score(model, prompt_ids, response_ids=response_ids, temperature=temperature, prompt_step=step)


def _vocab_size(folder: Path) -> int:
    config: dict[str, Any] = read_config(folder)
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])

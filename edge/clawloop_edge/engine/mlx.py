"""The real engine: a model folder served by MLX, token-exact, with adapters swapped in while it serves.

This is the asyncio side; the model lives in the worker's thread and is touched by nobody else.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clawloop_edge.engine.lanes import Call, leave_wired_limit_alone
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

    async def generate(self, request: GenerateRequest) -> Generation:
        """Start a call. Raises PromptTooLong, EngineBusy, EngineGone, UnknownVersion, or EngineError for bad ids."""
        request = self._checked(request)
        if self._versions.pins >= self._settings.max_queue:
            raise EngineBusy(f"{self._versions.pins} calls are in flight; try again in a moment")
        stream = TokenStream(asyncio.get_running_loop())
        call = Call(request, self._versions.pin(request.version), stream)
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
        await self._ask(lambda: self._load_adapter(policy, files))

    async def unload(self, version: int) -> None:
        """Forget a loaded version; its calls in flight finish first. Raises UnknownVersion or EngineError."""
        await self._ask(lambda: self._scheduler.forget(self._versions.unload(version)))

    async def use(self, version: int) -> Policy:
        """Make a loaded version (0: the base) the current one. Raises UnknownVersion."""
        await self._ask(lambda: self._scheduler.forget(self._versions.use(version)))
        return self._versions.policy(version)

    async def score(
        self, prompt_ids: list[int], response_ids: list[int], *, version: int, temperature: float = 1.0
    ) -> list[float]:
        """Teacher-forced logprobs of the response under a loaded version, computed between two steps of the batch.

        Raises:
            UnknownVersion: no such version is loaded.
            PromptTooLong: prompt and response do not fit the context.
            EngineError: an id is outside the vocabulary, or there is no prompt.
        """
        self._check_ids(prompt_ids, response_ids)
        if len(prompt_ids) + len(response_ids) > self.tokenizer.context_length:
            raise PromptTooLong(f"{len(prompt_ids)} + {len(response_ids)} tokens do not fit the model's context")
        return await self._ask(lambda: self._score(prompt_ids, response_ids, version=version, temperature=temperature))

    def health(self) -> EngineHealth:
        """The truth about the engine's thread."""
        detail = self._scheduler.last_error
        return EngineHealth(self._worker.alive, self._versions.pins, self._versions.numbers(), detail)

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        await asyncio.to_thread(self._worker.stop)

    def _checked(self, request: GenerateRequest) -> GenerateRequest:
        check_sampling(request.sampling)
        self._check_ids(request.prompt_ids)
        room = self.tokenizer.context_length - len(request.prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"prompt of {len(request.prompt_ids)} tokens; the model's context holds {self.tokenizer.context_length}"
            )
        if request.max_tokens < 1:
            raise EngineError(f"max_tokens is {request.max_tokens}; ask for at least one")
        return msgspec.structs.replace(request, max_tokens=min(request.max_tokens, room))

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
        self._versions = Versions(Policy(self.line.line_id), model, keep=self._settings.keep_versions)
        self._scheduler = Scheduler(self._versions, settings=self._settings, stop_ids=self.tokenizer.eos_ids)
        return self._scheduler

    def _load_adapter(self, policy: Policy, files: dict[str, bytes]) -> None:
        from clawloop_edge.adapters.convert import read_factors
        from clawloop_edge.engine.lora import with_adapter

        base = self._versions.model_of(0)
        model = with_adapter(base, read_factors(files, rank_max=self._settings.lora_rank_max))
        self._scheduler.forget(self._versions.add(policy, model))

    def _score(
        self, prompt_ids: list[int], response_ids: list[int], *, version: int, temperature: float
    ) -> list[float]:
        from clawloop_edge.engine.scoring import score

        self._versions.policy(version)
        model = self._versions.model_of(version)
        step = self._settings.prefill_step_size
        return score(model, prompt_ids, response_ids=response_ids, temperature=temperature, prompt_step=step)


def _vocab_size(folder: Path) -> int:
    config: dict[str, Any] = read_config(folder)
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])

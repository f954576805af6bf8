"""What the gateway asks of a model. `mlx` is the real one; `scripted` answers from a list, for tests and drills.

An engine knows tokens, adapters and versions. It does not know HTTP, sessions or the pool.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from clawloop_edge.engine.thinking import ThinkMarks
from clawloop_edge.engine.tool_calls import Piece, ToolFormat
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy, Sampling


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call: the exact prompt, how to sample, and how much. `version` asks for one adapter; None is the current.

    `top_logprobs` asks for that many of the likeliest tokens beside each sampled one. `grammar`, in the form that
    `engine.grammar` makes, is what the response must match; it cuts the distribution, which the logprobs do not show.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    version: int | None = None
    top_logprobs: int = 0
    grammar: str = ""


class Token(msgspec.Struct, frozen=True, gc=False):
    """One sampled token and its logprob under the sampled distribution. `finish_reason` is set on the last alone:
    `stop` (the end token, which is part of the response), or `length`. `top` are the likeliest tokens and their
    logprobs, likeliest first, if they were asked for."""

    token_id: int
    logprob: float
    finish_reason: str | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generation(Protocol):
    """A call in flight: its policy never changes, even if an adapter is swapped in meanwhile.

    Iterating yields tokens as they are sampled; leaving the iteration, or `aclose`, cancels the call in the engine.
    `cached_tokens`, the part of the prompt that was not computed again, is known from the first token on. `reason` says
    why nothing of this call may be learned from, as far as the engine knows; empty if it may.
    """

    policy: Policy

    @property
    def reason(self) -> str: ...

    @property
    def cached_tokens(self) -> int: ...
    async def ready(self, timeout_s: float) -> bool:
        """Wait until the first token, or the error that ended the call, can be had without waiting; False if it took
        longer. Takes nothing out of the stream."""
        ...

    def __aiter__(self) -> AsyncIterator[Token]: ...
    async def aclose(self) -> None: ...


class EngineHealth(msgspec.Struct, frozen=True):
    """Whether the engine serves, how much is in flight, and which adapter versions are loaded.

    `waiting` are the calls of those in flight that have no row yet. `memory_bytes` is what weights, adapters, attention
    caches of running calls at their longest and kept prefixes (`cache_bytes` of it) take, `budget_bytes` what they may;
    0 where nothing bounds it.
    """

    alive: bool
    in_flight: int
    versions: list[int]
    detail: str = ""
    waiting: int = 0
    memory_bytes: int = 0
    budget_bytes: int = 0
    cache_bytes: int = 0


class Detokenizer(Protocol):
    """Text of tokens as they arrive: bytes of a character that is not complete yet are held back."""

    def add(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""
        ...


class ChatTokenizer(Protocol):
    """The model's tokenizer and chat template. `tool_format` and `think_marks` are how the model writes a tool call and
    its thoughts, if it can; ids from `vocab_size` on have no row in it."""

    eos_ids: frozenset[int]
    context_length: int
    vocab_size: int
    tool_format: ToolFormat | None
    think_marks: ThinkMarks | None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        thinking: bool | None = None,
    ) -> str:
        """The prompt text, ready for the assistant's turn; `thinking` asks a model that can do both to think first, or
        not to. Raises RequestError if the template refuses."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...

    def visible(self, ids: Sequence[int]) -> str:
        """The text of ids as the client should see it: without the end token."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one response; its pieces together are `visible` of the ids (end tokens give no text)."""
        ...


class TextRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call for a server that renders prompts itself. `tool_choice` is `auto`, `required`, or the name of a tool if
    `tool_named`; `schema` is what the answer must match ({}: any JSON object), None for free text. `stream`: its
    client wants the answer as it grows."""

    messages: list[dict[str, Any]]
    sampling: Sampling
    max_tokens: int
    raw: str | list[int] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str = "auto"
    tool_named: bool = False
    parallel_tools: bool = True
    schema: dict[str, Any] | None = None
    schema_name: str = ""
    schema_strict: bool = True
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    thinking: bool | None = None
    stream: bool = True
    model: str = ""


class TextPart(msgspec.Struct, frozen=True, gc=False):
    """What a text-only server said: pieces, logprobs in OpenAI's shape, and on the last alone why it ended (`stop`,
    `length`; a server's `tool_calls` is `stop`)."""

    pieces: list[Piece]
    entries: list[dict[str, Any]] = []
    finish_reason: str | None = None


class TextGeneration(Protocol):
    """A call in flight at a text-only server. `usage` is (prompt, completion, cached) tokens, 0 where it says none."""

    policy: Policy
    usage: tuple[int, int, int]

    async def ready(self, timeout_s: float) -> bool:
        """Wait for the first part, or for the error that ended the call; takes nothing."""
        ...

    def __aiter__(self) -> AsyncIterator[TextPart]: ...
    async def aclose(self) -> None: ...


@runtime_checkable
class TextEngine(Protocol):
    """A server that answers with text: served and kept, never trainable."""

    @property
    def line(self) -> ModelLine:
        """What stands for the model; no step of it is trained on."""
        ...

    @property
    def policy(self) -> Policy:
        """What all calls get."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have; 0 if the server does not say."""
        ...

    async def generate_text(self, request: TextRequest) -> TextGeneration:
        """Start a call. Raises RequestError (the server refuses it), EngineBusy or EngineGone."""
        ...

    async def count(self, request: TextRequest) -> int:
        """Tokens of a prompt. Raises RequestError: the server cannot say."""
        ...

    def health(self) -> EngineHealth:
        """The truth about the server, as far as calls have shown it."""
        ...

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        ...


class Engine(Protocol):
    """A model that serves several adapter versions."""

    @property
    def line(self) -> ModelLine:
        """The identity of the base."""
        ...

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer."""
        ...

    @property
    def policy(self) -> Policy:
        """What a call that asks for no version gets now."""
        ...

    def policy_of(self, version: int) -> Policy:
        """The policy of a loaded version: which weights have that number. Raises UnknownVersion."""
        ...

    async def generate(self, request: GenerateRequest) -> Generation:
        """Start a call. Raises PromptTooLong, EngineBusy, EngineGone or UnknownVersion."""
        ...

    async def load(self, policy: Policy, files: dict[str, bytes]) -> None:
        """Make a verified adapter ready beside the ones loaded. Raises AdapterInvalid (shape, NaN)."""
        ...

    async def unload(self, version: int) -> None:
        """Forget a loaded version that is not the current one; its calls in flight finish first."""
        ...

    async def use(self, version: int) -> Policy:
        """Make a loaded version (0: the base) the current one. Calls in flight finish on theirs."""
        ...

    async def score(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        *,
        version: int,
        temperature: float = 1.0,
        exact: bool = False,
    ) -> list[float]:
        """Teacher-forced logprobs of the response under a loaded version, as it samples; with `exact`, in float32 where
        the engine can. Raises UnknownVersion or PromptTooLong."""
        ...

    async def forget_prompts(self) -> None:
        """Let go of what is kept of prompts that were answered, to save computing them again. Raises EngineGone."""
        ...

    def health(self) -> EngineHealth:
        """The truth about the engine's thread."""
        ...

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        ...

"""What the gateway asks of a model. `mlx` is the real one; `scripted` answers from a list, for tests and drills.

An engine knows tokens, adapters and versions. It does not know HTTP, sessions or the pool.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from clawloop_edge.engine.tool_calls import ToolFormat
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy, Sampling


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call: the exact prompt, how to sample, and how much. `version` asks for one adapter; None is the current."""

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    version: int | None = None


class Token(msgspec.Struct, frozen=True, gc=False):
    """One sampled token and its logprob under the sampled distribution. `finish_reason` is set on the last alone:
    `stop` (the end token, which is part of the response), or `length`."""

    token_id: int
    logprob: float
    finish_reason: str | None = None


class Generation(Protocol):
    """A call in flight: its policy never changes, even if an adapter is swapped in meanwhile.

    Iterating yields tokens as they are sampled; leaving the iteration, or `aclose`, cancels the call in the engine.
    `cached_tokens`, the part of the prompt that was not computed again, is known from the first token on.
    """

    policy: Policy

    @property
    def cached_tokens(self) -> int: ...
    def __aiter__(self) -> AsyncIterator[Token]: ...
    async def aclose(self) -> None: ...


class EngineHealth(msgspec.Struct, frozen=True):
    """Whether the engine serves, how much is in flight, and which adapter versions are loaded."""

    alive: bool
    in_flight: int
    versions: list[int]
    detail: str = ""


class Detokenizer(Protocol):
    """Text of tokens as they arrive: bytes of a character that is not complete yet are held back."""

    def add(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""
        ...


class ChatTokenizer(Protocol):
    """The model's tokenizer and chat template. `tool_format` is how the model writes a tool call, if it can."""

    eos_ids: frozenset[int]
    context_length: int
    tool_format: ToolFormat | None

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> str:
        """The prompt text, ready for the assistant's turn. Raises RequestError if the template refuses."""
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
        self, prompt_ids: list[int], response_ids: list[int], *, version: int, temperature: float = 1.0
    ) -> list[float]:
        """Teacher-forced logprobs of the response under a loaded version. Raises UnknownVersion or PromptTooLong."""
        ...

    def health(self) -> EngineHealth:
        """The truth about the engine's thread."""
        ...

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        ...

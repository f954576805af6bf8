"""One call in the common form that all APIs are brought to, and what an API must give to answer it. Pure.

Messages and tools have the shape of OpenAI's chat completions, which chat templates read.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from clawloop_edge.engine.tool_calls import Piece
from clawloop_edge.gateway.errors import Failure, Shape
from clawloop_edge.gateway.reply import Reply
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_shared.records import Sampling

Json = dict[str, Any]


class Choosing(StrEnum):
    """Whether the model may, must or must not call a tool."""

    AUTO = "auto"
    """as it likes"""
    NONE = "none"
    """it is shown no tools"""
    REQUIRED = "required"
    """it must call one"""


class ToolChoice(msgspec.Struct, frozen=True):
    """How the model may use tools. `name` is the one that it must call, if it is but one."""

    choosing: Choosing = Choosing.AUTO
    name: str = ""


class Format(msgspec.Struct, frozen=True):
    """What an answer must be: free text (no schema), or JSON that matches `schema` ({} is any object)."""

    schema: Json | None = None
    name: str = ""
    strict: bool = True


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call, checked. `max_tokens` may pass the context; `version` pins an adapter; `raw` is a prompt of text or
    token ids in place of messages. A `verbatim` answer is delivered as it was sampled but for the end token, marks of
    thoughts and tool calls included; its calls are told beside it."""

    messages: list[Json]
    sampling: Sampling
    max_tokens: int
    raw: str | list[int] | None = None
    verbatim: bool = False
    tools: list[Json] = []
    tool_choice: ToolChoice = ToolChoice()
    parallel_tools: bool = True
    format: Format = Format()
    stops: tuple[str, ...] = ()
    stream: bool = False
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    thinking: bool | None = None
    model: str = "clawloop"
    version: int | None = None
    prompt_cache_key: str = ""

    @property
    def offered(self) -> list[Json]:
        """The tools that the model is shown."""
        return [] if self.tool_choice.choosing is Choosing.NONE else self.tools

    @property
    def constrained(self) -> bool:
        """Whether the answer is forced into a form, so that the model's own distribution is cut."""
        return self.format.schema is not None or (self.tool_choice.choosing is Choosing.REQUIRED)


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every object of one completion carries."""

    step_id: str
    created_s: int
    model: str
    fingerprint: str
    prompt_ids: list[int] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one call over all its choices; `cached` of the prompt's were not computed again."""

    prompt: int
    completion: int
    cached: int = 0


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What one sampled token adds to choice `index`; `entries` are logprobs in OpenAI's shape, if asked for."""

    index: int
    pieces: list[Piece]
    entries: list[Json]
    ids: list[int]


class Writer(Protocol):
    """Puts one answer on the wire in its API's form; keeps count of what was begun, and knows no socket."""

    keep_alive: bytes
    """an event that means nothing, sent while the model is silent"""

    def begin(self) -> bytes:
        """The events that open a stream."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """The events of one token; may be empty."""
        ...

    def end(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The events that close a stream."""
        ...

    def error(self, failure: Failure) -> bytes:
        """The event that ends a stream which failed."""
        ...

    def whole(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The body of a call that does not stream."""
        ...


MakeWriter = Callable[[Head], Writer]
"""a writer for an answer whose head is known"""


class Api(Protocol):
    """One API: how its calls are read, and how they are answered."""

    prefix: str
    """of its completion ids"""
    shape: Shape
    """of its errors"""

    def read(self, data: bytes, settings: GatewaySettings) -> tuple[Call, MakeWriter]:
        """The call in a body, and what answers it. Raises RequestError."""
        ...

"""The body of a chat completions call: read, checked, and brought to the common form.

Unknown fields are ignored. A field that would change the answer and is not supported is refused by name.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.body import (
    CallBody,
    Json,
    One,
    Refused,
    Stop,
    Stops,
    Zero,
    convert_body,
    pinned_version,
    read_body,
    stop_strings,
    unsupported,
)
from clawloop_edge.gateway.call import Call, Choosing, Format, ToolChoice
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_shared.records import Sampling

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Choices = Annotated[int, Meta(ge=1, le=16)]


class _Function(msgspec.Struct):
    name: str  # a model may have called what was never offered, and its agent sends that back
    arguments: str


class _Call(msgspec.Struct):
    id: str
    function: _Function
    type: Literal["function"] = "function"


TextPart = Annotated[
    Json,
    Meta(
        extra_json_schema={
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"],
        }
    ),
]
"""one part of a message; those that are no text are refused by name"""


class Message(msgspec.Struct):
    """One message; further fields are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    function_call: Annotated[Any, Meta(extra_json_schema={"const": None})] = None
    reasoning_content: str | None = None


class _ToolFunction(msgspec.Struct):
    name: Name
    description: str | None = None
    parameters: Json | None = None


class Tool(msgspec.Struct):
    """One tool; further fields are ignored."""

    type: Literal["function"]
    function: _ToolFunction


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _TemplateSettings(msgspec.Struct, forbid_unknown_fields=True):
    enable_thinking: bool | None = None


class _JsonSchema(msgspec.Struct):
    name: str = ""
    schema: Json | None = None
    strict: bool | None = None


class _ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _NamedFunction(msgspec.Struct):
    name: str


class _NamedTool(msgspec.Struct):
    type: Literal["function"]
    function: _NamedFunction


class ChatBody(CallBody):
    """What a chat completions call may say; further fields are ignored."""

    messages: Annotated[list[Json], Meta(min_length=1)]
    model: str = "clawloop"
    tools: list[Json] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    prompt_cache_key: str | None = None
    n: Choices | None = None
    response_format: _ResponseFormat | None = None
    return_token_ids: bool | None = None
    chat_template_kwargs: _TemplateSettings | None = None
    modalities: Annotated[Any, Meta(extra_json_schema={"enum": [None, ["text"]]})] = None
    logit_bias: Refused = None
    audio: Refused = None
    functions: Refused = None
    function_call: Refused = None
    web_search_options: Refused = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    repetition_penalty: One = None


def read_chat(data: bytes, settings: GatewaySettings) -> tuple[Call, ChatBody]:
    """Read a body.

    Raises:
        RequestError: not JSON, a missing or wrong field, or one that is not supported.
    """
    body = read_body(data, ChatBody)
    return chat_call(body, settings), body


def chat_call(body: ChatBody, settings: GatewaySettings) -> Call:
    """The call that a body asks for.

    Raises:
        RequestError: a wrong message or tool, or a field that is not supported.
    """
    _refuse_unsupported(body)
    for index, message in enumerate(body.messages):
        _check_message(convert_body(message, Message, where=f"messages[{index}]"), f"messages[{index}]")
    for index, tool in enumerate(body.tools or []):
        convert_body(tool, Tool, where=f"tools[{index}]")
    tools = body.tools or []
    return Call(
        messages=body.messages,
        tools=tools,
        tool_choice=_tool_choice(body.tool_choice, tools),
        parallel_tools=body.parallel_tool_calls is not False,
        format=_format(body.response_format),
        sampling=sampling_of(
            settings,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            seed=body.seed,
        ),
        max_tokens=body.max_completion_tokens or body.max_tokens or settings.default_max_tokens,
        stops=stop_strings(body.stop),
        stream=bool(body.stream),
        n=body.n or 1,
        logprobs=bool(body.logprobs),
        top_logprobs=_top_logprobs(body),
        thinking=body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None,
        model=body.model,
        version=pinned_version(body.model),
        prompt_cache_key=body.prompt_cache_key or "",
    )


def sampling_of(
    settings: GatewaySettings,
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
) -> Sampling:
    """How to sample, where the client says nothing by our defaults."""
    return Sampling(
        temperature=settings.default_temperature if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=max(0, top_k or 0),
        min_p=float(min_p or 0.0),
        seed=seed,
    )


def choose_tool(name: str, tools: list[Json], *, param: str = "tool_choice") -> ToolChoice:
    """The choice of one tool.

    Raises:
        RequestError: it is not among `tools`.
    """
    if not any(tool["function"]["name"] == name for tool in tools):
        raise RequestError(f"{param} names {name!r}, which is not among the tools", param=param)
    return ToolChoice(Choosing.REQUIRED, name)


def require_tool(tools: list[Json], *, param: str = "tool_choice") -> ToolChoice:
    """The choice of any tool.

    Raises:
        RequestError: there is none to choose.
    """
    if not tools:
        raise RequestError(f"{param} asks for a tool call, and no tools are given", param=param)
    return ToolChoice(Choosing.REQUIRED)


_UNSUPPORTED = {
    "logit_bias": "logit_bias is not supported",
    "audio": "audio is not supported",
    "functions": "functions is not supported; use tools",
    "function_call": "function_call is not supported; use tools",
    "web_search_options": "web_search_options is not supported",
    "presence_penalty": "presence_penalty is not supported",
    "frequency_penalty": "frequency_penalty is not supported",
}


def _refuse_unsupported(body: ChatBody) -> None:
    for name, message in _UNSUPPORTED.items():
        if getattr(body, name):
            raise unsupported(name, message)
    if body.repetition_penalty not in (None, 1):
        raise unsupported("repetition_penalty", "repetition_penalty is not supported")
    if body.modalities not in (None, ["text"]):
        raise unsupported("modalities", "modalities other than text are not supported")


def _tool_choice(choice: str | _NamedTool | None, tools: list[Json]) -> ToolChoice:
    if isinstance(choice, _NamedTool):
        return choose_tool(choice.function.name, tools)
    if choice == "required":
        return require_tool(tools)
    return ToolChoice(Choosing(choice or "auto"))


def _format(wanted: _ResponseFormat | None) -> Format:
    if wanted is None or wanted.type == "text":
        return Format()
    if wanted.type == "json_object":
        return Format(schema={})
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise RequestError("response_format json_schema needs json_schema.schema", param="response_format")
    return Format(wanted.json_schema.schema, wanted.json_schema.name, strict=wanted.json_schema.strict is not False)


def _top_logprobs(body: ChatBody) -> int:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    return body.top_logprobs or 0


def _check_message(message: Message, where: str) -> None:
    if message.function_call is not None:
        raise unsupported(f"{where}.function_call", "function_call is not supported; use tool_calls")
    for index, part in enumerate(message.content if isinstance(message.content, list) else []):
        _check_part(part, f"{where}.content[{index}]")
    if message.tool_calls and message.role != "assistant":
        raise RequestError(f"{where}: only an assistant message has tool_calls", param=where)
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError(f"{where}: a tool message needs tool_call_id", param=f"{where}.tool_call_id")
    if message.content is None and message.role != "assistant":
        raise RequestError(f"{where}: content is missing", param=f"{where}.content")


def _check_part(part: Json, where: str) -> None:
    kind = part.get("type")
    if kind != "text":
        raise unsupported(where, f"{where}: only parts of type text are supported")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: a text part needs text", param=f"{where}.text", code="invalid_type")

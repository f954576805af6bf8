"""The body of a Responses call: read, checked, and brought to the common form.

Nothing is kept for clients to fetch, so what refers to something kept is refused, with the way out. Unknown fields are
ignored. A field that would change the answer and is not supported is refused by name.
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
from clawloop_edge.gateway.chat_request import (
    Count,
    MinP,
    Name,
    Seed,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
    choose_tool,
    require_tool,
    sampling_of,
)
from clawloop_edge.gateway.responses_input import read_input
from clawloop_edge.gateway.settings import GatewaySettings

LOGPROBS = "message.output_text.logprobs"
_INCLUDES = frozenset(
    {
        LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""what a client may ask to see beside the answer; but for logprobs there is never any of it"""
Include = Annotated[str, Meta(extra_json_schema={"enum": sorted(_INCLUDES)})]


class FunctionTool(msgspec.Struct):
    """One tool; further fields are ignored."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Json | None = None


class _Named(msgspec.Struct):
    type: str
    name: str = ""


class _AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_Named], Meta(min_length=1)]


class TextFormat(msgspec.Struct, omit_defaults=True):
    """`text.format`: free text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    schema: Json | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, omit_defaults=True):
    """`text`; the verbosity is a hint that no model of ours knows."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct):
    """`reasoning`; how much a model thinks is up to it, but for `none`."""

    effort: str | None = None
    summary: str | None = None


class ResponsesBody(CallBody):
    """What a Responses call may say; further fields are ignored."""

    input: str | list[Any] | None = None
    model: str = "clawloop"
    instructions: str | None = None
    tools: list[Json] | None = None
    tool_choice: Literal["auto", "none", "required"] | Json | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Count | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[Include] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Annotated[Literal["auto", "disabled"] | None, Meta(extra_json_schema={"enum": [None, "disabled"]})] = (
        None
    )
    store: bool | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None
    background: Refused = None
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    context_management: Refused = None
    moderation: Refused = None
    n: One = None
    messages: Refused = None
    max_tokens: Refused = None
    max_completion_tokens: Refused = None
    response_format: Refused = None
    functions: Refused = None
    logit_bias: Refused = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    repetition_penalty: One = None


def read_responses(data: bytes, settings: GatewaySettings) -> tuple[Call, ResponsesBody]:
    """Read a body.

    Raises:
        RequestError: not JSON, a missing or wrong field, or one that is not supported.
    """
    body = read_body(data, ResponsesBody)
    _refuse_unsupported(body)
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or [])]
    tools, choice = _choose(body.tool_choice, tools)
    logprobs = _includes(body)
    call = Call(
        messages=read_input(body.input, body.instructions),
        tools=tools,
        tool_choice=choice,
        parallel_tools=body.parallel_tool_calls is not False,
        format=_format(body.text.format if body.text else None),
        sampling=sampling_of(
            settings,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            seed=body.seed,
        ),
        max_tokens=body.max_output_tokens or settings.default_max_tokens,
        stops=stop_strings(body.stop),
        stream=bool(body.stream),
        logprobs=logprobs,
        top_logprobs=body.top_logprobs or 0,
        thinking=False if body.reasoning and body.reasoning.effort == "none" else None,
        model=body.model,
        version=pinned_version(body.model),
        prompt_cache_key=body.prompt_cache_key or "",
    )
    return call, body


_WHOLE = "is not supported, since no answers are kept to be fetched; send the whole conversation as input"
_UNSUPPORTED = {
    "previous_response_id": f"previous_response_id {_WHOLE}",
    "conversation": f"conversation {_WHOLE}",
    "prompt": "prompt templates are not supported; send instructions and input",
    "background": "background is not supported; stream the answer, or wait for it",
    "context_management": "context_management is not supported, since nothing is cut in silence; send a shorter input",
    "moderation": "moderation is not supported",
    "messages": "messages is not supported here; use input, or POST /v1/chat/completions",
    "max_tokens": "max_tokens is not supported here; use max_output_tokens",
    "max_completion_tokens": "max_completion_tokens is not supported here; use max_output_tokens",
    "response_format": "response_format is not supported here; use text.format",
    "functions": "functions is not supported; use tools",
    "logit_bias": "logit_bias is not supported",
    "presence_penalty": "presence_penalty is not supported",
    "frequency_penalty": "frequency_penalty is not supported",
}


def _refuse_unsupported(body: ResponsesBody) -> None:
    for name, message in _UNSUPPORTED.items():
        if getattr(body, name):
            raise unsupported(name, message)
    if body.truncation == "auto":
        raise unsupported(
            "truncation", "truncation auto is not supported, since nothing is cut in silence; use disabled"
        )
    if body.n not in (None, 1):
        raise unsupported("n", "n is not supported here; make several calls, or use POST /v1/chat/completions")
    if body.repetition_penalty not in (None, 1):
        raise unsupported("repetition_penalty", "repetition_penalty is not supported")


def _tool(tool: Json, where: str) -> Json:
    """A tool in the shape of chat completions; `strict` is left out, since a model has no use for it."""
    kind = tool.get("type")
    if kind != "function":
        raise unsupported(where, f"{where}: tools of type {kind!r} are not supported; only function tools are")
    known = convert_body(tool, FunctionTool, where=where)
    about = {"description": known.description, "parameters": known.parameters}
    return {
        "type": "function",
        "function": {"name": known.name, **{key: value for key, value in about.items() if value is not None}},
    }


def _choose(choice: str | Json | None, tools: list[Json]) -> tuple[list[Json], ToolChoice]:
    """The tools that are offered, and how they may be used."""
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind == "allowed_tools":
            return _allow(convert_body(choice, _AllowedTools, where="tool_choice"), tools)
        if kind != "function":
            message = f"tool_choice of type {kind!r} is not supported; only function and allowed_tools are"
            raise unsupported("tool_choice", message)
        return tools, choose_tool(convert_body(choice, _Named, where="tool_choice").name, tools)
    if choice == "required":
        return tools, require_tool(tools)
    return tools, ToolChoice(Choosing(choice or "auto"))


def _allow(allowed: _AllowedTools, tools: list[Json]) -> tuple[list[Json], ToolChoice]:
    param = "tool_choice.tools"
    for tool in allowed.tools:
        if tool.type != "function":
            raise unsupported(param, f"{param}: tools of type {tool.type!r} are not supported; only function tools are")
        choose_tool(tool.name, tools, param=param)
    names = {tool.name for tool in allowed.tools}
    offered = [tool for tool in tools if tool["function"]["name"] in names]
    return offered, require_tool(offered) if allowed.mode == "required" else ToolChoice()


def _format(wanted: TextFormat | None) -> Format:
    if wanted is None or wanted.type == "text":
        return Format()
    if wanted.type == "json_object":
        return Format(schema={})
    if wanted.schema is None:
        raise RequestError("text.format json_schema needs a schema", param="text.format.schema")
    return Format(wanted.schema, wanted.name, strict=wanted.strict is not False)


def _includes(body: ResponsesBody) -> bool:
    """Whether logprobs are asked for."""
    asked = body.include or []
    for name in asked:
        if name not in _INCLUDES:
            raise unsupported("include", f"include {name!r} is not supported; known are {sorted(_INCLUDES)}")
    if body.top_logprobs and LOGPROBS not in asked:
        raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}]", param="top_logprobs")
    return LOGPROBS in asked

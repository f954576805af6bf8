"""The body of a call to Anthropic's Messages API: read, checked, and brought to the common form.

Unknown fields are ignored, and so are hints that cost nothing to pass over (`cache_control`, `service_tier`, budgets).
A block or field that would change the answer and is not supported is refused by name.
Reference: the types of the `anthropic` package, 2.12.0.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from clawloop_edge.engine.tool_calls import ToolCall
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.body import (
    CallBody,
    Json,
    Refused,
    Stops,
    pinned_version,
    read_body,
    stop_strings,
    unsupported,
)
from clawloop_edge.gateway.call import Call, Choosing, Format, ToolChoice
from clawloop_edge.gateway.chat_request import Count, Name, TopP, choose_tool, require_tool, sampling_of
from clawloop_edge.gateway.settings import GatewaySettings

Temperature = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_UNKNOWN_TYPE = re.compile(r"has an unknown value: ('.{0,64}')")
_ENTRY_BYTES = 300
_MAX_BYTES = 4 << 20


class _Text(msgspec.Struct, tag="text"):
    text: str


class _OnlyText(msgspec.Struct):
    """A text where no other block may stand; a tag alone would not be asked for there."""

    type: Literal["text"]
    text: str


class _Thinking(msgspec.Struct, tag="thinking"):
    thinking: str


class _RedactedThinking(msgspec.Struct, tag="redacted_thinking"):
    data: str = ""


class _ToolUse(msgspec.Struct, tag="tool_use"):
    id: str
    name: str  # a model may have called what was never offered, and its agent sends that back
    input: Json


class _ToolResult(msgspec.Struct, tag="tool_result"):
    tool_use_id: str
    content: str | list[_OnlyText] | None = None
    is_error: bool | None = None


class _User(msgspec.Struct, tag_field="role", tag="user"):
    content: str | Annotated[list[_Text | _ToolResult], Meta(min_length=1)]


class _Assistant(msgspec.Struct, tag_field="role", tag="assistant"):
    content: str | list[_Text | _Thinking | _RedactedThinking | _ToolUse]


class _System(msgspec.Struct, tag_field="role", tag="system"):
    content: str | list[_OnlyText]


class _Tool(msgspec.Struct):
    name: Name
    input_schema: Json
    type: Literal["custom"] | None = None
    description: str | None = None


class _Choice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class _ThinkingConfig(msgspec.Struct):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class _OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: Json


class _OutputConfig(msgspec.Struct):
    format: _OutputFormat | None = None


class CountBody(CallBody, kw_only=True):
    """What a call may say whose tokens are to be counted; how it would be sampled has no bearing."""

    messages: Annotated[list[_User | _Assistant | _System], Meta(min_length=1)]
    model: str = "clawloop"
    max_tokens: Count | None = None
    system: str | list[_OnlyText] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _ThinkingConfig | None = None
    output_config: _OutputConfig | None = None
    output_format: _OutputFormat | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: Json | None = None
    container: Refused = None
    mcp_servers: Refused = None

    @property
    def thoughts_shown(self) -> bool:
        """Whether the client wants to read the model's thoughts."""
        return self.thinking is None or self.thinking.display != "omitted"


class MessagesBody(CountBody, kw_only=True):
    """What a call may say; further fields are ignored."""

    max_tokens: Count


_Body = TypeVar("_Body", bound=CountBody)


class SampledInputs:
    """Arguments of tool calls as the model wrote them, by id: clients give back an object, without its spacing, and
    JavaScript's make 1.0 a 1. Of late calls only, about 4 MiB in memory; others are written anew."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0

    def note(self, call: ToolCall) -> None:
        """Remember a call's arguments."""
        self._bytes += _size(call.arguments) - _size(self._texts.pop(call.call_id, None))
        self._texts[call.call_id] = call.arguments
        while self._bytes > _MAX_BYTES:
            self._bytes -= _size(self._texts.popitem(last=False)[1])

    def text(self, call_id: str, value: Json) -> str:
        """`value` as the model wrote it if call `call_id` had it, else as chat templates write it."""
        known = self._texts.get(call_id)
        if known is not None and msgspec.json.decode(known) == value:
            return known
        return json.dumps(value, ensure_ascii=False)


def read_messages(data: bytes, settings: GatewaySettings, *, inputs: SampledInputs) -> tuple[Call, MessagesBody]:
    """Read a body.

    Raises:
        RequestError: not JSON, a missing or wrong field, or one that is not supported.
    """
    body = _read(data, MessagesBody)
    return _call(body, settings, inputs=inputs), body


def read_count(data: bytes, settings: GatewaySettings, *, inputs: SampledInputs) -> Call:
    """The call whose tokens are to be counted. Raises RequestError like `read_messages`."""
    return _call(_read(data, CountBody), settings, inputs=inputs)


def _size(text: str | None) -> int:
    return 0 if text is None else _ENTRY_BYTES + len(text)


def _read(data: bytes, kind: type[_Body]) -> _Body:
    try:
        body = read_body(data, kind)
    except RequestError as error:
        raise _explained(error) from error
    for name in ("container", "mcp_servers"):
        if getattr(body, name):
            raise unsupported(name, f"{name} is not supported: the gateway runs no tools of its own")
    return body


def _explained(error: RequestError) -> RequestError:
    """A block or tool of a type that is not known is mostly one that needs more than a text model."""
    found, param = _UNKNOWN_TYPE.search(str(error)), error.param or ""
    if found is None or not param.endswith(".type") or "[" not in param:
        return error
    kind = "tools" if param.startswith("tools") else "content blocks"
    where = param.removesuffix(".type")
    return unsupported(where, f"{where}: {kind} of type {found.group(1)} are not supported here")


def _call(body: CountBody, settings: GatewaySettings, *, inputs: SampledInputs) -> Call:
    tools = [_tool(tool) for tool in body.tools or []]
    choice = body.tool_choice
    return Call(
        messages=_messages(body, inputs),
        tools=tools,
        tool_choice=_tool_choice(choice, tools),
        parallel_tools=not (choice and choice.disable_parallel_tool_use),
        format=_format(body),
        sampling=sampling_of(settings, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k),
        max_tokens=body.max_tokens or settings.default_max_tokens,
        stops=stop_strings(body.stop_sequences),
        stream=bool(body.stream),
        thinking=body.thinking.type != "disabled" if body.thinking else None,
        model=body.model,
        version=pinned_version(body.model),
    )


def _messages(body: CountBody, inputs: SampledInputs) -> list[Json]:
    system = _system(body.system or "")
    messages = [system] if system["content"] else []
    try:
        for message in body.messages:
            match message:
                case _User():
                    messages += _user(message.content)
                case _Assistant():
                    messages.append(_assistant(message.content, inputs))
                case _System():
                    messages.append(_system(message.content))
    except RecursionError as error:
        raise RequestError("messages are nested too deep", param="messages") from error
    if messages[-1]["role"] == "assistant":
        # Each chat template closes a turn in its own way, and some rewrite it: no prefix of an answer can be exact.
        where = f"messages[{len(body.messages) - 1}]"
        raise unsupported(where, f"{where}: an answer that is begun cannot be continued; end with a user message")
    return messages


def _system(content: str | list[_OnlyText]) -> Json:
    """OpenClaw cuts its system prompt in two blocks here, and sends it with this line break to other APIs."""
    return {"role": "system", "content": content if isinstance(content, str) else "\n".join(_texts(content))}


def _user(content: str | Sequence[_Text | _ToolResult]) -> list[Json]:
    """Runs of text are a user message each, and each tool result is a message of its own, in order."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    found: list[Json] = []
    for is_text, blocks in groupby(content, lambda block: isinstance(block, _Text)):
        if is_text:
            found.append({"role": "user", "content": _joined(_texts(blocks))})
        else:
            found += [_result(block) for block in blocks if isinstance(block, _ToolResult)]
    return found


def _result(block: _ToolResult) -> Json:
    content = block.content if isinstance(block.content, str) else _joined(_texts(block.content or []))
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": content or ("error" if block.is_error else ""),
    }


def _assistant(content: str | Sequence[Any], inputs: SampledInputs) -> Json:
    """One message in the very form in which replies are recorded."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    text = "".join(_texts(content))
    thoughts = [block.thinking for block in content if isinstance(block, _Thinking) and block.thinking]
    calls = [
        ToolCall(block.id, block.name, inputs.text(block.id, block.input)).as_openai()
        for block in content
        if isinstance(block, _ToolUse)
    ]
    message: Json = {"role": "assistant", "content": text or (None if calls else "")}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _texts(blocks: Any) -> list[str]:
    return [block.text for block in blocks if isinstance(block, _Text | _OnlyText)]


def _joined(texts: list[str]) -> str | list[Json]:
    """One text as such, several as parts: a block that becomes a string in a later call stays the same."""
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _tool(tool: _Tool) -> Json:
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _tool_choice(choice: _Choice | None, tools: list[Json]) -> ToolChoice:
    match choice.type if choice else "auto":
        case "tool":
            return choose_tool(choice.name if choice else "", tools)
        case "any":
            return require_tool(tools)
        case "none":
            return ToolChoice(Choosing.NONE)
    return ToolChoice()


def _format(body: CountBody) -> Format:
    wanted = (body.output_config.format if body.output_config else None) or body.output_format
    return Format(wanted.schema) if wanted else Format()

"""The body of a chat completions call: read, checked, and brought to what the engine understands.

Unknown fields are ignored. A field that would change the answer and is not supported is refused by name.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_shared.records import Sampling

Json = dict[str, Any]
T = TypeVar("T", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `\$\.?(.*?)`\Z")
_MISSING = re.compile(r"missing required field `(.*?)`")
_PINNED = re.compile(r"\Aclawloop@(\d{1,9})\Z")
_MAX_STOPS = 16
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class _Function(msgspec.Struct):
    name: str  # a model may have called what was never offered, and its agent sends that back
    arguments: str = ""


class _Call(msgspec.Struct):
    id: str
    function: _Function
    type: Literal["function"] = "function"


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Json] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    function_call: Any = None


class _ToolFunction(msgspec.Struct):
    name: _Name
    description: str | None = None
    parameters: Json | None = None


class _Tool(msgspec.Struct):
    type: Literal["function"]
    function: _ToolFunction


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    messages: Annotated[list[Json], Meta(min_length=1)]
    model: str = "clawloop"
    tools: list[Json] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prompt_cache_key: str | None = None
    n: int | None = None
    response_format: Any = None
    modalities: Any = None
    logit_bias: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None


class ChatCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call, checked. `offered` are the tools that the model is shown; `max_tokens` may pass the context."""

    messages: list[Json]
    tools: list[Json]
    offered: list[Json]
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool
    version: int | None
    prompt_cache_key: str


def parse_chat(data: bytes, settings: GatewaySettings) -> ChatCall:
    """Read a body.

    Raises:
        RequestError: not JSON, a missing or wrong field, or one that is not supported.
    """
    body = convert_body(decode_json(data), _Body)
    _refuse_unsupported(body)
    for index, message in enumerate(body.messages):
        _check_message(convert_body(message, _Message, where=f"messages[{index}]"), f"messages[{index}]")
    for index, tool in enumerate(body.tools or []):
        convert_body(tool, _Tool, where=f"tools[{index}]")
    tools = body.tools or []
    return ChatCall(
        messages=body.messages,
        tools=tools,
        offered=[] if body.tool_choice == "none" else tools,
        sampling=_sampling(body, settings),
        max_tokens=body.max_completion_tokens or body.max_tokens or settings.default_max_tokens,
        stops=_stops(body.stop),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        logprobs=bool(body.logprobs),
        version=pinned_version(body.model),
        prompt_cache_key=body.prompt_cache_key or "",
    )


def pinned_version(model: str) -> int | None:
    """The adapter version that a model name asks for; None is the current one.

    Raises:
        RequestError: `clawloop@` and no version (404).
    """
    found = _PINNED.match(model)
    if found:
        return int(found.group(1))
    if model.startswith("clawloop@"):
        raise RequestError(
            "model names a version that is no number; write clawloop or clawloop@NUMBER",
            status=404,
            param="model",
            code="model_not_found",
        )
    return None


def decode_json(data: bytes) -> Any:
    """The value of a JSON body.

    Raises:
        RequestError: it is not JSON, or nested too deep.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is not JSON that can be read: nested too deep", code="invalid_json") from error


def convert_body(value: Any, kind: type[T], *, where: str = "") -> T:
    """`value` as `kind`.

    Raises:
        RequestError: a field is missing or has another type; `param` names it.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        places = [found.group(1) for pattern in (_PLACE, _MISSING) if (found := pattern.search(text))]
        param = ".".join(filter(None, (where, *places))).replace(".[", "[")
        message = _PLACE.sub("", text)
        raise RequestError(f"{param or 'body'}: {message}", param=param or None, code="invalid_type") from error


_UNSUPPORTED = {
    "logit_bias": "logit_bias is not supported",
    "audio": "audio is not supported",
    "functions": "functions is not supported; use tools",
    "function_call": "function_call is not supported; use tools",
    "web_search_options": "web_search_options is not supported",
    "presence_penalty": "presence_penalty is not supported",
    "frequency_penalty": "frequency_penalty is not supported",
}


def _refuse_unsupported(body: _Body) -> None:
    for name, message in _UNSUPPORTED.items():
        if getattr(body, name):
            raise _unsupported(name, message)
    if body.n not in (None, 1):
        raise _unsupported("n", f"n is {body.n}; one choice a call is supported")
    if body.top_logprobs:
        raise _unsupported("top_logprobs", "top_logprobs is not supported; logprobs gives the sampled tokens' own")
    if body.repetition_penalty not in (None, 1):
        raise _unsupported("repetition_penalty", "repetition_penalty is not supported")
    if body.response_format not in (None, {"type": "text"}):
        raise _unsupported("response_format", "response_format other than text is not supported")
    if body.modalities not in (None, ["text"]):
        raise _unsupported("modalities", "modalities other than text are not supported")
    if body.tool_choice not in (None, "auto", "none"):
        raise _unsupported("tool_choice", "tool_choice other than auto and none is not supported")
    if body.parallel_tool_calls is False and body.tools:
        raise _unsupported("parallel_tool_calls", "parallel_tool_calls: false is not supported")


def _unsupported(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="unsupported_parameter")


def _check_message(message: _Message, where: str) -> None:
    if message.function_call is not None:
        raise _unsupported(f"{where}.function_call", "function_call is not supported; use tool_calls")
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
        raise _unsupported(where, f"{where}: only parts of type text are supported")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: a text part needs text", param=f"{where}.text", code="invalid_type")


def _sampling(body: _Body, settings: GatewaySettings) -> Sampling:
    return Sampling(
        temperature=settings.default_temperature if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=max(0, body.top_k or 0),
        min_p=float(body.min_p or 0.0),
        seed=body.seed,
    )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or not all(stops):
        raise RequestError(f"stop: at most {_MAX_STOPS} strings, none of them empty", param="stop")
    return stops

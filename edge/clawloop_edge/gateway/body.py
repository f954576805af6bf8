"""Request bodies: JSON, then the fields of one call, with an error that names what is wrong. Pure."""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from clawloop_edge.errors import RequestError

Json = dict[str, Any]
T = TypeVar("T", bound=msgspec.Struct)
Refused = Annotated[Any, Meta(extra_json_schema={"enum": [None, False, 0, "", [], {}]})]
"""of a field that would change the answer and is not supported: whatever says nothing is accepted"""
Zero = Annotated[float | None, Meta(extra_json_schema={"enum": [None, 0]})]
One = Annotated[float | None, Meta(extra_json_schema={"enum": [None, 1]})]
Stop = Annotated[str, Meta(min_length=1)]
Stops = Annotated[list[Stop], Meta(max_length=16)]
_PLACE = re.compile(r" - at `\$\.?(.*?)`\Z")
_MISSING = re.compile(r"\AObject missing required field `(.*?)`")
_UNKNOWN = re.compile(r"\AObject contains unknown field `(.*?)`")
_EXPECTED = re.compile(r"\AExpected `([a-z |]+)`(.*?)(?:, got `([a-z]+)`)?\Z")
_NO_MEMBER = re.compile(r"\AInvalid (?:enum )?value ")
_JSON_WORDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
}
_PINNED = re.compile(r"\Aclawloop@(\d{1,9})\Z")


class CallBody(msgspec.Struct, kw_only=True):
    """What the body of any call may say: fields of other servers that would change the answer, and that no API of ours
    knows."""

    best_of: Refused = None
    guided_choice: Refused = None
    guided_grammar: Refused = None
    guided_json: Refused = None
    guided_regex: Refused = None
    ignore_eos: Refused = None
    length_penalty: Refused = None
    logits_processors: Refused = None
    min_tokens: Refused = None
    stop_token_ids: Refused = None
    structured_outputs: Refused = None
    use_beam_search: Refused = None


B = TypeVar("B", bound=CallBody)


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


def convert_body(value: Any, kind: type[T], *, where: str = "", strict: bool = True) -> T:
    """`value` as `kind`; not `strict`: texts stand for numbers, as in a query.

    Raises:
        RequestError: a field is missing or has another type; `param` names it.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        text = str(error)
        places = [found.group(1) for pattern in (_PLACE, _MISSING, _UNKNOWN) if (found := pattern.search(text))]
        param = ".".join(filter(None, (where, *places))).replace(".[", "[")
        message = f"{param or 'the body'} {_wrong(_PLACE.sub('', text))}"
        raise RequestError(message, param=param or None, code="invalid_type") from error


def _wrong(text: str) -> str:
    """What is wrong with a field, in JSON's words: `must be an integer or null, not a string`."""
    if _MISSING.match(text):
        return "is missing"
    if _UNKNOWN.match(text):
        return "is not known here"
    expected = _EXPECTED.match(text)
    if expected is None:
        return _NO_MEMBER.sub("has an unknown value: ", text)
    kinds, bounds, given = expected.groups()
    wanted = " or ".join(_JSON_WORDS.get(kind, kind) for kind in kinds.split(" | "))
    got = "a floating-point number" if given == "float" else _JSON_WORDS.get(given, given)
    return f"must be {wanted}{bounds}{f', not {got}' if given else ''}"


def read_body(data: bytes, kind: type[B]) -> B:
    """A JSON body as `kind`, free of fields that no API of ours knows and that would change the answer.

    Raises:
        RequestError: not JSON, a wrong field, or one that is not supported.
    """
    body = convert_body(decode_json(data), kind)
    for name in CallBody.__struct_fields__:
        if getattr(body, name):
            raise unsupported(name, f"{name} is not supported")
    return body


def unsupported(param: str, message: str) -> RequestError:
    """The refusal of a field that would change the answer."""
    return RequestError(message, param=param, code="unsupported_parameter")


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


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings of a call."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())

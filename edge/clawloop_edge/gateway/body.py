"""Request bodies: JSON, then the fields of one call, with an error that names what is wrong. Pure."""

import re
from typing import Any, TypeVar

import msgspec

from clawloop_edge.errors import RequestError

Json = dict[str, Any]
T = TypeVar("T", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `\$\.?(.*?)`\Z")
_MISSING = re.compile(r"missing required field `(.*?)`")
_PINNED = re.compile(r"\Aclawloop@(\d{1,9})\Z")
_MAX_STOPS = 16
UNSUPPORTED_EXTENSIONS = (
    "best_of",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "length_penalty",
    "logits_processors",
    "min_tokens",
    "stop_token_ids",
    "structured_outputs",
    "use_beam_search",
)
"""fields of other servers that would change the answer, and that no API of ours knows"""


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


def read_body(data: bytes, kind: type[T]) -> T:
    """A JSON body as `kind`, free of fields that no API of ours knows and that would change the answer.

    Raises:
        RequestError: not JSON, a wrong field, or one of `UNSUPPORTED_EXTENSIONS`.
    """
    value = decode_json(data)
    body = convert_body(value, kind)
    for name in UNSUPPORTED_EXTENSIONS:
        if value.get(name):
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


def stop_strings(stop: str | list[str] | None, *, param: str = "stop") -> tuple[str, ...]:
    """The stop strings of a call.

    Raises:
        RequestError: too many of them, or an empty one.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or not all(stops):
        raise RequestError(f"{param}: at most {_MAX_STOPS} strings, none of them empty", param=param)
    return stops

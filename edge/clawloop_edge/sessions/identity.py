"""Who is calling: the names of session and run that a request carries in headers and body. Pure.

Names come in this order: the caller's own header, the session affinity headers, `prompt_cache_key`, OpenClaw's
`Runtime:` line. The trace id names the run. Without any, the chain of messages decides (`tracker`).
"""

import re
from collections.abc import Mapping

import msgspec

from clawloop_edge.errors import RequestError
from clawloop_edge.sessions import openclaw
from clawloop_shared.records import Channel

SESSION_HEADER = "X-Clawloop-Session"
CHANNEL_HEADER = "X-Clawloop-Channel"
INCOGNITO_HEADER = "X-Clawloop-Incognito"
_AFFINITY_HEADERS = ("session_id", "x-session-affinity")
_TRACE = re.compile(r"\A(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?\Z")
_GENERATION = re.compile(r":\d{1,9}\Z")
_NAME = re.compile(r"\A[\x21-\x7e](?:[\x20-\x7e]{0,198}[\x21-\x7e])?\Z")


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """A call's place in the trajectory that its URL names: the number and the time (ms) of its first choice's step.
    `closed`: the trajectory had been completed before."""

    trajectory_id: str
    group_id: str
    index: int
    created_ms: int
    group_size: int = 0
    closed: bool = False


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The names a request carries; empty where it carries none."""

    session_id: str = ""
    trace_id: str = ""
    channel: Channel = Channel.TRAIN
    incognito: bool = False
    seat: Seat | None = None


def identify(headers: Mapping[str, str], *, prompt_cache_key: str = "", runtime: str = "") -> Identity:
    """Read the names.

    Raises:
        RequestError: one of clawloop's own headers has a value that it cannot have.
    """
    return Identity(
        session_id=_session(headers, prompt_cache_key, runtime),
        trace_id=trace_id(headers.get("traceparent", "")),
        channel=_channel(headers.get(CHANNEL_HEADER)),
        incognito=_flag(headers.get(INCOGNITO_HEADER)),
    )


def trace_id(traceparent: str) -> str:
    """The trace id of a W3C `traceparent` header, or an empty string (https://www.w3.org/TR/trace-context/)."""
    found = _TRACE.match(traceparent)
    return found.group(1) if found else ""


def _session(headers: Mapping[str, str], prompt_cache_key: str, runtime: str) -> str:
    own = headers.get(SESSION_HEADER)
    if own is not None:
        if not _NAME.match(own):
            raise RequestError(f"{SESSION_HEADER} must be 1 to 200 printable ASCII characters", code="invalid_header")
        return own
    named = [headers.get(name, "") for name in _AFFINITY_HEADERS]
    for candidate in (*named, prompt_cache_key):
        if _NAME.match(candidate):
            return _GENERATION.sub("", candidate)
    return openclaw.session_id(runtime)


def _channel(value: str | None) -> Channel:
    if value is None:
        return Channel.TRAIN
    try:
        return Channel(value.lower())
    except ValueError as error:
        raise RequestError(f"{CHANNEL_HEADER} must be train or val", code="invalid_header") from error


def _flag(value: str | None) -> bool:
    if value is None or value in ("0", "false"):
        return False
    if value in ("1", "true"):
        return True
    raise RequestError(f"{INCOGNITO_HEADER} must be 0 or 1", code="invalid_header")

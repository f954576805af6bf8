"""Errors in the shape that the caller's API has, with the right status.

OpenAI: `{"error": {"message", "type", "param", "code"}}`; Anthropic: `{"type": "error", "error": {"type", "message"}}`.
Says nothing of what was asked or answered, only what is wrong with it.
"""

import logging
import traceback
from enum import StrEnum
from http import HTTPStatus

import msgspec
from aiohttp import web

from clawloop_edge.errors import EngineBusy, EngineError, EngineGone, PromptTooLong, RequestError, UnknownVersion
from clawloop_shared.errors import ClawloopError

_LOG = logging.getLogger(__name__)
_MAX_CHARS = 500
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 413: "request_too_large", 503: "overloaded_error"}


class Shape(StrEnum):
    """How an API writes its errors."""

    OPENAI = "openai"
    """OpenAI's, and of all paths that are ours alone"""
    ANTHROPIC = "anthropic"
    """Anthropic's"""
    CLAW_R1 = "claw-r1"
    """OpenAI's with a `detail` beside it, where clients of FastAPI look"""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One refusal, ready to be sent."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    allow: str | None = None
    """the methods of a path that has others"""

    @property
    def kind(self) -> str:
        """OpenAI's word for this class of error."""
        return _OPENAI_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self, shape: Shape = Shape.OPENAI) -> bytes:
        """The JSON body."""
        if shape is Shape.ANTHROPIC:
            default = "api_error" if self.status >= 500 else "invalid_request_error"
            named = {"type": _ANTHROPIC_TYPES.get(self.status, default), "message": self.message}
            return msgspec.json.encode({"type": "error", "error": named})
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        detail = {"detail": self.message} if shape is Shape.CLAW_R1 else {}
        return msgspec.json.encode({"error": error, **detail})

    def response(self, shape: Shape = Shape.OPENAI) -> web.Response:
        """The whole reply."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.allow is not None:
            headers["Allow"] = self.allow
        return web.Response(status=self.status, body=self.body(shape), content_type="application/json", headers=headers)


def failure_of(error: Exception, *, retry_after_s: int) -> Failure:
    """What to tell the client about an error. One that is not known is a bug: where it happened goes to the log, its
    text does not, because it may hold what was asked."""
    found = _known(error, retry_after_s)
    if found is not None:
        return found
    where = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("a call failed with %s at\n%s", type(error).__name__, where)
    return Failure(status=500, message="internal error; see the edge's log", code="internal_error")


def _known(error: Exception, retry_after_s: int) -> Failure | None:
    if isinstance(error, RequestError):
        return Failure(status=error.status, message=_short(str(error)), param=error.param, code=error.code)
    if isinstance(error, EngineError):
        return _engine_failure(error, retry_after_s)
    if isinstance(error, web.HTTPException):
        return _http_failure(error)
    if isinstance(error, ClawloopError):
        return Failure(status=503, message=str(error), code="unavailable", retry_after_s=retry_after_s)
    return None


def _short(message: str) -> str:
    """A message that quotes a long value without its middle: what was wrong, and the next step."""
    return message if len(message) <= _MAX_CHARS else f"{message[: _MAX_CHARS - 100]} [...] {message[-90:]}"


def _engine_failure(error: EngineError, retry_after_s: int) -> Failure:
    match error:
        case PromptTooLong():
            return Failure(status=400, message=str(error), param="messages", code="context_length_exceeded")
        case UnknownVersion():
            return Failure(status=404, message=str(error), param="model", code="model_not_found")
        case EngineBusy():
            return Failure(status=503, message=str(error), code="engine_busy", retry_after_s=retry_after_s)
        case EngineGone():
            return Failure(status=503, message=str(error), code="engine_gone")
    return Failure(status=500, message=str(error), code="engine_error")


def _http_failure(error: web.HTTPException) -> Failure:
    codes = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}
    messages = {
        404: "no such path; OpenAI's clients take a base URL with /v1, Anthropic's without; see GET /openapi.json",
        405: f"this path takes {error.headers.get('Allow', 'another method')}",
        413: error.text or "the request is too large",
    }
    message = messages.get(error.status, HTTPStatus(error.status).phrase)
    allow = error.headers.get("Allow")
    return Failure(status=error.status, message=message, code=codes.get(error.status), allow=allow)

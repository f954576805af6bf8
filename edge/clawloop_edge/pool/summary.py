"""What a list of sessions shows of each: its agent, its title and its times, sealed with the session's key. Pure."""

import msgspec

from clawloop_edge.pool.crypt import Scope
from clawloop_edge.pool.records import KeptStep

TITLE_CHARS = 80


class Summary(msgspec.Struct, frozen=True, array_like=True):
    """What is sealed of a session for lists of sessions."""

    app: str
    title: str
    first_ms: int


def read_summary(scope: Scope, session_id: str, *, sealed: bytes) -> Summary:
    """A session's sealed summary."""
    plain = scope.unseal("sessions", session_id, column="summary", sealed=sealed)
    return msgspec.msgpack.decode(plain, type=Summary)


def seal_summary(scope: Scope, session_id: str, *, summary: Summary) -> bytes:
    return scope.seal("sessions", session_id, column="summary", plain=msgspec.msgpack.encode(summary))


def summarise(kept: KeptStep, old: Summary | None) -> Summary:
    """The agent's own title for the session wins over the start of its first request."""
    if old is None:
        return Summary(app=kept.app, title=_title(kept), first_ms=kept.started_ms)
    named = kept.kind == "title" or not old.title
    return Summary(
        app=old.app or kept.app,
        title=(_title(kept) if named else "") or old.title,
        first_ms=min(old.first_ms, kept.started_ms),
    )


def _title(kept: KeptStep) -> str:
    if kept.kind == "title":
        content = kept.reply.get("content")
    else:
        asked = [message.get("content") for message in kept.messages if message.get("role") == "user"]
        content = asked[0] if asked else ""
    words = " ".join(_plain_text(content).encode(errors="replace").decode().split())
    return words if len(words) <= TITLE_CHARS else words[: TITLE_CHARS - 1] + "…"


def _plain_text(content: object) -> str:
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return " ".join(text for text in texts if isinstance(text, str))

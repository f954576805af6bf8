"""What a list of sessions shows of each: its agent, its title and its times, sealed with the session's key. Pure."""

import msgspec

from clawloop_edge.pool.crypt import Scope
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions.tree import parts_of, user_texts

TITLE_CHARS = 80
_NAMED = "title"
_ABOUT = frozenset({"compaction", "recap", "slug", "review", "helper"})
"""kinds of requests whose messages are about a conversation and not of it"""


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
    """The agent's own title for the session wins over the first thing that a person asked in it."""
    if old is None:
        return Summary(app=kept.app, title=_title(kept), first_ms=kept.started_ms)
    named = kept.kind == _NAMED or not old.title
    if not named and old.app and old.first_ms <= kept.started_ms:
        return old
    return Summary(
        app=old.app or kept.app,
        title=(_title(kept) if named else "") or old.title,
        first_ms=min(old.first_ms, kept.started_ms),
    )


def _title(kept: KeptStep) -> str:
    if kept.kind == _NAMED:
        texts = parts_of(kept.reply.get("content"))
    elif kept.kind in _ABOUT:
        texts = []
    else:
        asked = (message.get("content") for message in kept.messages if message.get("role") == "user")
        texts = next((found for content in asked if (found := user_texts(content))), [])
    text = " ".join(texts).encode(errors="replace").decode()
    words = " ".join(text.split(maxsplit=TITLE_CHARS))  # words of a long text that are past the title's end stay whole
    return words if len(words) <= TITLE_CHARS else words[: TITLE_CHARS - 1] + "…"

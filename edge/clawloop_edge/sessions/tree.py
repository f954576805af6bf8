"""A conversation as a tree of steps: messages brought to a common form and chained by hash. Pure.

Two messages are the same if role, text and tool calls are the same. System prompts and OpenClaw's ephemeral context are
left out, neighbouring user messages count as one, and tool-call ids are ignored, because clients change all of these
between two calls of one conversation. A step is found again by the chain up to and with its own reply.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from clawloop_edge.sessions import openclaw

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_DIGEST_BYTES = 16
ROOT = b""


class Turn(msgspec.Struct, frozen=True):
    """One message, or a run of user messages, in its common form. `index` is that of its last message."""

    role: str
    digest: bytes
    index: int
    call_ids: tuple[str, ...] = ()


def text_of(content: Any) -> str:
    """The text of a message's content, whether a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def user_text(content: Any) -> str:
    """The text that a person wrote, without what OpenClaw adds to each of its parts."""
    if isinstance(content, str):
        return openclaw.clean(content)
    parts = content if isinstance(content, list) else []
    return "\n".join(filter(None, (openclaw.clean(text_of([part])) for part in parts)))


def turns_of(messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """The conversation in its common form."""
    turns: list[Turn] = []
    pending: list[str] = []
    pending_index = -1
    for index, message in enumerate(messages):
        role = message.get("role", "")
        if role in ("system", "developer"):
            continue
        if role == "user":
            if not openclaw.is_internal(text_of(message.get("content"))):
                pending.append(user_text(message.get("content")))
                pending_index = index
            continue
        if pending:
            turns.append(_user_turn(pending, pending_index))
            pending = []
        turns.append(_turn(message, index))
    if pending:
        turns.append(_user_turn(pending, pending_index))
    return turns


def chain(turns: Iterable[Turn]) -> list[bytes]:
    """The hash of the conversation up to and with each turn."""
    hashes, last = [], ROOT
    for turn in turns:
        last = _link(last, turn.digest)
        hashes.append(last)
    return hashes


def reply_hash(prompt_hash: bytes, reply: dict[str, Any]) -> bytes:
    """The hash of a conversation once `reply`, an assistant message, has been added to it."""
    return _link(prompt_hash, _turn(reply, 0).digest)


def call_id_key(call_id: str) -> str:
    """A tool-call id as every client returns it: some strip all but letters and digits."""
    return "".join(c for c in call_id if c.isalnum())


def _user_turn(texts: list[str], index: int) -> Turn:
    return Turn("user", _digest("user", "\n".join(texts).strip(), []), index)


def _turn(message: dict[str, Any], index: int) -> Turn:
    role = message.get("role", "")
    calls = message.get("tool_calls") or []
    text = text_of(message.get("content"))
    if role == "assistant" and "<think>" in text:
        text = _THINK.sub("", text)
    ids = tuple(call_id_key(call["id"]) for call in calls if call.get("id"))
    return Turn(role, _digest(role, text.strip(), calls), index, ids)


def _digest(role: str, text: str, calls: list[dict[str, Any]]) -> bytes:
    hasher = blake2b(digest_size=_DIGEST_BYTES)
    functions = (call.get("function") or {} for call in calls)
    parts = [role, text, *(part for f in functions for part in (f.get("name", ""), _canonical(f.get("arguments"))))]
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(8, "big"))
        hasher.update(data)
    return hasher.digest()


def _canonical(arguments: Any) -> str:
    """Arguments as sorted JSON, so that spacing and key order do not matter; what is no JSON stays as it is."""
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
        return msgspec.json.encode(value, order="sorted").decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return str(arguments)


def _link(before: bytes, digest: bytes) -> bytes:
    return blake2b(before + digest, digest_size=_DIGEST_BYTES).digest()

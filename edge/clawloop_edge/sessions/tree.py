"""A conversation as a tree of steps: messages brought to a common form and chained by hash. Pure.

Two messages are the same if role, text and tool calls are the same. System prompts and OpenClaw's ephemeral context are
left out, neighbouring user messages count as one, and tool-call ids are ignored, because clients change all of these
between two calls of one conversation. A step is found again by the chain up to and with its own reply.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from clawloop_edge.sessions import openclaw

_THINK, _THINK_END = "<think>", "</think>"
_DIGEST_BYTES = 16
_MAX_STARTS = 8
ROOT = b""


class Turn(msgspec.Struct, frozen=True):
    """One message, or a run of user messages, in its common form. `index` is that of its last message.

    `texts` are those of a run of user messages, if there are several.
    """

    role: str
    digest: bytes
    index: int
    call_ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


def parts_of(content: Any) -> list[str]:
    """The texts of a message's content, whether a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]


def text_of(content: Any) -> str:
    """The text of a message's content in one piece."""
    return content if isinstance(content, str) else "\n".join(parts_of(content))


def user_texts(content: Any) -> list[str]:
    """What a person wrote in a user message, without what OpenClaw adds to each of its parts."""
    parts = parts_of(content)
    if parts and openclaw.is_internal(parts[0]):
        return []
    return [text for part in parts if (text := openclaw.clean(part))]


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
            texts = user_texts(message.get("content"))
            if texts:
                pending += texts
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


def shorter_hashes(turns: Sequence[Turn], chain: Sequence[bytes]) -> list[bytes]:
    """The hashes that the conversation had when the last texts of a run of user messages were not there yet."""
    found = []
    for position, turn in enumerate(turns):
        before = chain[position - 1] if position else ROOT
        for count in range(1, min(len(turn.texts), _MAX_STARTS)):
            found.append(_link(before, _user_digest(turn.texts[:count])))
    return found


def reply_hash(prompt_hash: bytes, reply: dict[str, Any]) -> bytes:
    """The hash of a conversation once `reply`, an assistant message, has been added to it."""
    return _link(prompt_hash, _turn(reply, 0).digest)


def call_id_key(call_id: str) -> str:
    """A tool-call id as every client returns it: some strip all but letters and digits."""
    return call_id if call_id.isalnum() else "".join(c for c in call_id if c.isalnum())


def _user_turn(texts: list[str], index: int) -> Turn:
    return Turn("user", _user_digest(texts), index, texts=tuple(texts) if len(texts) > 1 else ())


def _user_digest(texts: Sequence[str]) -> bytes:
    # A retry may put an empty line where two messages meet.
    return _digest("user", "\n".join(texts).strip().replace("\n\n", "\n"))


def _turn(message: dict[str, Any], index: int) -> Turn:
    role, text, calls = message.get("role", ""), text_of(message.get("content")), message.get("tool_calls")
    if role == "assistant" and _THINK in text:
        text = _without_thoughts(text)
    if not calls:
        return Turn(role, _digest(role, text.strip()), index)
    ids = tuple(call_id_key(call["id"]) for call in calls if call.get("id"))
    functions = (call.get("function") or {} for call in calls)
    said = [part for f in functions for part in (f.get("name", ""), _canonical(f.get("arguments")))]
    return Turn(role, _digest(role, text.strip(), *said), index, ids)


def _without_thoughts(text: str) -> str:
    """In one pass, as a model that went astray may have written nothing but start marks."""
    kept, at = [], 0
    while (start := text.find(_THINK, at)) >= 0 and (end := text.find(_THINK_END, start)) >= 0:
        kept.append(text[at:start])
        at = end + len(_THINK_END)
    return "".join([*kept, text[at:]])


def _digest(*parts: str) -> bytes:
    # The lengths keep apart what joined would be equal.
    data = "".join([f"{len(part)}:{part}" for part in parts]).encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _canonical(arguments: Any) -> str:
    """Arguments as sorted JSON, so that spacing and key order do not matter; what is no JSON stays as it is."""
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
        return msgspec.json.encode(value, order="sorted").decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return str(arguments)


def _link(before: bytes, digest: bytes) -> bytes:
    return blake2b(before + digest, digest_size=_DIGEST_BYTES).digest()

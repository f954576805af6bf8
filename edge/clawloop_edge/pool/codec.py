"""How one kept step lies in its two sealed columns: `tokens` (what is learned from) and `talk` (what was said).

Messages are kept as JSON texts that give back every value a JSON parser can make: numbers of any size, the order of
keys, lone surrogates. Long messages and the tools lie in `parts`, once a session, and are
named by a blind index of their text. Pure: seals nothing and knows no database.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from clawloop_edge.pool.chain import pack_floats, pack_ints, unpack_floats, unpack_ints
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.records import Step

PART_BYTES = 1024
"""messages of at least this size are stored once a session; under it, naming them would save little"""


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """The column `tokens`: the step without its lists, and the lists packed; `tail` is what the base's lack."""

    step: Step
    tail: bytes
    response: bytes
    logprobs: bytes


class Talk(msgspec.Struct, frozen=True, array_like=True):
    """The column `talk`. A message is the id of the part that holds it and no text, or no id and its JSON text."""

    messages: list[tuple[str, bytes]]
    reply: bytes
    tools: str
    rest: bytes


Part = Callable[[bytes], str]
"""stores a text once and gives its id"""


def to_json(value: object) -> bytes:
    """`value` as JSON text, exactly. The same value always gives the same text."""
    try:
        text = msgspec.json.encode(value)
    except (OverflowError, UnicodeEncodeError, RecursionError):
        text = b"null"
    # msgspec is ten times faster, but writes NaN and the infinities as null; so where a null is, Python's own does it.
    if b"null" not in text:
        return text
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def from_json(text: bytes) -> Any:
    """What `to_json` was given."""
    return json.loads(text.decode("utf-8", "surrogatepass"))


def encode_tokens(step: Step, shared: int) -> bytes:
    """The column `tokens` of a step whose first `shared` prompt ids are its base's."""
    bare = msgspec.structs.replace(step, prompt_ids=[], response_ids=[], response_logprobs=[])
    packed = Tokens(
        bare,
        pack_ints(step.prompt_ids[shared:]),
        pack_ints(step.response_ids),
        pack_floats(step.response_logprobs),
    )
    return msgspec.msgpack.encode(packed)


def decode_tokens(data: bytes) -> Tokens:
    """The column `tokens`."""
    return msgspec.msgpack.decode(data, type=Tokens)


def own_ids(tokens: Tokens) -> list[int]:
    """What this step adds to its base's ids: the tail of its prompt, and its response."""
    return unpack_ints(tokens.tail) + unpack_ints(tokens.response)


def join_step(tokens: Tokens, start: list[int]) -> Step:
    """The step again, from its column and the first ids of its prompt."""
    return msgspec.structs.replace(
        tokens.step,
        prompt_ids=start + unpack_ints(tokens.tail),
        response_ids=unpack_ints(tokens.response),
        response_logprobs=unpack_floats(tokens.logprobs),
    )


def encode_talk(kept: KeptStep, messages: Sequence[bytes], *, reply: bytes, part: Part) -> bytes:
    """The column `talk`; `messages` are the texts of those that its base lacks."""
    rest = {
        "text": kept.text,
        "kind": kept.kind,
        "app": kept.app,
        "started_ms": kept.started_ms,
        "first_token_ms": kept.first_token_ms,
        "finished_ms": kept.finished_ms,
    }
    packed = Talk(
        [(part(text), b"") if len(text) >= PART_BYTES else ("", text) for text in messages],
        reply,
        part(to_json(kept.tools)) if kept.tools else "",
        to_json(rest),
    )
    return msgspec.msgpack.encode(packed)


def decode_talk(data: bytes) -> Talk:
    """The column `talk`."""
    return msgspec.msgpack.decode(data, type=Talk)


def join_kept(talk: Talk, step: Step, *, messages: list[Any], tools: list[Any]) -> KeptStep:
    """The kept step again, from its column, its tokens, and all its messages and tools."""
    reply = from_json(talk.reply)
    return KeptStep(step=step, messages=messages, tools=tools, reply=reply, **from_json(talk.rest))

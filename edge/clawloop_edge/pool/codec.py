"""How one kept step lies in its two sealed columns: `tokens` (its numbers) and `talk` (its facts, and what was said).

Messages are kept as JSON texts that give back every value a JSON parser can make: numbers of any size, the order of
keys, lone surrogates. Long texts lie in parts, and are named by them. What a step's base has is not stored again.
Pure: seals nothing and knows no database.
"""

import json
from collections.abc import Callable
from typing import Any

import msgspec

from clawloop_edge.pool.chain import Copy, Tail
from clawloop_edge.pool.packing import pack_floats, unpack_floats, unpack_ints
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.records import Step


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """The column `tokens`: the prompt's ids that its base lacks, the response's ids and logprobs.

    `step` is None; in steps of the first layout it is what `Talk.step` is. `opening` are the parts that hold the first
    ids of a prompt without a base.
    """

    step: Step | None
    tail: bytes
    response: bytes
    logprobs: bytes
    copies: list[Copy] = []
    opening: list[str] = []


class Talk(msgspec.Struct, frozen=True, array_like=True):
    """The column `talk`. A message is the id of the part that holds it and no text, or no id and its JSON text.

    `step` is the step without its lists, its id and its session, which the row has.
    """

    messages: list[tuple[str, bytes]]
    reply: bytes
    tools: str
    rest: bytes
    copies: list[Copy] = []
    step: Step | None = None
    prompt_tokens: int = 0
    response_tokens: int = 0


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


def encode_tokens(step: Step, *, tail: bytes, response: bytes, copies: list[Copy], opening: list[str]) -> bytes:
    """The column `tokens`: `tail` and `response` are ids as `ids_to_seal` gives them."""
    try:
        logprobs = pack_floats(step.response_logprobs)  # type: ignore[arg-type]  # a kept step has every one
    except TypeError:
        logprobs = pack_floats(step.logprobs)
    return msgspec.msgpack.encode(Tokens(None, tail, response, logprobs, copies, opening))


def decode_tokens(data: bytes) -> Tokens:
    """The column `tokens`."""
    return msgspec.msgpack.decode(data, type=Tokens)


def join_step(tokens: Tokens, talk: Talk, *, ids: list[int], step_id: str, session_id: str) -> Step:
    """The step again, from its columns and the ids of its prompt and its response."""
    response = unpack_ints(tokens.response)
    return msgspec.structs.replace(
        facts_of(tokens, talk),
        step_id=step_id,
        session_id=session_id,
        prompt_ids=ids[: len(ids) - len(response)],
        response_ids=response,
        response_logprobs=unpack_floats(tokens.logprobs),
    )


def facts_of(tokens: Tokens, talk: Talk) -> Step:
    """The step without its lists."""
    facts = talk.step or tokens.step
    assert facts is not None  # it is in the one column or, in steps of the first layout, in the other
    return facts


def encode_talk(kept: KeptStep, tail: Tail[bytes], *, reply: bytes, tools: str, part: Callable[[bytes], str]) -> bytes:
    """The column `talk` of a step whose messages end in `tail`. `part` gives the part of a text; empty: it has none."""
    rest = {
        "text": kept.text,
        "kind": kept.kind,
        "app": kept.app,
        "started_ms": kept.started_ms,
        "first_token_ms": kept.first_token_ms,
        "finished_ms": kept.finished_ms,
        **({} if kept.trajectory_step is None else {"trajectory_step": kept.trajectory_step}),
    }
    step = kept.step
    bare = msgspec.structs.replace(
        step, step_id="", session_id="", prompt_ids=[], response_ids=[], response_logprobs=[]
    )
    packed = Talk(
        [(name, b"") if (name := part(text)) else ("", text) for text in tail.own],
        reply,
        tools,
        to_json(rest),
        tail.copies,
        bare,
        len(step.prompt_ids),
        len(step.response_ids),
    )
    return msgspec.msgpack.encode(packed)


def decode_talk(data: bytes) -> Talk:
    """The column `talk`."""
    return msgspec.msgpack.decode(data, type=Talk)


def join_kept(talk: Talk, step: Step, *, messages: list[Any], tools: list[Any]) -> KeptStep:
    """The kept step again, from its column, its tokens, and all its messages and tools."""
    reply = from_json(talk.reply)
    return KeptStep(step=step, messages=messages, tools=tools, reply=reply, **from_json(talk.rest))

"""Sampled turns are put back into the prompt by the ids that were sampled, not by encoding their text again. Pure.

A model that reads its own earlier tokens re-encoded may read other tokens than it wrote. Where the new prompt's text
starts with the parent's prompt and reply, the parent's ids stand. Where a message between them moved (OpenClaw's
ephemeral last one), the part before it stands, and the parent's reply is put in at its new place. Where the reply does
not stand either (its thoughts are left out of later turns), the part before the change does.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec


class Codec(Protocol):
    """The part of a tokenizer that splicing needs."""

    eos_ids: frozenset[int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class How(StrEnum):
    """How a prompt's ids came about."""

    FRESH = "fresh"
    """there was no parent to take ids from"""
    PREFIX = "prefix"
    """the parent's prompt and reply stand at its start"""
    MOVED = "moved"
    """a message moved; the parent's reply stands at its new place"""
    ENCODED = "encoded"
    """the history was rewritten: what is not as it was, was encoded again"""
    RAW = "raw"
    """the caller gave a prompt, not messages"""


class Sampled(msgspec.Struct, frozen=True):
    """What a parent step consumed and sampled. `text` is that of all `ids`; the reply starts at the two offsets."""

    text: str
    ids: Sequence[int]
    reply_char: int
    reply_id: int


class Spliced(msgspec.Struct, frozen=True):
    """A prompt's ids and how many of them were taken over."""

    ids: list[int]
    reused: int
    how: How


def splice(
    text: str, codec: Codec, *, parent: Sampled | None = None, reply_at: Callable[[], int | None] = lambda: None
) -> Spliced:
    """The ids of the rendered prompt `text`, with the parent's ids wherever its text stands.

    `reply_at` finds the character at which the parent's reply begins in `text`; asked only if the parent is no prefix.
    """
    if parent is None:
        return Spliced(codec.encode(text), 0, How.FRESH)
    if text.startswith(parent.text):
        return Spliced([*parent.ids, *codec.encode(text[len(parent.text) :])], len(parent.ids), How.PREFIX)
    place, reply = reply_at(), parent.text[parent.reply_char :]
    if place is None or not reply or not text.startswith(reply, place):
        kept_ids, kept_chars = _common(text, codec, parent)
        return Spliced([*kept_ids, *codec.encode(text[kept_chars:])], len(kept_ids), How.ENCODED)
    kept_ids, kept_chars = _common(text[:place], codec, parent)
    reply_ids = list(parent.ids[parent.reply_id :])
    between = codec.encode(text[kept_chars:place])
    ids = kept_ids + between + reply_ids + codec.encode(text[place + len(reply) :])
    return Spliced(ids, len(kept_ids) + len(reply_ids), How.MOVED)


def _common(text: str, codec: Codec, parent: Sampled) -> tuple[list[int], int]:
    """The parent's ids up to the last end of a message that both texts share, and the characters they stand for."""
    shared = common_length(text, parent.text)
    ends = [(text.rfind(mark, 0, shared), mark, eos) for eos in codec.eos_ids if (mark := codec.decode([eos]))]
    at, mark, eos = max(ends, default=(-1, "", -1))
    if at < 0:
        return [], 0
    cut = at + len(mark)
    positions = [i for i, token in enumerate(parent.ids) if token == eos]
    number = text.count(mark, 0, cut)
    if number > len(positions):
        return [], 0
    ids = list(parent.ids[: positions[number - 1] + 1])
    if codec.decode(ids) != text[:cut]:
        return [], 0
    return ids, cut


def common_length(one: str, other: str) -> int:
    """How many characters two texts share from their start."""
    limit = min(len(one), len(other))
    return bisect_right(range(limit + 1), 0, key=lambda n: int(one[:n] != other[:n])) - 1

"""An item's tokens as text for a person: what each step says anew, and where something was taken out. Pure: it is given
what decodes tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from clawloop_shared.records import Step

MARK = "▇"
Decode = Callable[[Sequence[int]], str]
KindOf = Callable[[Step, int, int], str]
"""what stood at `start` (with `length` tokens) of a step's prompt and response; empty if that is not known"""


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `redacted`: a mark in the place of what was taken out."""

    text: str
    redacted: bool = False


@dataclass(frozen=True)
class Told:
    """One step as it is told: `repeated` tokens of its prompt are those of the step before it, and left out."""

    step: Step
    repeated: int
    prompt: list[Piece]
    response: list[Piece]


def told(steps: Iterable[Step], decode: Decode, *, kind_of: KindOf) -> Iterator[Told]:
    """The steps of an item, each without what the one before it has said."""
    before: list[int] = []
    for step in steps:
        ids = step.token_ids
        repeated = min(_shared(before, ids), len(step.prompt_ids))

        def between(start: int, end: int, step: Step = step, ids: list[int] = ids) -> list[Piece]:
            return list(_pieces(step, ids, decode=decode, start=start, end=end, kind_of=kind_of))

        cut = len(step.prompt_ids)
        yield Told(step, repeated, between(repeated, cut), between(cut, len(ids)))
        before = ids


def _pieces(
    step: Step, ids: Sequence[int], *, decode: Decode, start: int, end: int, kind_of: KindOf
) -> Iterator[Piece]:
    at = start
    for run_start, length in step.redacted:
        first, last = max(run_start, start), min(run_start + length, end)
        if first >= last:
            continue
        if at < first:
            yield Piece(decode(ids[at:first]))
        kind = kind_of(step, run_start, length) or f"{length} tokens"
        yield Piece(f"{MARK}{MARK} {kind} {MARK}{MARK}", redacted=True)
        at = last
    if at < end:
        yield Piece(decode(ids[at:end]))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

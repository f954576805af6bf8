"""The pattern pack, compiled: every rule by its anchors, in automata that find all of them in one pass.

Only where an anchor stands (the prefix of a key, a key word, `@`, `://`, a form of digits) is a rule's expression
tried; the few shapes without an anchor are looked for by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from ahocorasick_rs import AhoCorasick, BytesAhoCorasick, Implementation

from clawloop_edge.privacy.redact import (
    assignments,
    credentials,
    masks,
    network,
    numbers,
    people,
    phones,
    places,
    providers,
    shapes,
)
from clawloop_edge.privacy.redact.rules import Anchored, Rule, Sweep
from clawloop_edge.privacy.redact.spans import Hit


class Patterns:
    """What secrets and personal data look like."""

    def __init__(self) -> None:
        issued = ((anchor, providers.rule(candidates)) for anchor, candidates in providers.prefixes().items())
        words = (shapes, credentials, people, phones, places)
        forms = (shapes, phones, places, network)
        self._words = _Words((*(row for room in words for row in room.ANCHORED), *numbers.words(), *issued))
        self._fine = _Forms((*(row for room in forms for row in room.FORMS), *numbers.forms()))
        self._coarse = _Forms(network.COARSE_FORMS)
        self._names = AhoCorasick(assignments.WORDS, implementation=Implementation.DFA)
        self._sweeps: tuple[Sweep, ...] = (*shapes.SWEEPS, *phones.SWEEPS, *network.SWEEPS)

    def hits(self, text: str, lower: str) -> Iterator[Hit]:
        """What is found in `text`; `lower` is the same text in small letters, character by character."""
        yield from self._words.find(text, lower)
        yield from self._fine.find(text, masks.fine(text))
        yield from self._coarse.find(text, masks.coarse(text))
        named = [(start, end) for _, start, end in self._names.find_matches_as_indexes(lower, overlapping=True)]
        yield from assignments.find(text, sorted(named))
        for sweep in self._sweeps:
            yield from sweep(text)


class _Rules:
    """Rules by their anchors."""

    def __init__(self, anchored: Anchored) -> None:
        rules: dict[str, list[Rule]] = {}
        for anchor, rule in anchored:
            rules.setdefault(anchor, []).append(rule)
        self.anchors = list(rules)
        self._rules = list(rules.values())

    def hits(self, text: str, places: Iterable[tuple[int, int, int]]) -> Iterator[Hit]:
        """What the rules find in `text` at places (number of the anchor, start, end)."""
        done: dict[Rule, int] = {}
        for number, start, end in places:
            for rule in self._rules[number]:
                if start >= done.get(rule, 0):  # else it lies within what the rule has found already
                    for hit in rule(text, start, end):
                        done[rule] = max(done.get(rule, 0), hit.end)
                        yield hit


class _Words(_Rules):
    """Rules whose anchors are words in small letters."""

    def __init__(self, anchored: Anchored) -> None:
        super().__init__(anchored)
        self._automaton = AhoCorasick(self.anchors, implementation=Implementation.DFA)

    def find(self, text: str, lower: str) -> Iterator[Hit]:
        return self.hits(text, self._automaton.find_matches_as_indexes(lower, overlapping=True))


class _Forms(_Rules):
    """Rules whose anchors are forms in one of the masks of masks.py."""

    def __init__(self, anchored: Anchored) -> None:
        super().__init__(anchored)
        patterns = [anchor.encode() for anchor in self.anchors]
        self._automaton = BytesAhoCorasick(patterns, implementation=Implementation.DFA)

    def find(self, text: str, mask: bytes) -> Iterator[Hit]:
        return self.hits(text, self._automaton.find_matches_as_indexes(mask, overlapping=True))


@cache
def patterns() -> Patterns:
    """The pack, compiled on first use."""
    return Patterns()

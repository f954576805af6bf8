"""How much the pack finds of what a generated corpus hides, with a fresh seed each time."""

import secrets
from collections.abc import Callable

import pytest

from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns
from clawloop_edge.privacy.redact.spans import Span

from .corpus import TUNED, Part, Rng, Score, documents
from .makers import MAKERS

Measure = Callable[[str, int], tuple[Score, Part]]


@pytest.fixture(scope="module")
def seed() -> int:
    """New in each run; a failure names it, and `Rng(seed)` makes the same documents again."""
    return secrets.randbelow(1_000_000)


@pytest.fixture(scope="module")
def measure(seed: int) -> Measure:
    detector = Detector(patterns())

    def measured(name: str, rounds: int) -> tuple[Score, Part]:
        part, score = Part.load(name), Score()
        for document in documents(part, Rng(seed), rounds=rounds, makers=MAKERS):
            score.add(document, detector.find(document.text))
        return score, part

    return measured


def test_most_of_what_the_pack_was_not_tuned_on_is_found_and_little_else(measure: Measure, seed: int) -> None:
    score, part = measure("held", 12)
    missed = "\n".join(score.missed[:40])
    assert score.recall(part.keys) >= 0.9, f"seed {seed}\n{missed}"
    assert score.recall(part.personal) >= 0.85, f"seed {seed}\n{missed}"
    assert score.precision >= 0.95, f"seed {seed}\n" + "\n".join(score.wrong[:40])


@pytest.mark.parametrize("name", TUNED)
def test_nearly_all_of_what_the_pack_was_tuned_on_is_found_and_nearly_nothing_else(
    measure: Measure, seed: int, name: str
) -> None:
    score, part = measure(name, 5)
    missed = "\n".join(score.missed[:40])
    assert score.recall(part.keys) >= 0.95, f"seed {seed}\n{missed}"
    assert score.recall(part.personal) >= 0.96, f"seed {seed}\n{missed}"
    assert score.precision >= 0.97, f"seed {seed}\n" + "\n".join(score.wrong[:40])


def test_the_corpus_has_forty_kinds_of_keys_and_twenty_of_personal_data_in_either_half() -> None:
    held = Part.load("held")
    tuned = [Part.load(name) for name in TUNED]
    assert len(held.keys) >= 40
    assert len(held.personal) >= 20
    assert sum(len(part.keys) for part in tuned) >= 150
    assert sum(len(part.personal) for part in tuned) >= 100


def test_no_line_of_the_held_out_half_stands_in_the_other() -> None:
    def lines(part: Part) -> set[str]:
        own = {line for kind in (*part.keys, *part.personal) for line in kind.lines}
        return own | {*part.key_lines, *part.personal_lines, *part.fillers}

    assert not lines(Part.load("held")) & set().union(*(lines(Part.load(name)) for name in TUNED))


def test_a_search_that_finds_nothing_or_everything_would_not_pass() -> None:
    score, whole = Score(), Score()
    part = Part.load("held")
    for document in documents(part, Rng(1), rounds=1, makers=MAKERS):
        score.add(document, [])
        whole.add(document, [Span(*line, "line") for line in lines_of(document.text)])
    assert score.recall(part.keys) == 0
    assert whole.recall(part.keys) > 0.9
    assert whole.precision < 0.5


def lines_of(text: str) -> list[tuple[int, int]]:
    found, at = [], 0
    for line in text.splitlines(keepends=True):
        found.append((at, at + len(line)))
        at += len(line)
    return found

"""The real search on tokens: what it finds in the text of ids is gone from the ids, and little else is."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns
from clawloop_edge.privacy.redact.tokens import PLACEHOLDER, TokenTable, redact_ids, turns
from clawloop_edge.privacy.redact.turns import TurnSearch
from clawloop_edge.privacy.redact.values import Value

DEMO_MODEL = Path(__file__).parents[3] / "scripts" / "demoworld" / "model"
TABLE = TokenTable.of(DEMO_MODEL)
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
SEQUENCES = 300
LETTERS = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
LINES = (
    "The tool wrote {} to the log.",
    "password: {}",
    '{{"api_key": "{}", "city": "Ōsaka 😀"}}',
    "export TOKEN={}\ncd /tmp && ls",
    "– {}, bitte nicht weitergeben –",
    "https://example.org/x?token={}&page=2",
    "nothing to see here, café",
    "def add(a, b):\n    return a + b",
)


def drawn(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(length))


def secret(rng: random.Random) -> str:
    return rng.choice(
        (
            f"ghp_{drawn(rng, 36)}",
            f"AKIA{drawn(rng, 16).upper()}",
            f"{drawn(rng, 8).lower()}@{drawn(rng, 6).lower()}.org",
            f"xoxb-{rng.randrange(10**11, 10**12)}-{rng.randrange(10**11, 10**12)}-{drawn(rng, 24)}",
            f"{drawn(rng, 14)}!7",
        )
    )


def ids_with_secrets(rng: random.Random) -> list[int]:
    """Several turns of lines; half of the time some of their tokens are cut into smaller ones."""
    ids: list[int] = []
    for _ in range(rng.randint(1, 3)):
        text = "\n".join(rng.choice(LINES).format(secret(rng)) for _ in range(rng.randint(1, 6)))
        turn: list[int] = TOKENIZER.encode(f"user\n{text}", add_special_tokens=False).ids
        if rng.random() < 0.5:
            turn = [small for number in turn for small in (cut(number) if rng.random() < 0.3 else [number])]
        ids += [1, *turn, 2]
    return ids


def cut(number: int) -> list[int]:
    """The same bytes, a byte a token."""
    return [TABLE.pieces.index(bytes([byte])) for byte in TABLE.pieces[number]]


def texts_of(ids: Sequence[int]) -> list[str]:
    return [TABLE.view(ids[start:end]).text for start, end in turns(ids, TABLE.special_ids)]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(patterns(), [Value("Projekt Nordlicht", "own-word")], words=["Rosebud"])


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_found_in_the_text_of_ids_is_gone_from_them(detector: Detector, strict: bool) -> None:
    rng = random.Random(11)
    found_at_all = 0
    for _ in range(SEQUENCES):
        ids = ids_with_secrets(rng)
        done = redact_ids(ids, TABLE, find=detector.find, strict=strict)
        assert len(done.ids) == len(ids)
        assert redact_ids(done.ids, TABLE, find=detector.find, strict=strict) == done
        for before, after in zip(texts_of(ids), texts_of(done.ids), strict=True):
            gone = [before[span.start : span.end] for span in detector.find(before)]
            found_at_all += len(gone)
            assert not any(value in after for value in gone)
            assert all(set(after[s.start : s.end]) <= {PLACEHOLDER} for s in detector.find(after))
    assert found_at_all > SEQUENCES


def test_what_has_no_secret_stays(detector: Detector) -> None:
    rng = random.Random(12)
    ids = ids_with_secrets(rng)
    done = redact_ids(ids, TABLE, find=detector.find, strict=False)
    must = sum(
        len(TOKENIZER.encode(before[span.start : span.end], add_special_tokens=False).ids) + 2
        for before in texts_of(ids)
        for span in detector.find(before)
    )
    assert 0 < sum(length for _, length in done.spans) <= 2 * must


def test_a_password_told_once_is_gone_from_the_whole_session(detector: Detector) -> None:
    rng = random.Random(13)
    search = TurnSearch(TABLE, detector)
    for number in range(50):
        word = f"{drawn(rng, 9)}#{rng.randrange(10, 99)}"
        told = TOKENIZER.encode(f"user\nmy password: {word}", add_special_tokens=False).ids
        again = TOKENIZER.encode(f"user\nthen I typed {word} and it worked", add_special_tokens=False).ids
        done = search.redact([1, *again, 2, 1, *told, 2], session_id=str(number))
        assert word not in "".join(texts_of(done.ids))
        later = search.redact([1, *again, 2], session_id=str(number))
        assert later.ids == done.ids[: len(later.ids)], "the same secret is the same run"
        assert "typed" in texts_of(later.ids)[0]

"""Steps of a session: each turn is searched once, and what one turn gives away is taken out of all."""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer

from clawloop_edge.privacy.redact.spans import Span
from clawloop_edge.privacy.redact.tokens import TokenTable
from clawloop_edge.privacy.redact.turns import MARK, TurnSearch
from clawloop_edge.privacy.redact.values import Value

DEMO_MODEL = Path(__file__).parents[3] / "scripts" / "demoworld" / "model"
TABLE = TokenTable.of(DEMO_MODEL)
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
KEY = re.compile(r"sk-\w+")
PASSWORD = re.compile(r"password: (\S+)")


class Found(NamedTuple):
    spans: Sequence[Span]
    told: Sequence[Value]


class StandIn:
    """Finds keys by their shape and passwords by the word before them, and counts what it was asked."""

    def __init__(self) -> None:
        self.searched: list[str] = []

    def search(self, text: str, also: Iterable[Value] = ()) -> Found:
        self.searched.append(text)
        told = [match for match in PASSWORD.finditer(text)]
        spans = [Span(*match.span(), "key") for match in KEY.finditer(text)]
        spans += [Span(*match.span(1), "password") for match in told]
        spans += [
            Span(*match.span(), value.kind) for value in also for match in re.finditer(re.escape(value.text), text)
        ]
        return Found(spans, [Value(match[1], "password") for match in told])


def ids_of(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


def chat(*turns: str) -> list[int]:
    return ids_of("".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns))


def text_of(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=False))


@pytest.fixture
def detector() -> StandIn:
    return StandIn()


@pytest.fixture
def search(detector: StandIn) -> TurnSearch:
    return TurnSearch(TABLE, detector, strict=False)


def test_a_secret_told_in_one_turn_is_taken_out_of_all(search: TurnSearch) -> None:
    ids = chat(
        "user\nI am rosebud42", "assistant\nhello", "user\nmy password: rosebud42 is new", "assistant\nrosebud42!"
    )
    done = search.redact(ids)
    assert len(done.ids) == len(ids)
    assert len(done.spans) == 3
    assert "rosebud42" not in text_of(done.ids)
    assert search.redact(done.ids) == done


def test_the_same_secret_gets_the_same_run_in_every_step_of_its_session(search: TurnSearch) -> None:
    first = search.redact(chat("user\nthe password: rosebud42 it is"), session_id="s")
    ((_, length),) = first.spans
    second = search.redact(chat("user\nthe key rosebud42 it is"), session_id="s")
    assert [size for _, size in second.spans] == [length]
    assert search.redact(chat("user\nthe key rosebud42 it is"), session_id="other").spans == []


def test_what_a_later_step_gives_away_is_known_before_if_it_was_learned(search: TurnSearch) -> None:
    earlier, later = chat("user\nI am rosebud42"), chat("user\nI am rosebud42", "user\npassword: rosebud42")
    assert search.redact(earlier, session_id="s").spans == []
    search.learn(later, session_id="s")
    assert "rosebud42" not in text_of(search.redact(earlier, session_id="s").ids)


def test_a_session_costs_what_is_new_in_it(search: TurnSearch, detector: StandIn) -> None:
    turns = [f"user\nmessage number {number} of a long talk" for number in range(30)]
    for number in range(1, 31):
        search.redact(chat(*turns[:number]), session_id="s")
    assert len(detector.searched) == 30 + 1, "each turn once, and the line between two turns"
    search.redact(chat(*turns, "user\nmy sk-abcdef"), session_id="s")
    assert len(detector.searched) == 31 + 2, "what was found is searched again, until nothing more is"


def test_a_response_that_becomes_history_is_not_searched_again(search: TurnSearch, detector: StandIn) -> None:
    prompt, response = ids_of("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), ids_of("good day<|im_end|>")
    search.redact(prompt + response)
    before = len(detector.searched)
    search.redact(prompt + response + ids_of("\n<|im_start|>user\nthanks<|im_end|>"))
    assert detector.searched[before:] == ["user\nthanks"]


def test_values_from_outside_are_taken_out_too(search: TurnSearch) -> None:
    ids = chat("user\nAsk Doktor Grün about it", "assistant\nDoktor Grün says no")
    done = search.redact(ids, also=[Value("Doktor Grün", "second-opinion", whole=False)])
    assert len(done.spans) == 2
    assert "Grün" not in text_of(done.ids)
    assert search.redact(ids).spans == []


def test_memory_is_bounded(detector: StandIn) -> None:
    search = TurnSearch(TABLE, detector, max_bytes=2_000)
    for number in range(50):
        search.redact(chat(f"user\nnumber {number}"))
    assert len(search._turns) <= 2_000 // 300
    assert search._room >= 0
    for number in range(300):
        search.learn(chat(f"user\npassword: rosebud{number}"), session_id=f"s{number}")
    assert len(search._told) == 256
    for number in range(1_010):
        search.learn(chat(f"user\npassword: rosebud{number}"), session_id="s")
    assert len(search._told["s"]) == 1_000


def test_texts_are_redacted_by_the_same_search(search: TurnSearch) -> None:
    assert search.text("fine, but sk-12ab was wrong") == f"fine, but {MARK} was wrong"
    assert search.text("") == ""
    search.redact(chat("user\npassword: rosebud42"), session_id="s")
    assert search.text("rosebud42 leaked, sk-aasdf too", session_id="s") == f"{MARK} leaked, {MARK} too"
    assert search.text("rosebud42 leaked") == "rosebud42 leaked"


def test_texts_of_turns_come_in_order(search: TurnSearch) -> None:
    assert search.texts(chat("user\none", "assistant\ntwo")) == ["user\none", "\n", "assistant\ntwo", "\n"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_thousand_steps_of_many_turns_come_to_rest(strict: bool) -> None:
    rng = random.Random(4)
    search = TurnSearch(TABLE, StandIn(), strict=strict)
    for number in range(500):
        secret = f"Geheim{rng.randrange(10**6)}é"
        turns = [f"user\n{rng.choice(('see', '', '😀'))}{secret}{rng.choice((' ok', '', '。'))}" for _ in range(3)]
        turns.insert(rng.randrange(4), f"user\npassword: {secret}")
        ids: list[int] = chat(*turns)
        done = search.redact(ids, session_id=str(number))
        assert len(done.ids) == len(ids)
        assert secret not in text_of(done.ids)
        fresh = TurnSearch(TABLE, StandIn(), strict=strict)
        assert search.redact(done.ids, session_id=str(number)) == done == fresh.redact(done.ids)

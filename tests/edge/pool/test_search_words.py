"""Words, queries and snippets: what counts as a word in code and in scripts without spaces, and where marks stand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_edge.errors import QueryError
from clawloop_edge.pool.words import (
    MAX_QUERY_WORDS,
    SNIPPET_CHARS,
    WORD_CHARS,
    as_fts,
    indexed,
    matches,
    parse_query,
    snippet,
    words,
)


def terms(text: str) -> list[str]:
    return [word.term for word in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Docker-Compose, v1.2!", ["docker", "compose", "v1", "2"]),
        ("load_config(self.path)", ["load", "config", "self", "path"]),
        ("Straße CAFÉ cafe\u0301 naïve", ["strasse", "cafe", "cafe", "naive"]),
        ("Запуск тестов", ["запуск", "тестов"]),
        ("日本語を読む", ["日", "本", "語", "を", "読", "む"]),
        ("한국어를", ["한", "국", "어", "를"]),
        ("hello世界x", ["hello", "世", "界", "x"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ＡＢＣ", ["abc"]),
        ("🙂 --- …", []),
    ],
)
def test_words_are_runs_of_letters_and_digits_or_single_signs(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


def test_a_word_stands_where_it_was_written() -> None:
    text = "Ein CAFÉ, 東京!"
    assert [text[word.start : word.end] for word in words(text)] == ["Ein", "CAFÉ", "東", "京"]


def test_parts_of_camel_case_are_indexed_beside_the_whole_word() -> None:
    assert indexed("getUserName HTTPServer").split() == [
        *("getusername", "httpserver"),
        *("get", "user", "name", "http", "server"),
    ]
    assert indexed("README Hello lower").split() == ["readme", "hello", "lower"]


@pytest.mark.parametrize("text", ["aB" * 40_000, "A" * 80_000, "a" * 80_000, "Ab1" * 30_000 + "é", "é" * 80_000])
def test_an_encoded_file_costs_no_more_than_its_length_and_is_one_word(text: str) -> None:
    started = time.process_time()
    assert [len(term) for term in indexed(text).split()] == [WORD_CHARS]
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("docker compose", '"docker" AND "compose"'),
        ('"docker compose"', '"docker compose"'),
        ("foo_bar.baz", '"foo bar baz"'),
        ("pre*", '"pre" *'),
        ('docker -"of compose" -x', '("docker") NOT ("of compose" OR "x")'),
        ("東京", '"東 京"'),
        ('an "open phrase', '"an" AND "open phrase"'),
        ("AND OR NEAR( a:b ^c +d", '"and" AND "or" AND "near" AND "a b" AND "c" AND "d"'),
    ],
)
def test_what_people_type_is_asked_word_for_word(typed: str, asked: str) -> None:
    assert as_fts(parse_query(typed)) == asked


@pytest.mark.parametrize("typed", ["", "   ", "!?", "-not", '""', "*", "a*", "word " * (MAX_QUERY_WORDS + 1)])
def test_what_cannot_be_looked_for_is_refused(typed: str) -> None:
    with pytest.raises(QueryError):
        parse_query(typed)


@given(st.text(max_size=80))
def test_no_text_is_a_syntax_error(typed: str) -> None:
    try:
        asked = as_fts(parse_query(typed))
    except QueryError:
        return
    assert asked.count('"') % 2 == 0


def marked(text: str, typed: str) -> tuple[str, list[str]]:
    piece = snippet(text, parse_query(typed))
    return piece.text, [piece.text[start:end] for start, end in piece.marks]


def test_a_snippet_shows_the_words_where_they_stand() -> None:
    text = "first line\n" + "before " * 30 + "then getUserName and user_name here, café, 東京都 " + "after " * 60
    for typed, shown in (
        ("name", ["getUserName", "name"]),
        ("user_name", ["user_name"]),
        ("CAFE", ["café"]),
        ("京都", ["京都"]),
        ('"then get*"', ["then getUserName"]),
    ):
        line, marks = marked(text, typed)
        assert marks == shown
        assert line.startswith("…")
        assert line.endswith("…")
        assert len(line) <= SNIPPET_CHARS + 2


def test_a_snippet_is_one_line_and_begins_at_a_line() -> None:
    assert marked("one\ntwo\tthree", "three") == ("…two three", ["three"])
    assert marked("nothing of it", "else") == ("nothing of it", [])


@settings(max_examples=300)
@given(st.text(st.sampled_from("aB1_ é日本ко\n-"), max_size=40), st.text(st.sampled_from('aB1é日本ко* -"'), max_size=8))
def test_every_mark_is_a_match_of_what_was_asked(text: str, typed: str) -> None:
    try:
        query = parse_query(typed)
    except QueryError:
        return
    piece = snippet(text, query)
    for start, end in piece.marks:
        assert any(matches(piece.text[start:end], parse_query(one)) for one in _alone(typed))


def _alone(typed: str) -> list[str]:
    """Each wanted phrase of a query by itself."""
    query = parse_query(typed)
    return [f'"{" ".join(phrase.terms)}{"*" if phrase.prefix else ""}"' for phrase in query.wanted]

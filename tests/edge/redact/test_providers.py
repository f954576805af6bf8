"""The tables of facts: each row of them is used, has a source, and finds what it says."""

import tomllib
from importlib import resources

import pytest

from clawloop_edge.privacy.redact import kinds, numbers, providers, validators
from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns

from .corpus import Rng

FACTS = tomllib.loads(resources.files("clawloop_edge.privacy.redact").joinpath("providers.toml").read_text())
ROWS = [(name, *key) for name, facts in FACTS.items() for key in facts["keys"]]
MEMBERS = {"hex-dash": "0123456789abcdef", "uuid": "", "percent": "alnum", "word": "alnum", "sentry": "alnum"}


def drawn(rng: Rng, alphabet: str, length: int) -> str:
    if alphabet == "uuid":
        return "-".join(rng.of("hex", size) for size in (8, 4, 4, 4, 12))
    letters = MEMBERS.get(alphabet, alphabet.rstrip("=").removesuffix("-dash"))
    return rng.of("alnum" if letters in ("airtable", "dotted") else letters, length)


@pytest.mark.parametrize(("name", "prefix", "alphabet", "length"), ROWS)
def test_a_key_of_each_row_is_found_beside_other_text(name: str, prefix: str, alphabet: str, length: int) -> None:
    rng = Rng(f"{name}{prefix}")
    detector = Detector(patterns())
    keys = [prefix + drawn(rng, alphabet, length) for _ in range(10)]
    assert sum(is_found(detector, key) for key in keys) >= 9


def is_found(detector: Detector, key: str) -> bool:
    spans = detector.find(f"x {key} y")
    return bool(spans) and spans[0].start == 2 and spans[-1].end >= len(key)


def test_every_provider_names_where_its_facts_come_from() -> None:
    assert all(facts["source"] and facts["keys"] for facts in FACTS.values())
    assert len(FACTS) >= 100


def test_a_prefix_followed_by_words_is_no_key() -> None:
    detector = Detector(patterns())
    texts = (
        "sk-your-api-key-goes-here-please",
        "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "AKIAIOSFODNN7EXAMPLE",
        "pat.match_some_long_identifier_of_a_program",
        "test_the_worker_keeps_what_it_has_been_told",
        "npm_config_registry_url",
    )
    for text in texts:
        assert detector.find(text) == [], text


def test_every_number_has_a_check_that_exists_and_a_kind_that_is_listed() -> None:
    table = tomllib.loads(resources.files("clawloop_edge.privacy.redact").joinpath("numbers.toml").read_text())
    rows = [*table["by_form"], *table["by_word"]]
    assert all(callable(getattr(validators, row["check"])) for row in rows if "check" in row)
    assert {row["kind"] for row in rows} <= kinds.PERSONAL.keys()
    assert len(numbers.forms()) + len(numbers.words()) == sum(len(row.get("forms", row.get("words"))) for row in rows)


def test_every_kind_that_can_be_found_is_listed() -> None:
    listed = {*kinds.SECRETS, *kinds.PERSONAL, *kinds.key_kinds()}
    assert {prefix.kind for candidates in providers.prefixes().values() for prefix in candidates} <= listed
    assert all(kinds.is_secret(kind) != (kind in kinds.PERSONAL) for kind in listed)

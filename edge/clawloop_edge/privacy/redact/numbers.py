"""Numbers that name a person or an account: cards, IBANs, national identity numbers, as numbers.toml lists them.

A number counts by itself where its check (validators.py) is strong or its shape rare; else only behind a word that
says what it is.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from clawloop_edge.privacy.redact import validators
from clawloop_edge.privacy.redact.rules import Anchored, Rule
from clawloop_edge.privacy.redact.spans import Hit

_SEPARATORS = str.maketrans("", "", " -./\u00a0")
_JOINED = (
    r"\\*[\"']?\]?[*_]{0,2}(?:[ \t]?(?:no\.?|nr\.?|number|num|code|id|\#|\([^()\n]{0,24}\)))?"
    r"(?:[ \t](?:is|was|ist|es|est|for|of|on|the|his|her|my|file)){0,3}"
    r"(?:[ \t]{0,3}(?:[:=.#>,;|-]|=>|\) VALUES \(|</\w{1,20}>)){0,2}[ \t]{0,4}\\*[\"'`*]{0,3}"
)
_NAME_END = r"s?[ _-]?(?:card|number|no|nr|num|id|code)?"


def forms() -> Anchored:
    """The rules for numbers by their form, with the forms as anchors."""
    return tuple((form, _by_form(row)) for row in _rows("by_form") for form in row["forms"])


def words() -> Anchored:
    """The rules for numbers behind words, with the words as anchors."""
    return tuple((word, _by_word(row)) for row in _rows("by_word") for word in row["words"])


@cache
def _table() -> Mapping[str, list[Mapping[str, Any]]]:
    return tomllib.loads(resources.files(__package__).joinpath("numbers.toml").read_text(encoding="utf-8"))


def _rows(name: str) -> Iterator[Mapping[str, Any]]:
    yield from _table()[name]


def _check(row: Mapping[str, Any]) -> Callable[[str], bool]:
    if "check" not in row:
        return lambda _: True
    found: Callable[[str], bool] = getattr(validators, row["check"])
    return found


def _by_form(row: Mapping[str, Any]) -> Rule:
    pattern = re.compile(rf"(?<![\w.\-/+])(?:{row['shape']})(?!\w|[.\-/]\d)")
    kind, holds = row["kind"], _check(row)

    def rule(text: str, start: int, end: int) -> Iterable[Hit]:
        found = pattern.match(text, start)
        return (Hit(*found.span(), kind),) if found and holds(found[0].translate(_SEPARATORS)) else ()

    return rule


def _by_word(row: Mapping[str, Any]) -> Rule:
    pattern = re.compile(rf"(?i:{_NAME_END}{_JOINED})(?P<value>{row['shape']})(?!\w)")
    kind, holds = row["kind"], _check(row)

    def rule(text: str, start: int, end: int) -> Iterable[Hit]:
        if text[max(0, start - 1) : start].isalpha() and text[start : start + 1].islower():
            return ()
        found = pattern.match(text, end)
        return (Hit(*found.span("value"), kind),) if found and holds(found["value"].translate(_SEPARATORS)) else ()

    return rule

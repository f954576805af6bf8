"""Word lists of vocabulary.toml, read once."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources


def words(name: str) -> frozenset[str]:
    """The list of that name."""
    return _lists()[name]


@cache
def _lists() -> Mapping[str, frozenset[str]]:
    table = tomllib.loads(resources.files(__package__).joinpath("vocabulary.toml").read_text(encoding="utf-8"))
    return {name: frozenset(value.split()) for name, value in table.items()}

"""The owner's own words: those of `[privacy] redact_words`, and those of a file in the edge's home, one a line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clawloop_shared.errors import ConfigError

FILE = "redact-words.txt"
LENGTH = range(3, 201)
"""A word of two letters would stand in every text."""


def own_words(configured: Iterable[str], file: Path) -> list[str]:
    """All words, without empty lines and lines that begin with `#`.

    Raises:
        ConfigError: a word is shorter or longer than `LENGTH`, or the file is not UTF-8.
    """
    found = [*configured, *_lines(file)]
    for number, word in enumerate(found, 1):
        if len(word) not in LENGTH:
            raise ConfigError(
                f"word {number} of redact_words and {file.name} has {len(word)} characters; "
                f"give it {LENGTH.start} to {LENGTH.stop - 1}"
            )
    return found


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

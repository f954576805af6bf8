"""Keys that services issue, by their prefixes: what providers.toml knows, compiled. One anchored match a prefix."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple

from clawloop_edge.privacy.redact.plausible import is_made_of_words, is_placeholder, is_random
from clawloop_edge.privacy.redact.rules import Rule
from clawloop_edge.privacy.redact.spans import Hit

_MAX_KEY = 2048
_HEX = "[0-9a-fA-F]"
_UUID = f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}"
ALPHABETS = {
    "alnum": "[A-Za-z0-9]",
    "alnum=": "[A-Za-z0-9=]",
    "alnum-dash": "[A-Za-z0-9-]",
    "airtable": "[A-Za-z0-9.]",
    "base64": "[A-Za-z0-9+/=_-]",
    "dotted": "[A-Za-z0-9_.=-]",
    "hex": _HEX,
    "hex-dash": "[0-9a-fA-F-]",
    "lower": "[a-z0-9]",
    "percent": "[A-Za-z0-9%+/=_-]",
    "sentry": "[A-Za-z0-9+/=_]",
    "upper": "[A-Z0-9]",
    "upper-dash": "[A-Z0-9-]",
    "url": "[A-Za-z0-9_-]",
    "url=": "[A-Za-z0-9_=-]",
    "word": "[A-Za-z0-9_]",
}
_PRECEDING = re.compile(r"(?:^|[^A-Za-z0-9]|\\[nrtbf]|%[0-9A-Fa-f]{2}|\\u[0-9a-fA-F]{4})\Z")


class Prefix(NamedTuple):
    """How one sort of key begins, and what follows."""

    kind: str
    prefix: str
    rest: re.Pattern[str]


@cache
def prefixes() -> Mapping[str, Sequence[Prefix]]:
    """All prefixes, by their small letters; of those that share them, the longest rest first."""
    table = tomllib.loads(resources.files(__package__).joinpath("providers.toml").read_text())
    found: dict[str, list[Prefix]] = {}
    for provider, facts in table.items():
        for prefix, alphabet, length in facts["keys"]:
            rest = _UUID if alphabet == "uuid" else f"{ALPHABETS[alphabet]}{{{_least(prefix, length)},{_MAX_KEY}}}"
            found.setdefault(prefix.lower(), []).append(Prefix(f"{provider}-key", prefix, re.compile(rest)))
    return found


def _least(prefix: str, length: int) -> int:
    """How short a key may be and still count: services change lengths, texts cut keys; a telling prefix allows more."""
    telling = len(prefix) >= 4 and not prefix.isalnum()
    return min(length, max(16, length // 3)) if telling else max(1, length * 9 // 10)


def rule(candidates: Sequence[Prefix]) -> Rule:
    """The rule for the keys that share a prefix in small letters."""

    def find(text: str, start: int, end: int) -> Iterable[Hit]:
        if not _PRECEDING.search(text, max(0, start - 6), start):
            return ()
        for kind, prefix, shape in candidates:
            rest = shape.match(text, end) if text.startswith(prefix, start) else None
            if rest is not None and is_issued(rest[0]):
                return (Hit(start, end + len(rest[0].rstrip(".-/")), kind),)
        return ()

    return find


def is_issued(rest: str) -> bool:
    """Whether the part behind a prefix looks drawn at random: enough different characters, and no words."""
    if len(set(rest[:64])) < min(8, len(rest) // 2) or is_placeholder(rest):
        return False
    if is_random(rest) or not is_made_of_words(rest):
        return True
    drawn = any(c.isdigit() for c in rest) or not (rest.islower() or rest.isupper())
    return drawn and "_" not in rest and "-" not in rest

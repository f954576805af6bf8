"""Secrets that a sentence gives away: "the wifi password is sunshine99", "use 3fa9… as the token". Bounded windows."""

from __future__ import annotations

import re

from clawloop_edge.privacy.redact.names import Promise
from clawloop_edge.privacy.redact.plausible import (
    has_uuid,
    is_call_id,
    is_named_id,
    is_password,
    is_placeholder,
    is_random,
)

_REACH = 90
_AROUND = "\"'`.,;:!?()[]{}<>*|“”‘’«»"
_RUN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=_-"
_WORD = re.compile(r"\S{1,1024}")
_JOINED = re.compile(
    r"(?:[ \t]{1,2}\([^()\n]{0,40}\))?(?:'s)?"
    r"(?:[ \t]{1,2}(?:for|of|to|on|at|in|from|für|pour|para|de|di|voor)(?:[ \t][\w.@'-]{1,40}){1,4}?)?"
    r"(?:[ \t]{1,2}(?:is|was|are|ist|lautet|war|es|est|era|é|è|är|as|to|will be|should be|has been set to|set to|reads"
    r"|changed, it's|→|–|—)|(?:[ \t]{1,2}[^\W\d_]{2,12})?[ \t]{0,2}:)"
    r"(?:[ \t](?:now|just|still|set to|changed to|currently))?[ \t:]{1,4}\\*[\"'`*“‘«]{0,3}"
)
_BRACKETED = re.compile(r"[ \t]{1,2}[(\[]|[?!.]{1,3}[ \t]")
_FILE = re.compile(r"\.[A-Za-z]{2,4}\Z")
_NEGATIVE = re.compile(
    r"\b(?:commit|sha\d*|hash|digest|checksum|md5|etag|uuid|guid|rev|revision|integrity|fingerprint|thumbprint|version"
    r"|build|branch|tag|image|layer|object|blob|tree|trace|span|request|ids?|public|pub|cache|hit|miss|lookup|index)\b",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[ \t]{0,8}(?:(?:[$%]|>>>)[ ]|echo |cat |print\(|console\.log\()")
_NOT_BARE = re.compile(r"[<>{}\"'();,=&|\\`]|://")
_LEAST = {Promise.PASSWORD: 12, Promise.SECRET: 20, Promise.KEY: 28}
_LONG = {promised: re.compile(rf"\S{{{least}}}") for promised, least in _LEAST.items()}


def told(text: str, at: int, *, promised: Promise) -> tuple[int, int] | None:
    """The value in "<name> for the office is <value>", where the name ends at `at`."""
    joined = _JOINED.match(text, at, at + _REACH) or _BRACKETED.match(text, at)
    found = _WORD.match(text, joined.end()) if joined else None
    if found is None:
        return None
    value = found[0].rstrip(".,;:!?\"'`*)]}”’»\\")
    if promised is Promise.PASSWORD:
        kept = is_password(value)
    else:
        kept = is_random(value) and not (promised is Promise.KEY and has_uuid(value))
        kept = kept and not is_placeholder(value) and not is_call_id(value)
    return (found.start(), found.start() + len(value)) if kept and len(value) >= 5 else None


def near(text: str, start: int, end: int, *, promised: Promise) -> tuple[int, int] | None:
    """A random value in the rest of the line behind a name at `start` to `end`, or before it."""
    if text[start:end].lower().endswith("s") or text[max(0, start - 1) : start] in ("/", "+"):
        return None  # "finished in 80 tokens"; letters within base64
    behind = text.find("\n", end, end + _REACH)
    behind = behind if behind >= 0 else min(len(text), end + _REACH)
    before = text.rfind("\n", max(0, start - _REACH), start) + 1 or max(0, start - _REACH)
    if promised is Promise.KEY and _NEGATIVE.search(text, before, start):
        return None  # "cache hit for key …"
    hit = _random_word(text, _word_end(text, end), behind, promised=promised)
    hit = hit or _random_word(text, _word_start(text, before), start, promised=promised)
    asked = hit is None and promised is not Promise.KEY and _ASKED.match(text, before)
    return _in_next_line(text, behind) if asked else hit


def _in_next_line(text: str, line_end: int) -> tuple[int, int] | None:
    """A random value alone in the line behind `line_end`: what a shell printed when it was asked for it."""
    next_end = text.find("\n", line_end + 1, line_end + 1_100)
    next_end = next_end if next_end >= 0 else len(text)
    if text[line_end : line_end + 1] != "\n" or next_end - line_end > 1_024:
        return None
    if len(text[line_end:next_end].split()) > 2:
        return None
    return _random_word(text, line_end + 1, next_end, promised=Promise.SECRET)


def _random_word(text: str, start: int, end: int, *, promised: Promise) -> tuple[int, int] | None:
    """The first random word that begins at `start` or later, and before `end`."""
    if _LONG[promised].search(text, start, end + _LEAST[promised]) is None:
        return None
    for found in _WORD.finditer(text, start):
        if found.start() >= end:
            return None
        value = found[0].strip(_AROUND)
        if len(value) >= _LEAST[promised] and _is_bare_secret(value):
            around = text[start : found.start()] + text[found.end() : end]
            at = found.start() + found[0].find(value)
            return None if _NEGATIVE.search(around) else (at, at + len(value))
    return None


def _word_end(text: str, at: int) -> int:
    """Behind the word that `at` stands in, if it stands in one: a name within base64 is none."""
    window = text[at : at + 1_024]
    return at + len(window) - len(window.lstrip(_RUN))


def _word_start(text: str, at: int) -> int:
    """Where the word begins that `at` stands in, if that is not far."""
    window = text[max(0, at - 1_024) : at]
    return at - len(window) + max(window.rfind(" "), window.rfind("\n"), window.rfind("\t")) + 1 if window else at


def _is_bare_secret(value: str) -> bool:
    if _NOT_BARE.search(value[:-2]) or value.count("/") > 3 + len(value) // 16:
        return False
    if is_named_id(value) or has_uuid(value) or _FILE.search(value) or _NEGATIVE.search(value):
        return False
    return is_random(value) and not is_placeholder(value)

"""Other readings of a text: what its JSON escapes, its %-codes, and its base64 and hex runs stand for, and what is left
without the characters that nobody sees.

A view is searched like a text; what is found there is put back on the characters that it was read from: the escape or
the %-code exactly, of base64 and hex the whole run.
"""

from __future__ import annotations

import base64
import binascii
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from clawloop_edge.privacy.redact import masks

_MAX_DECODED = 1 << 20
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([\"'\\/bfnrt]))")
_PLAIN_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_RUN_EDGE = re.compile(r"[\s\"'<>`]")
_RUN_BEFORE, _RUN_LENGTH = 400, 4_096
_PERCENT = re.compile(r"(?:%[89A-Fa-f][0-9A-Fa-f])+|%[0-7][0-9A-Fa-f]")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{12,}(?:(?:\r?\n|\\n)[A-Za-z0-9+/_-]{4,})*={0,2}")
_LONG_RUN = b"a" * 12
# Six bytes under 0x80 leave their top bits 0: so every first and second of four characters is one of half the alphabet.
_BEGINS_AS_TEXT = re.compile(r"(?:[A-Za-f][A-HQ-Xg-nw-z0-3][A-Za-z0-9+/_-]{2}){2}[A-Za-z0-9+/_-]{3}")
_WIDTHS = frozenset((60, 64, 70, 72, 76, 80))
_BREAK = re.compile(r"\r?\n|\\n")
_HEX = re.compile(r"(?:[0-9a-f]{2}){12,}|(?:[0-9A-F]{2}){12,}")
_UNSEEN = re.compile(
    r"[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e007f]+"
)
_ALPHABET = str.maketrans("-_", "+/", "=")
_PROBE = 32


class Segment(NamedTuple):
    """A stretch of a view that begins at `at`, and what it was read from; `straight` if character by character."""

    at: int
    start: int
    end: int
    straight: bool


class View:
    """A reading of a text, with the way back."""

    def __init__(self, text: str, segments: list[Segment]) -> None:
        self.text = text
        self._segments = segments
        self._starts = [segment.at for segment in segments]

    def back(self, start: int, end: int) -> tuple[int, int]:
        """The characters that `start` to `end` of the view were read from."""
        first, last = self._segment(start), self._segment(end - 1)
        begin = first.start + (start - first.at if first.straight else 0)
        stop = last.start + (end - last.at) if last.straight else last.end
        return begin, stop

    def _segment(self, at: int) -> Segment:
        return self._segments[bisect_right(self._starts, at) - 1]


class _Builder:
    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._segments: list[Segment] = []
        self._length = 0

    def add(self, piece: str, start: int, end: int, *, straight: bool) -> None:
        if piece:
            self._segments.append(Segment(self._length, start, end, straight))
            self._pieces.append(piece)
            self._length += len(piece)

    def view(self) -> View | None:
        return View("".join(self._pieces), self._segments) if self._pieces else None


def views(text: str) -> Iterator[View]:
    """All readings of a text that differ from it."""
    for view in (_unescaped(text), _unquoted(text), _decoded(text), _seen(text)):
        if view is not None:
            yield view


def _unescaped(text: str) -> View | None:
    """The lines that have backslashes, with their JSON escapes (and `\\x41`) read."""
    if "\\" not in text:
        return None
    builder = _Builder()
    for start, end in _lines_with(text, "\\"):
        at = start
        for escape in _ESCAPE.finditer(text, start, end):
            builder.add(text[at : escape.start()], at, escape.start(), straight=True)
            builder.add(_character(escape), *escape.span(), straight=False)
            at = escape.end()
        builder.add(text[at:end], at, end, straight=True)
        builder.add("\n", end, end, straight=False)
    return builder.view()


def _lines_with(text: str, mark: str) -> Iterator[tuple[int, int]]:
    at = text.find(mark)
    while at >= 0:
        start = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at)
        end = end if end >= 0 else len(text)
        yield start, end
        at = text.find(mark, end)


def _character(escape: re.Match[str]) -> str:
    long, short, plain = escape.groups()
    return chr(int(long or short, 16)) if plain is None else _PLAIN_ESCAPES.get(plain, plain)


def _seen(text: str) -> View | None:
    """The lines that have characters that nobody sees, without these: a secret with one inside is one all the same."""
    if text.isascii() or _UNSEEN.search(text) is None:
        return None
    builder, end = _Builder(), 0
    while (mark := _UNSEEN.search(text, end)) is not None:
        at = text.rfind("\n", end, mark.start()) + 1 or end
        end = text.find("\n", mark.end())
        end = end if end >= 0 else len(text)
        for unseen in _UNSEEN.finditer(text, at, end):
            builder.add(text[at : unseen.start()], at, unseen.start(), straight=True)
            at = unseen.end()
        builder.add(text[at:end], at, end, straight=True)
        builder.add("\n", end, end, straight=False)
    return builder.view()


def _unquoted(text: str) -> View | None:
    """The runs (up to a space or a quote) that have %-codes, with the codes read."""
    if "%" not in text:
        return None
    builder = _Builder()
    for start, end in _coded_runs(text):
        at = start
        for code in _PERCENT.finditer(text, start, end):
            builder.add(text[at : code.start()], at, code.start(), straight=True)
            character = bytes.fromhex(code[0].replace("%", "")).decode("utf-8", "replace")
            builder.add(character, *code.span(), straight=False)
            at = code.end()
        builder.add(text[at:end], at, end, straight=True)
        builder.add("\n", end, end, straight=False)
    return builder.view()


def _coded_runs(text: str) -> Iterator[tuple[int, int]]:
    end = 0
    while (code := _PERCENT.search(text, end)) is not None:
        start = max(end, code.start() - _RUN_BEFORE)
        for edge in _RUN_EDGE.finditer(text, start, code.start()):
            start = edge.end()
        stop = _RUN_EDGE.search(text, code.end(), code.end() + _RUN_LENGTH)
        end = stop.start() if stop else min(len(text), code.end() + _RUN_LENGTH)
        yield start, end


def _decoded(text: str) -> View | None:
    """What runs of base64 and hex hold, where that is text; in one view, apart from each other."""
    builder = _Builder()
    for start, end, plain in _plain_runs(text):
        builder.add(plain + "\n\n\n", start, end, straight=False)
    return builder.view()


def _plain_runs(text: str) -> Iterator[tuple[int, int, str]]:
    mask = masks.runs(text)
    at = mask.find(_LONG_RUN)
    while at >= 0:
        found = _BASE64.match(text, at)
        if found is None:  # a character of another script
            at = mask.find(_LONG_RUN, at + 1)
            continue
        yield from _read(found)
        at = mask.find(_LONG_RUN, found.end())


def _from_hex(run: str) -> str | None:
    return _as_text(bytes.fromhex(run[:_MAX_DECODED])) if _HEX.fullmatch(run) else None


def _read(found: re.Match[str]) -> Iterator[tuple[int, int, str]]:
    """What a run holds: its lines together if they are as wide as programs wrap base64, else each by itself."""
    lines = _BREAK.split(found[0])
    if len(lines) == 1 or (len(lines[0]) in _WIDTHS and all(len(line) == len(lines[0]) for line in lines[:-1])):
        whole = "".join(lines)
        if (plain := _from_hex(whole) or _from_base64(whole)) is not None:
            yield found.start(), found.end(), plain
            return
    at = found.start()
    for line in lines if len(lines) > 1 else ():
        if (plain := _from_hex(line) or _from_base64(line)) is not None:
            yield at, at + len(line), plain
        at += len(line)
        at = following.end() if (following := _BREAK.match(found.string, at)) else at


def _from_base64(run: str) -> str | None:
    if not _BEGINS_AS_TEXT.match(run):
        return None
    run = run.translate(_ALPHABET)
    probe = _bytes(run[:_PROBE])
    if probe is None or _as_text(probe, cut=True) is None:
        return None
    whole = _bytes(run[:_MAX_DECODED])
    return _as_text(whole) if whole is not None else None


def _bytes(run: str) -> bytes | None:
    run = run[: len(run) - 1] if len(run) % 4 == 1 else run
    try:
        return base64.b64decode(run + "=" * (-len(run) % 4))
    except binascii.Error:
        return None


def _as_text(data: bytes, *, cut: bool = False) -> str | None:
    """Printable UTF-8, or UTF-16 as PowerShell encodes commands; else None. `cut`: it may end within a character."""
    if data[1::2].count(0) * 2 > len(data) // 2:
        data = data[::2]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not cut or error.start < len(data) - 3:
            return None
        text = data[: error.start].decode("utf-8")
    return text if text.translate(_WHITE).isprintable() else None


_WHITE = str.maketrans("", "", "\t\r\n\x1b")

"""Anchors for what has a form but no letters of its own: a text's characters replaced by their classes.

In the fine mask a digit is `0`, a capital `A`, a small letter `a`; in the coarse mask all three are `a`; other ASCII is
itself, everything else `?`. A mask has one byte for each character, so places in it are places in the text.
"""

from __future__ import annotations

import string

_ASCII = bytes(range(256))


def _table(classes: dict[str, str]) -> bytes:
    table = bytearray(_ASCII)
    for members, mark in classes.items():
        for member in members:
            table[ord(member)] = ord(mark)
    return bytes(table)


_FINE = _table({string.digits: "0", string.ascii_uppercase: "A", string.ascii_lowercase: "a"})
_COARSE = _table({string.digits + string.ascii_letters: "a"})
_RUNS = _table({string.digits + string.ascii_letters + "+/-_": "a"})


def fine(text: str) -> bytes:
    """Digits, capitals and small letters each as one."""
    return text.encode("ascii", "replace").translate(_FINE)


def coarse(text: str) -> bytes:
    """Letters and digits as one."""
    return text.encode("ascii", "replace").translate(_COARSE)


def runs(text: str) -> bytes:
    """Characters of base64 (both alphabets) as one."""
    return text.encode("ascii", "replace").translate(_RUNS)

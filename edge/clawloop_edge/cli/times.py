"""Durations as a person types them."""

from __future__ import annotations

import re

import typer

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_MAX_S = 100 * 366 * 86_400


def duration_ms(text: str) -> int:
    """Milliseconds of `2h`, `30m`, `1d12h`. Raises BadParameter: something else, or nothing."""
    parts = _PART.findall(text)
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds <= _MAX_S:
        raise typer.BadParameter(f"{text!r} is no duration; write it like 30m, 2h or 1d12h")
    return int(seconds * 1000)

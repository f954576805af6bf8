"""Times and durations as people write and read them, in their own zone. The present is given."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import typer

FORMS = "`2h`, `3d` or `1w` ago, `today`, `yesterday`, `2026-11-20` or `2026-11-20 14:30`"
_DATE_CHARS = len("2026-11-20")
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


def parse_moment(text: str, *, now: datetime, end: bool = False) -> int:
    """A point in time (ms since 1970) as a person writes it; a day stands for its beginning, or for its `end`.

    Raises:
        BadParameter: it is none of `FORMS`.
    """
    words = text.strip().lower()
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    days = {"today": today, "yesterday": today - timedelta(days=1)}
    try:
        found = days[words] if words in days else datetime.fromisoformat(text.strip())
    except ValueError:
        return _as_ms(now) - _ago_ms(words)
    whole_day = words in days or len(words) == _DATE_CHARS
    return _as_ms(found + timedelta(days=1) if end and whole_day else found)


def _ago_ms(words: str) -> int:
    try:
        return duration_ms(words.removesuffix("ago").strip())
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{words!r} is no time; write {FORMS}") from error


def told(time_ms: int, *, now: datetime) -> str:
    """A time in as few words as tell it: `today 14:03`, `yesterday 09:12`, `20 Nov 18:01`, `2025-12-01`; or nothing."""
    if not time_ms:
        return ""
    at = datetime.fromtimestamp(time_ms / 1000, tz=now.tzinfo)
    days = (now.date() - at.date()).days
    if days in (-1, 0, 1):
        return f"{('today', 'yesterday', 'tomorrow')[days]} {at:%H:%M}"
    return f"{at.day} {at:%b %H:%M}" if at.year == now.year else f"{at:%Y-%m-%d}"


def lasted(time_ms: int) -> str:
    """How long something took: `0.4 s`, `12 s`, `3 min 20 s`."""
    seconds = max(0, time_ms) / 1000
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _as_ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)

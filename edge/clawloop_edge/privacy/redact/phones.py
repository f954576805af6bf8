"""Phone numbers: by their shape where it tells (international, North American, a leading 0), else behind a word.

A table of countries' numbering plans would know more; the plans' shapes that people write find what must be found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from clawloop_edge.privacy.redact.rules import Anchored, Sweep, at_anchor
from clawloop_edge.privacy.redact.spans import Hit

# ITU-T E.164 (list of assigned country codes): one and two digits long; then the ranges that are three digits long.
_SHORT_CODES = frozenset(
    map(str, (1, 7, 20, 27, *range(30, 35), 36, 39, 40, 41, *range(43, 50), *range(51, 59), *range(60, 67)))
) | frozenset(map(str, (81, 82, 84, 86, *range(90, 96), 98)))
_LONG_CODES = re.compile(r"2[1-689]\d|3[578]\d|42\d|5[09]\d|6[789]\d|8[0578]\d|9[679]\d")
_INTERNATIONAL = re.compile(r"(?<![\w+.])(?:\+[ ]?|00[ ]?)(?P<rest>[1-9](?:[ .\-/()\u00a0]{0,3}\d){6,14})(?!\w|[.:]\d)")
_NATIONAL = re.compile(r"0(?<![\w.,:/\-+=]0)[1-9]\d{0,4}\)?(?:[ \-/]\d{2,8}){1,5}(?!\w|[.\-/:]\d)")
_AMERICAN = (
    r"(?<![\w.\-/+=])(?:1[ .-])?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?!\w|[.\-/]\d)"
    r"(?:[ ](?:x|ext\.?)[ ]?\d{1,6})?"
)
_BRACKETED = r"(?<![\w.])\(\d{2,4}\)[ ]?\d{3,5}[ -]\d{2,4}(?:[ -]\d{2,4})?(?![\w-])"
_NEAR = re.compile(r"[+(]?\d(?:[ .\-/()]{0,2}\d){5,14}(?!\w|[.:]\d)")
_JOINED = (
    r"(?:[ \t](?:is|on|at|to|no\.?|number|nr\.?|ist|under|unter|via|by|can|be|reached|my|his|her|our|or|cell|mobile"
    r"|phone|the|office|home|work|desk|direct|line|me|us|him|them|es|el|le|est|:|-)){0,6}"
    r"(?:[ \t]?(?:[:=.#>,;|-]|=>|</\w{1,20}>)){0,2}[ \t]{0,4}\\*[\"'`*]{0,3}"
)
_PHONE_WORD = re.compile(
    r"(?:phone|mobile?|fax|whatsapp|handy|(?<![^\W_])tel(?![a-df-z])|(?<![^\W_])cell(?!s)|msisdn|(?<![^\W_])sms"
    r"|telefon|téléphone|teléfono|m[oó]vil|celular|hotline|portable)"
    r"(?![\w-]{0,12}id\b)(?:\w|-(?=\w)){0,12}\\*[\"']?\]?[*_]{0,2}" + _JOINED,
    re.IGNORECASE,
)
_CALL_WORD = re.compile(
    r"(?<![^\W_])(?:call|text|ring|reach|dial|signal|contact|message|ping)[ ](?:me|us|him|her|them|back|my)\b"
    + _JOINED,
    re.IGNORECASE,
)
_DATE = (
    r"(?<!\d)(?:(?:19|20)\d\d[-/. ](?:0?[1-9]|1[0-2])[-/. ](?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[-/. ](?:0?[1-9]|[12]\d|3[01])[-/. ](?:19|20)\d\d)(?!\d)"
)
_NO_PHONE = re.compile(_DATE + r"|^\d{5}-\d{4}$")


def named(text: str, start: int, end: int) -> Iterable[Hit]:
    """Digits behind `phone`: there even a local number of six digits is one."""
    return _behind(text, _PHONE_WORD.match(text, start))


def to_call(text: str, start: int, end: int) -> Iterable[Hit]:
    """Digits behind "call me"."""
    return _behind(text, _CALL_WORD.match(text, start))


def _behind(text: str, word: re.Match[str] | None) -> Iterable[Hit]:
    found = _NEAR.match(text, word.end()) if word else None
    if found is None or not 6 <= len(digits := _digits(found[0])) <= 15:
        return ()
    if len(set(digits)) == 1 or found[0].count(".") > 4 or _NO_PHONE.search(found[0]):
        return ()
    return (Hit(*found.span(), "phone"),)


def international(text: str, start: int, end: int) -> Iterable[Hit]:
    """`+49 171 1234567`, `0049 171 1234567`."""
    found = _INTERNATIONAL.match(text, start)
    if found is None or _NO_PHONE.search(found["rest"]):
        return ()
    digits = _digits(found["rest"])
    return (Hit(*found.span(), "phone"),) if is_calling_code(digits) and len(digits) >= 8 else ()


def is_calling_code(digits: str) -> bool:
    """Whether a number without its + begins with a country's calling code (E.164)."""
    return digits[0] in _SHORT_CODES or digits[:2] in _SHORT_CODES or _LONG_CODES.match(digits) is not None


def national(text: str) -> Iterator[Hit]:
    """Numbers with the leading 0 of many countries, in groups: `0171/1234567`, `06 12 34 56 78`, `(020) 7946 0958`."""
    for found in _NATIONAL.finditer(text):
        if 9 <= len(_digits(found[0])) <= 12 and not _NO_PHONE.search(found[0]):
            yield Hit(found.start() - (text[found.start() - 1 : found.start()] == "("), found.end(), "phone")


def _digits(value: str) -> str:
    return "".join(c for c in value if c.isdigit())


_american, _bracketed = at_anchor("phone", _AMERICAN), at_anchor("phone", _BRACKETED)
_AMERICAN_FORMS = ("000-000-0000", "000.000.0000", "000 000 0000", "(000) 000-0000", "(000)000-0000")
_WORDS = (
    "phone", "mobil", "fax", "whatsapp", "handy", "tel", "cell", "msisdn", "sms", "téléphone", "teléfono", "móvil",
    "movil", "celular", "hotline", "portable",
)  # fmt: skip
_VERBS = ("call", "text", "ring", "reach", "dial", "signal", "contact", "message", "ping")

FORMS: Anchored = (
    *((form, international) for form in ("+0", "+ 0", "0000 0")),
    *((form, _american) for form in _AMERICAN_FORMS),
    *((f"0{mark}{form}", _american) for form in _AMERICAN_FORMS for mark in " -."),
    *((form, _bracketed) for form in ("(00) 0", "(00)0", "(000) 0", "(000)0", "(0000) 0")),
)
SWEEPS: tuple[Sweep, ...] = (national,)
ANCHORED: Anchored = (
    *((word, named) for word in _WORDS),
    *((f"{verb} ", to_call) for verb in _VERBS),
)

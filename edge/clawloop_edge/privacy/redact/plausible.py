"""Whether a value looks like a secret: random rather than made of words, and no placeholder; and keeps a promise."""

from __future__ import annotations

import base64
import re
from functools import lru_cache

from clawloop_edge.privacy.redact.names import Promise, promise
from clawloop_edge.privacy.redact.vocabulary import words

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_HEX = re.compile(r"(?:0x)?(?:[0-9a-f]+|[0-9A-F]+)")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5,}", re.IGNORECASE)
_LETTER_GROUPS = re.compile(r"[a-z]{4}(?:[- ][a-z]{4}){3}")
_TEMPLATE = re.compile(
    r"""
    \$\{|\{\{|\$\(|<[^<>]*>|\*{3}|\.{3}|…|•{2}|x{4}|\#\{|%\(\w+\)|█|\[\w*\]       # templates and masks
    |^(?:\$\w+|%\w*%|%[sdrv@]|@\w+@|\{[\w.:]*\}|&\w+|\w*::\w*|\\\w)$              # variables and format marks
    |process\.env|os\.environ|getenv|secrets\.|vars\.|vault:|^op://|^arn:|^env:|^file:|^ref\+|keychain|^aws:|^kms:
    |^https?://[^@]*$|^~/|^\./
    """,
    re.IGNORECASE | re.VERBOSE,
)
_PATH = re.compile(r"/?(?:[\w.-]+/){2,}[\w.-]*|/[\w.-]+")
_VERSION = re.compile(r"[\^~<>=v]*\d+(?:\.\d+)+[\w.+-]*|v\d+\w{0,3}")
# Ids that agents and their services number calls, answers and objects with.
_CALL_ID = re.compile(r"(?:chatcmpl|cmpl|call|toolu|srvtoolu|msg|resp|req|run)[-_]")
_NAMED_ID = re.compile(
    r"(?:chatcmpl|cmpl|call|toolu|srvtoolu|msg|resp|req|run|step|thread|file|asst|evt|cus|sub|pi|ch|prod|price|txn"
    r"|batch|item|fc|rs|sess|conv|job|task|trace|span|vs|ft|org|proj|user|acct|gen|img|cache|commit|rev|node|pod|i"
    r"|vpc|subnet|sg|ami|vol)[-_]"
)
_TYPE = re.compile(r"(?:[A-Z][a-z]+){2,}\d?$|[A-Z]\w*(?:\[\w*\]|<\w*>)|[a-z]+\[\]")
_CODE = re.compile(r"[A-Za-z_][\w.]*(?:[(\[]|<[A-Za-z]|\?\.|->|::)|[a-z_]\w*(?:\.[A-Za-z_]\w*)+$|\w*[(\[{]$")


def is_uuid(value: str) -> bool:
    return _UUID.fullmatch(value) is not None


def has_uuid(value: str) -> bool:
    return _UUID.search(value) is not None


def is_placeholder(value: str) -> bool:
    """A value that stands for one: a variable, a mask, `changeme`, `<your key>`, a type's name."""
    lower = value.lower()
    if lower.strip("\"'`.,;:!?()[]{}") in words("common") or len(set(value)) < 3:
        return True
    if len(value) > 64 and is_random(value):
        return "..." in value or "…" in value
    if any(word in lower for word in words("stand_ins")) or _TEMPLATE.search(value):
        return True
    return _PATH.fullmatch(value) is not None and not is_random(value)


@lru_cache(maxsize=16_384)
def is_random(value: str) -> bool:
    """Letters, digits and cases mixed as no person and no programmer mixes them; at least 12 characters.

    Counted are changes of class between neighbours (not a capital before a small letter): about 0.45 a pair in random
    hex and base 62, under 0.2 in names of programs. Random letters alone give themselves away by their consonants.
    """
    value = value[:256]
    plain = [c for c in value if c.isalnum()]
    if len(plain) < 12 or len(set(plain)) < 6 or not value.isascii():
        return False
    digits = sum(c.isdigit() for c in plain)
    if digits < 2:
        return len(plain) >= 16 and len(_CONSONANTS.findall(value)) >= 2 and not _has_words(value)
    if digits == len(plain):
        return False
    if len(plain) >= 24 and _HEX.fullmatch(value):
        return len(plain) - digits >= 4
    return _changes(value) / len(plain) >= 0.22 and not _has_words(value)


def _changes(value: str) -> int:
    changes, last = 0, ""
    for character in value:
        kind = "d" if character.isdigit() else "u" if character.isupper() else "l" if character.islower() else ""
        if kind and last and kind != last and (last, kind) != ("u", "l"):
            changes += 1
        last = kind
    return changes


def _has_words(value: str) -> bool:
    """Whether most of it is made of words of five letters and more that can be spoken."""
    spoken = sum(len(part) for part in _PARTS.findall(value) if len(part) > 4 and _spoken(part))
    return spoken * 2 > len(value)


def _spoken(part: str) -> bool:
    vowels = sum(c in "aeiouyAEIOUY" for c in part)
    return part.isalpha() and 0.14 <= vowels / len(part) <= 0.75 and _CONSONANTS.search(part) is None


def is_made_of_words(value: str) -> bool:
    """An identifier, a path, a title: words, joined by marks or capitals, perhaps with one small number."""
    if not value.isascii():
        return value.isalpha()
    parts = _PARTS.findall(value)
    numbers = [part for part in parts if part.isdigit()]
    if not parts or len(numbers) > 1 or len("".join(numbers)) > 2 or 9 < len(value) < 3 * len(parts):
        return False
    return all(part.isdigit() or len(part) < 4 or _spoken(part) for part in parts)


def is_call_id(value: str) -> bool:
    """An id of an agent's call or answer: `call_9fK2…`, `chatcmpl-…`."""
    return _CALL_ID.match(value) is not None


def is_named_id(value: str) -> bool:
    """An id of a call, a file, a job, a customer: `call_9fK2…`, `file-8Qz…`."""
    return _NAMED_ID.match(value) is not None


def is_encoded_pair(value: str) -> bool:
    """Base64 of `user:password`, as Basic authentication has it."""
    try:
        pair = base64.b64decode(value, validate=True)
    except ValueError:
        return False
    return len(pair) >= 6 and b":" in pair[1:-1] and pair.isascii() and pair.decode("ascii").isprintable()


def is_password(value: str) -> bool:
    """Something that a person would choose: at least 4 characters, with a digit or a mark beside letters."""
    if not 4 <= len(value) <= 256 or is_placeholder(value) or is_code(value) or _VERSION.fullmatch(value):
        return False
    letters = any(c.isalpha() for c in value)
    digits = any(c.isdigit() for c in value)
    marks = any(not c.isalnum() and c not in "-_./:\\" for c in value)
    return (letters and (digits or marks)) or (digits and marks) or _LETTER_GROUPS.fullmatch(value) is not None


def is_code(value: str) -> bool:
    """A call, an index, a member, a type: what stands on the right side in a program."""
    return _TYPE.fullmatch(value) is not None or _CODE.match(value) is not None


def keeps_quoted(value: str, promised: Promise, *, name: str, loose: bool) -> bool:
    """Whether a value in quotes is what its name promised. `loose`: the two are joined by a sign of assignment."""
    if len(value) < 3 or _is_no_value(value) or _VERSION.fullmatch(value):
        return False
    spaces = sum(c.isspace() for c in value)
    if promised is Promise.PASSWORD:
        if spaces:
            return "phrase" in name.lower() or (spaces < 4 and is_password(value) and not value.endswith("."))
        return loose or (is_password(value) and any(c.isdigit() for c in value)) or not is_made_of_words(value)
    if spaces or (is_code(value) and not is_random(value)):
        return False
    if promised is Promise.SECRET:
        return is_random(value) or is_uuid(value) or (loose and _is_made(value, at_least=6))
    return _is_key(value, at_least=16) or is_encoded_pair(value)


def keeps_bare(value: str, promised: Promise, *, data: bool, sign: str) -> bool:
    """Whether a value without quotes is what its name promised. `data`: it stands among settings, not in code."""
    if _is_no_value(value) or (is_code(value) and not is_random(value)):
        return False
    if promised is Promise.PASSWORD:
        if value.isdigit():
            return len(value) >= 4 and (data or sign != "=")
        return is_password(value) or (data and len(value) >= 6 and value.isalnum() and not value[0].isupper())
    if promised is Promise.SECRET:
        made = _is_made(value, at_least=8 if data else 16) and any(c.isdigit() for c in value)
        return made or is_random(value) or is_uuid(value)
    return _is_key(value, at_least=20)


def _is_no_value(value: str) -> bool:
    """A placeholder, an id of a call, another name, or longer than anything that is not drawn at random."""
    if len(value) > 96 and not is_random(value):
        return True
    return is_placeholder(value) or is_call_id(value) or _is_name(value)


def _is_name(value: str) -> bool:
    """The name of a secret in its turn: `smtpPassword`, `API_KEY`."""
    compound = "_" in value or not (value.islower() or value.isupper() or value.istitle())
    return (
        compound
        and value.isidentifier()
        and value.isascii()
        and not any(map(str.isdigit, value))
        and bool(promise(value))
    )


def _is_key(value: str, *, at_least: int) -> bool:
    """Random, and no UUID: those name sessions and requests."""
    return len(value) >= at_least and is_random(value) and not has_uuid(value) and not is_named_id(value)


def _is_made(value: str, *, at_least: int) -> bool:
    """Short for a machine's secret, but neither words nor a number."""
    return len(value) >= at_least and not is_made_of_words(value) and not value.replace(".", "").isdigit()

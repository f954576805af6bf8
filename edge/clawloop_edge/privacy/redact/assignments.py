"""Secrets that a name gives away: `password: hunter2`, `--token abc`, `"apiKey": "…"`, `<secret>…</secret>`.

Called for the key words in a text. It reads the whole name around a word, what joins name and value, and the value;
then asks names.py what the name promises, and plausible.py whether the value keeps it; where nothing is assigned,
prose.py looks on. Every window is bounded, so the work for a key word is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clawloop_edge.privacy.redact import prose
from clawloop_edge.privacy.redact.names import Promise, promise
from clawloop_edge.privacy.redact.plausible import is_made_of_words, is_random, keeps_bare, keeps_quoted
from clawloop_edge.privacy.redact.spans import Hit

WORDS = (
    "pass", "pwd", "pw", "psk", "secret", "token", "key", "auth", "credential", "creds", "cookie", "session", "webhook",
    "kennwort", "contraseña", "contrasena", "senha", "clave", "wachtwoord", "hasło", "haslo", "lösenord", "jwt", "dsn",
    "adgangskode", "salasana", "пароль", "парола", "parola", "密码", "密碼", "口令", "パスワード", "비밀번호", "bearer",
    "signature", "sig", "mnemonic", "phrase", "mdp", "mot de passe", "otp", "şifre", "sifre", "sid", "appid", "app_id",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAME_CHARACTERS = _LETTERS + "0123456789_-."
_MAX_NAME, _MAX_VALUE, _MAX_INDENT = 48, 4096, 40

_NAME_REST = re.compile(r"[\w-]{0,40}(?:\.[\w-]{1,40}){0,3}")
_SPACED_OWNER = re.compile(
    r"(?:api|access|secret|private|auth|encryption|signing|license|account|service|master|app|session|ssh|gpg|deploy"
    r"|client|bearer|bot|refresh|security|recovery|seed|admin|root|subscription|product|storage)[ -]\Z",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"""\\*["'`]?[\])]?[*_`]{0,3}(?:
      [ \t]{0,20}(?P<sign>=>|:=|={1,3}|::?|->|→|!=|\|)[*_`]{0,3}[ \t]{0,20}(?:(?:[|>][-+]?)?\\?\r?\n[ \t]{0,20})?
      |(?P<pair></key>\s{0,40}<string>|,?(?:\s|\\n){0,40}\\*["']?value\\*["']?[ \t]{0,4}[:=][ \t]{0,4})
      |(?P<tag>>)
      |(?P<call>\([ \t]{0,4})
      |(?P<comma>,[ \t]{0,4})
      |(?P<space>[ \t]{1,8})
    )(?P<open>(?:[a-zA-Z@]{0,2}(?=\\*["']))?\\*["'`])?""",
    re.VERBOSE,
)
_JOINTS = ("sign", "pair", "tag", "call", "comma", "space")
_IN_QUERY = re.compile(r"[^\s&#\"'<>`\\]{1,256}")
_IN_LIST = re.compile(r"[^\s;\"']{1,256}")
_IN_LINE = re.compile(r"[^\s\"'`]{1,256}")
_IN_CODE = re.compile(r"[^\s\"'`,;)<>\]}|]{1,256}")
_NEXT_FIELD = re.compile(r"&[\w.-]{1,40}=")
_NETRC = re.compile(r"\blogin[ \t]{1,4}\S{1,64}\s{1,20}\Z")
_BEFORE_NAME = frozenset(
    ("", "-", "export", "set", "ENV", "$env:", "env", "+", ">", "|", "declare -x", "**", "*", "- **", "setenv")
)


class _Slot(NamedTuple):
    """A name and where its value may begin: how both are joined, and the quote that opens the value."""

    name: str
    start: int
    value_at: int
    joint: str
    quote: str


def find(text: str, places: Sequence[tuple[int, int]]) -> Iterator[Hit]:
    """Hits for the key words at `places`, which are in order."""
    seen = 0
    for start, end in places:
        if start < seen:
            continue
        name_start, seen = _name_at(text, start, end)
        promised = promise(text[name_start:seen])
        if promised is Promise.NONE or _is_within_run(text, name_start, seen):
            continue
        hit = _assigned(text, name_start, seen, promised=promised)
        if hit is None and text[seen : seen + 1] != "=":
            hit = prose.told(text, seen, promised=promised) or prose.near(text, name_start, seen, promised=promised)
        if hit is not None:
            seen = max(seen, hit[1])
            yield Hit(*hit, "password" if promised is Promise.PASSWORD else "secret", by_context=True)


def _name_at(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the name around a key word begins and ends; "api key" is one name."""
    window = text[max(0, start - _MAX_NAME) : start]
    left = start - len(window) + len(window.rstrip(_NAME_CHARACTERS))
    spaced = _SPACED_OWNER.search(text, max(0, left - 16), left)
    rest = _NAME_REST.match(text, end)
    return (spaced.start() if spaced else left), (rest.end() if rest else end)


def _is_within_run(text: str, start: int, end: int) -> bool:
    """Whether a key word is but letters in a long run of base64."""
    return text[max(0, start - 1) : start].isalnum() or text[end : end + 1] == "+"


def _assigned(text: str, start: int, end: int, *, promised: Promise) -> tuple[int, int] | None:
    after = _AFTER.match(text, end)
    if after is None:
        return None
    joint = next(group for group in _JOINTS if after[group] is not None)
    slot = _Slot(text[start:end], start, after.end(), after["sign"] or joint, after["open"] or "")
    if slot.quote:
        return _quoted(text, slot, promised)
    if joint == "tag" or after["pair"] == "</key>":
        return _tagged(text, slot, promised)
    if joint == "space":
        return _flag(text, slot, promised)
    return None if joint in ("call", "comma") else _bare(text, slot, promised)


def _quoted(text: str, slot: _Slot, promised: Promise) -> tuple[int, int] | None:
    start = slot.value_at
    end = _closing(text, slot.quote.lstrip(_LETTERS + "@"), start)
    value = text[start:end] if end > start else "\n"
    if "\n" in value or (slot.joint == "space" and not _introduces(text, slot)):
        return None
    loose = slot.joint not in ("call", "comma", "space", "|")
    return (start, end) if keeps_quoted(value.strip(), promised, name=slot.name, loose=loose) else None


def _closing(text: str, mark: str, start: int) -> int:
    """Where the quote ends that `mark` opened: at the next one that is not escaped."""
    end = text.find(mark, start, start + _MAX_VALUE)
    while end > start and text[end - 1] == "\\":
        end = text.find(mark, end + 1, start + _MAX_VALUE)
    return end


def _introduces(text: str, slot: _Slot) -> bool:
    """Whether a quote after nothing but a space is a value: behind a flag, or in SQL."""
    if slot.quote.endswith("`"):
        return False
    in_sql = text[max(0, slot.start - 5) : slot.start].lower() == "with "
    return slot.name.startswith("-") or slot.name.isupper() or in_sql


def _tagged(text: str, slot: _Slot, promised: Promise) -> tuple[int, int] | None:
    end = text.find("</", slot.value_at, slot.value_at + _MAX_VALUE)
    value = text[slot.value_at : end] if end > 0 else "\n"
    if "\n" in value or "<" in value or not keeps_quoted(value, promised, name=slot.name, loose=True):
        return None
    return slot.value_at, end


def _flag(text: str, slot: _Slot, promised: Promise) -> tuple[int, int] | None:
    """`--password hunter2`, Docker's `ENV TOKEN abc`, and netrc's `login jane password hunter2`."""
    is_flag = slot.name.startswith("-")
    if not is_flag and not _is_setting(text, slot.start):
        return None
    value = _longest(text, slot.value_at, _IN_LINE).rstrip("\\),;|")
    if value.startswith("-") or value.isupper():
        return None
    is_word = is_flag and is_made_of_words(value) and not any(c.isdigit() for c in value)
    if is_word or not keeps_quoted(value, promised, name=slot.name, loose=True):
        return None
    return slot.value_at, slot.value_at + len(value)


def _is_setting(text: str, start: int) -> bool:
    """Whether a name is set here without a sign: in a Dockerfile, in csh and fish, by `configure set`, in netrc."""
    before = text[max(0, start - 80) : start]
    return before.endswith(("ENV ", "setenv ", "setx ", "set -gx ", "set -x ", "configure set ")) or bool(
        _NETRC.search(before)
    )


def _bare(text: str, slot: _Slot, promised: Promise) -> tuple[int, int] | None:
    """A value without quotes: how far it reaches, and what it must be, is told by where its name stands."""
    before = text[max(0, slot.start - 1) : slot.start]
    alone = begins_line(text, slot.start)
    in_query = before in ("?", "&") and slot.joint == "="
    in_list = before == ";" and slot.joint == "="
    shape = _IN_QUERY if in_query else _IN_LIST if in_list else _IN_CODE
    if alone and slot.joint in ("=", ":"):
        shape = _IN_LINE
    value = _trimmed(_longest(text, slot.value_at, shape), sign=slot.joint)
    if not value:
        return None
    end = slot.value_at + len(value)
    data = in_query or in_list or (alone and text[end : end + 1] in ("", "\n", "\r", "\\"))
    return (slot.value_at, end) if keeps_bare(value, promised, data=data, sign=slot.joint) else None


def _longest(text: str, at: int, shape: re.Pattern[str]) -> str:
    """The value at `at`: 256 characters of the shape at most, or up to 4096 if it is random so far."""
    found = shape.match(text, at)
    value = found[0] if found else ""
    while len(value) % 256 == 0 and 0 < len(value) < _MAX_VALUE and is_random(value[-256:]):
        more = shape.match(text, at + len(value))
        if more is None:
            break
        value += more[0]
    return value


def begins_line(text: str, start: int) -> bool:
    """Whether nothing but indentation, a dash or `export` stands before a name in its line (also an escaped line)."""
    window = text[max(0, start - _MAX_INDENT) : start]
    line = window[max(window.rfind("\n") + 1, window.rfind("\\n") + 2 if "\\n" in window else 0) :]
    return len(line) < _MAX_INDENT and line.strip() in _BEFORE_NAME


def _trimmed(value: str, *, sign: str) -> str:
    for mark in ("\\n", "\\r", "\\t"):
        if (cut := value.find(mark)) > 0:
            value = value[:cut]
    if sign == "=" and (following := _NEXT_FIELD.search(value)) is not None:
        value = value[: following.start()]
    return value.rstrip("\\").rstrip(".,;:!?*_`|)" if sign in (":", "|", "->", "→") else ",;`")

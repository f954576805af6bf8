"""Who somebody is: e-mail addresses, the user in the path of a home folder, dates of birth."""

from __future__ import annotations

import re
from collections.abc import Iterable

from clawloop_edge.privacy.redact.rules import Anchored, at_anchor
from clawloop_edge.privacy.redact.spans import Hit
from clawloop_edge.privacy.redact.vocabulary import words

_LOCAL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$&'*+/=?^_{|}~-"
_DOMAIN = re.compile(r"(?:[^\W_][\w-]{0,62}\.){1,6}(?P<top>[^\W\d_]{2,24})(?![\w@-]|\.[^\W\d_])")
_IN_AUTHORITY = re.compile(r"://(?:[^\s/@\"'<>]{0,100}:)?\Z")
_LOCAL_WRITTEN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+_-"
_DOT_WRITTEN = r"[ ]{0,2}(?:[(\[{][ ]?(?:dot|punkt|\.)[ ]?[)\]}]|[ ]dot[ ]|\.)[ ]{0,2}"
_DOMAIN_WRITTEN = re.compile(
    rf"[ ]{{0,2}}[\w-]{{2,63}}(?:{_DOT_WRITTEN}[\w-]{{2,63}}){{0,2}}{_DOT_WRITTEN}(?P<top>[a-z]{{2,12}})", re.IGNORECASE
)
_HOME = re.compile(
    r"(?<![\w.])(?:/Users|/home|\\{1,4}[Uu]sers)(?:/|\\{1,4})"
    r"(?P<user>[A-Za-z0-9][\w.-]{0,62})(?=[/\\\"'\s:;,)\]<>`]|\Z)"
)
_MONTH = (
    r"(?:jan(?:uary|uar|vier)?|feb(?:ruary|ruar)?|février|mar(?:ch|zo|s)?|märz|apr(?:il)?|avril|may|mai|mayo|june?"
    r"|juni|juin|july?|juli|juillet|aug(?:ust)?|août|sept?(?:ember)?|septembre|oct(?:ober)?|okt(?:ober)?|octobre"
    r"|nov(?:ember)?|novembre|dec(?:ember)?|dez(?:ember)?|décembre|enero|febrero|abril|junio|julio|agosto|septiembre"
    r"|octubre|noviembre|diciembre)"
)
_BORN = (
    "date of birth", "date_of_birth", "date-of-birth", "dateofbirth", "birth date", "birth_date", "birth-date",
    "birthdate", "birthday", "birth day", "birth_day", "dob", "d.o.b", "born", "geboren", "geburtsdatum", "geburtstag",
    "geb.", "né le", "née le", "né(e) le", "date de naissance", "fecha de nacimiento", "nacido", "nacida", "nato il",
    "nata il", "data di nascita", "data de nascimento", "geboortedatum", "data urodzenia", "urodzony", "urodzona",
)  # fmt: skip
_MARK = r"(?:[-/. ]|\. )"
_BIRTH = (
    rf"(?:{'|'.join(map(re.escape, _BORN))})\.?\\*[\"']?\]?[*_]{{0,2}}"
    r"(?:[ ]?(?:\([^()\n]{0,20}\)|is|was|on|am|el|le|il|in|op|the|:|=|=>|-|>|\||,)){0,4}[ \t]{0,4}\\*[\"']?"
    rf"(?:[A-Za-z]{{3,8}}day,?[ ])?(?P<value>\d{{1,4}}{_MARK}\d{{1,2}}{_MARK}\d{{2,4}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)?[ ](?:of[ ]|de[ ])?{_MONTH}\.?,?(?:[ ]de)?[ ]\d{{2,4}}"
    rf"|{_MONTH}\.?[ ]\d{{1,2}}(?:st|nd|rd|th)?,?[ ]\d{{2,4}}|(?:19|20)\d{{6}})(?!\d)"
)


def email(text: str, start: int, end: int) -> Iterable[Hit]:
    """An address around an @."""
    domain = _DOMAIN.match(text, end)
    if domain is None or domain["top"].lower() in words("file_endings"):
        return ()
    window = text[max(0, start - 64) : start]
    begin = start - len(_without_frame(window[len(window.rstrip(_LOCAL)) :]))
    if begin == start or text[start - 1] in ".\\" or text[begin:start].lower() in words("role_addresses"):
        return ()
    is_scaled_image = domain[0].partition(".")[0].rstrip("x").isdigit()  # icon@2x.png
    if is_scaled_image or _IN_AUTHORITY.search(text, max(0, begin - 128), begin):
        return ()
    return (Hit(begin, domain.end(), "email"),)


def _without_frame(local: str) -> str:
    """The local part without what may be written just before it: `to=`, a quote, `user/`."""
    for mark in "='{|/?&!#$*^~":
        local = local[local.rfind(mark) + 1 :]
    return local.lstrip(".-")


def written_email(text: str, start: int, end: int) -> Iterable[Hit]:
    """ "jane (at) corp dot com"."""
    window = text[max(0, start - 66) : start].rstrip(" ")
    local = window[len(window.rstrip(_LOCAL_WRITTEN)) :]
    domain = _DOMAIN_WRITTEN.match(text, end)
    if len(local) < 2 or domain is None or domain["top"].lower() not in words("top_domains"):
        return ()
    return (Hit(max(0, start - 66) + len(window) - len(local), domain.end(), "email"),)


def home_folder(text: str, start: int, end: int) -> Iterable[Hit]:
    """The user's name in the path of a home folder."""
    found = _HOME.match(text, start)
    if found is None or found["user"].lower() in words("generic_users"):
        return ()
    return (Hit(*found.span("user"), "user-name"),)


_birth = at_anchor("birth-date", _BIRTH, group="value", flags=re.IGNORECASE, by_context=True)
ANCHORED: Anchored = (
    ("@", email),
    *((anchor, written_email) for anchor in ("(at)", "[at]", "{at}", "( at )", "[ at ]")),
    *((anchor, home_folder) for anchor in ("/users/", "/home/", "\\users\\")),
    *((anchor, _birth) for anchor in _BORN),
)

"""Where a person is: street addresses of several countries' shapes, and coordinates."""

from __future__ import annotations

import re
from collections.abc import Iterable

from clawloop_edge.privacy.redact.rules import Anchored, around, at_anchor
from clawloop_edge.privacy.redact.spans import Hit

_PLACE = r"[A-ZÀ-Þ][\w'’.-]{1,30}"
_ENGLISH = re.compile(
    r"(?<![\w.,$€£#-])\d{1,5}[A-Za-z]?(?:[-/]\d{1,4}[A-Za-z]?)?,?[ ](?:(?:[NSEW]{1,2}\.?|North|South|East|West)[ ])?"
    r"(?:[A-Z0-9][\w'’.-]{0,30}[ ]){1,4}?(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct"
    r"|Circle|Cir|Place|Pl|Terrace|Ter|Way|Square|Sq|Highway|Hwy|Parkway|Pkwy|Close|Crescent|Cres|Gardens|Grove|Row"
    r"|Mews|Alley|Trail|Loop|Walk|Hill|Quay|Plaza)\b\.?(?:[ ](?:[NSEW]{1,2}|North|South|East|West)\b)?"
    r"(?:,?[ ]\(?(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Rm|Room|#)\.?[ ]?#?[\w-]{1,6}\)?)?"
    rf"(?:,[ ]{_PLACE}(?:[ ]{_PLACE}){{0,2}}){{0,2}}(?:,?[ ]+[A-Z]{{2,3}}\b)?"
    r"(?:,?[ ]+(?:\d{4,5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]?[ ]\d[A-Z]{2}|[A-Z]\d[A-Z][ ]?\d[A-Z]\d)\b)?"
)
_SPOKEN = re.compile(
    r"(?<![\w.,$€£#-])\d{1,5}[a-z]?[ ][a-z]{3,15}[ ](?:[a-z]{3,15}[ ])?(?:street|avenue|boulevard|road)\b"
    r"(?:,?[ ](?:apt|unit|flat)[ ]?\w{1,5})?"
)
_FRENCH = re.compile(
    r"(?<![\w.,])\d{1,4}(?:[ ]?(?:bis|ter))?,?[ ](?:[Rr]ue|[Aa]venue|[Bb]oulevard|[Pp]lace|[Aa]llée|[Cc]hemin"
    r"|[Ii]mpasse|[Qq]uai|[Cc]ours|[Rr]oute)[ ](?:(?:de|du|des|de la|le|les|la)[ ]|de l['’]|d['’]|l['’])?"
    r"[A-ZÀ-Þ][\w'’-]{1,30}(?:[ ][\w'’-]{2,30}){0,3}?"
    r"(?:,?[ ]\d{5}[ ][A-ZÀ-Þ][\w-]{1,30}|(?=[,.;:\n\"'<)\\]|\Z))"
)
_NUMBERED = (_ENGLISH, _SPOKEN, _FRENCH)
_SUFFIXES = (
    "straße", "strasse", "str.", "weg", "platz", "allee", "gasse", "ring", "ufer", "damm", "straat", "laan", "gracht",
    "plein", "kade", "singel", "gatan", "vägen", "gade", "vej", "veien", "katu",
)  # fmt: skip
_STREET_NAME = re.compile(r"(?:[A-ZÄÖÜÅØ][\wäöüßåø.-]{0,30}[ ]){0,2}[A-ZÄÖÜÅØ][\wäöüßåø.-]{1,40}\Z")
_STREET_NUMBER = re.compile(
    r"[ ]\d{1,4}[ ]?[a-zA-Z]?(?:[-/]\d{1,4})?\b"
    rf"(?:,?[ ]+(?:[A-Z]-)?(?:\d{{4,5}}|\d{{3}}[ ]\d\d)(?:[ ][A-Z]{{2}})?[ ]{_PLACE}(?:[ ]{_PLACE})?)?"
)
_ROMANIC_FIRST = (
    "calle ", "c/", "avenida ", "avda", "av. ", "plaza ", "paseo ", "carrer ", "rua ", "travessa ", "via ", "viale ",
    "piazza ", "corso ", "largo ", "vicolo ", "ul. ", "ulica ", "al. ",
)  # fmt: skip
_ROMANIC = (
    r"(?<!\w)(?:Calle|C/|Avenida|Avda\.?|Av\.|Plaza|Paseo|Carrer|Rua|Travessa|Via|Viale|Piazza|Corso|Largo|Vicolo"
    r"|ul\.|ulica|al\.)[ ]?(?:(?:de la|de los|de|del|da|do|dos|das|della|dei|la|las|los)[ ]|d['’])?"
    r"[A-ZÀ-ÞŁŚŻŹĆ][\w'’.-]{1,30}(?:[ ][\w'’.-]{2,30}){0,3}?,?[ ](?:n[º°o.]\.?[ ]?)?\d{1,4}[a-zA-Z]?(?:/\d{1,4})?\b"
    rf"(?:,?[ ]+\d{{2,5}}(?:-\d{{3}})?[ ]{_PLACE}(?:[ ]{_PLACE})?)?"
)
_UK_POSTCODE = (
    r"(?<![\w-])[A-PR-UWYZ](?:\d{1,2}|[A-HK-Y]\d{1,2}|\d[A-HJKPSTUW]|[A-HK-Y]\d[ABEHMNPRVWXY])[ ]\d[ABD-HJLNP-UW-Z]{2}"
    r"(?![\w-])"
)

_PAIR = re.compile(
    r"(?<![\d.\w])(?P<lat>\d{1,2}\.\d{4,8})°?[ ]?(?:[NS])?[,;/][ ]?(?P<lon>-?\d{1,3}\.\d{4,8})°?[ ]?[EW]?"
    r"(?![\d.\w]|[ ]?,[ ]?-?\d+\.\d)"
)
_ROW = re.compile(r"\d,\s{0,2}[-+]?\Z")
_COORDINATE = re.compile(
    r"(?:lat(?:itude)?|lon(?:g(?:itude)?)?|lng|breite|länge)\\*[\"']?\]?[ ]{0,2}[:=>][ ]{0,2}\\*[\"']?"
    r"(?P<value>[-+]?\d{1,3}\.\d{3,12})",
    re.IGNORECASE,
)
_MINUTES = r"\d{1,3}[°º][ ]?\d{1,2}(?:[.,]\d{1,6})?['′’][ ]?(?:\d{1,2}(?:[.,]\d{1,6})?(?:\\{0,2}\"|″|”|''))?[ ]?"
_DEGREES = re.compile(
    rf"(?<!\d){_MINUTES}[NSns][,;]?[ ]{{0,2}}{_MINUTES}[EWOewo]\b"
    r"|(?<!\d)\d{1,2}\.\d{3,8}[°º][ ]?[NS][,;]?[ ]{0,2}\d{1,3}\.\d{3,8}[°º][ ]?[EWO]\b"
)


def numbered_street(text: str, start: int, end: int) -> Iterable[Hit]:
    """A street behind its number, which ends where the anchor begins: `742 Evergreen Terrace`, `12 rue de la Paix`."""
    window = text[max(0, start - 12) : start + 1]
    begin = start + 1 - len(window) + len(window.rstrip("0123456789-/abcdABCD"))
    for shape in _NUMBERED:
        if (found := shape.match(text, begin)) is not None:
            return (Hit(*found.span(), "address"),)
    return ()


def named_street(text: str, start: int, end: int) -> Iterable[Hit]:
    """A name that ends in a word for a street, and a number: `Hauptstraße 12`, `Nieuwstraat 8a, 3512 PH Utrecht`."""
    if text[end : end + 1] != " " or not text[end + 1 : end + 2].isdigit():
        return ()
    number = _STREET_NUMBER.match(text, end)
    name = _STREET_NAME.search(text, max(0, end - 60), end)
    if number is None or name is None or end - start + 2 > len(name[0]):
        return ()
    return (Hit(name.start(), number.end(), "address"),)


def coordinate(text: str, start: int, end: int) -> Iterable[Hit]:
    """`"lat": 48.85837`."""
    found = _COORDINATE.match(text, start)
    if found is None or text[max(0, start - 1) : start].isalpha() or abs(float(found["value"])) > 180:
        return ()
    return (Hit(*found.span("value"), "coordinates"),)


def pair(text: str, start: int, end: int) -> Iterable[Hit]:
    """Two numbers with four decimals and more, alone beside each other, as a place on Earth; not a row of numbers.

    The anchor is where both meet.
    """
    window = text[max(0, start - 8) : end]
    begin = end - len(window) + window.find(".") - 2
    found = next(filter(None, (_PAIR.match(text, at) for at in range(max(0, begin), begin + 3))), None)
    if found is None:
        return ()
    begin = found.start()
    before = text[max(0, begin - 5) : begin]
    latitude, longitude = float(found["lat"]), abs(float(found["lon"]))
    if not 1 < latitude <= 90 or not 1 < longitude <= 180 or _ROW.search(before):
        return ()
    return (Hit(begin - before.endswith(("-", "+")), found.end(), "coordinates"),)


_romanic = at_anchor("address", _ROMANIC)


def degrees(text: str, start: int, end: int) -> Iterable[Hit]:
    """`48°51'29.9"N 2°17'40.2"E`."""
    window = text[max(0, start - 8) : start]
    found = _DEGREES.match(text, start - len(window) + len(window.rstrip("0123456789.")))
    return (Hit(*found.span(), "coordinates"),) if found else ()


_box = around("address", r"\bP\.?[ ]?O\.?[ ]?Box[ ]\d{1,6}\b", back=8, flags=re.IGNORECASE)
ANCHORED: Anchored = (
    *((suffix, named_street) for suffix in _SUFFIXES),
    *((first, _romanic) for first in _ROMANIC_FIRST),
    ("box ", _box),
    *((anchor, coordinate) for anchor in ("lat", "lon", "lng", "breite", "länge")),
    ("°", degrees),
    ("º", degrees),
)
FORMS: Anchored = (
    *((form, numbered_street) for form in ("0 A", "0 a", "0A A", "0a A", "0, a", "0, A")),
    *((form, pair) for form in ("0000,0", "0000, 0", "0000,-0", "0000, -0", "0000;0", "0000; 0")),
    (" 0AA", around("address", _UK_POSTCODE, back=4)),
)

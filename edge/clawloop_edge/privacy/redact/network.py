"""Addresses of machines: IPv4, IPv6 and MAC. Those that name nobody (loopback, masks, resolvers) are left alone."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator

from clawloop_edge.privacy.redact.rules import Anchored, Sweep, at_anchor
from clawloop_edge.privacy.redact.spans import Hit

_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\w.\-]){_OCTET}(?:\.{_OCTET}){{3}}(?!\w|\.\d|-\d)")
_VERSION = re.compile(
    r"(?:(?:version|ver|release|section|chapter|build|chrome|safari|firefox|==|>=|<=|~=|\^)[ :=\"'/]{0,3}"
    r"|(?<![^\W_])v)\Z",
    re.IGNORECASE,
)
_IPV6 = re.compile(
    r"(?<![\w.])(?<![0-9A-Fa-f]:)(?<!::)(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:%\w{1,16})?(?![\w:])"
)
_COLON = re.compile(r":(?<=[0-9A-Fa-f]:)[0-9A-Fa-f:]{2}")
_HEX = "0123456789abcdefABCDEF"
_GLOBAL = ("2", "fe8", "fe9", "fea", "feb", "fc", "fd")
_NOBODY = frozenset(
    ("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "192.168.0.1", "192.168.1.1", "10.0.0.1")
)
_BYTE = "[0-9A-Fa-f]{2}"
_MAC = (
    r"(?<!\w)(?<![0-9A-Fa-f][:-])(?!00[:-]00[:-]00|(?:[fF]{2}[:-]){3})"
    rf"{_BYTE}([:-])(?:{_BYTE}\1){{4}}{_BYTE}(?![\w:-])"
)
_WORD = "[0-9A-Fa-f]{4}"
_CISCO = rf"(?<![\w.])(?=[0-9.]{{0,13}}[a-fA-F])(?=[a-fA-F.]{{0,13}}\d){_WORD}\.{_WORD}\.{_WORD}(?![\w.])"


def ipv4(text: str, start: int, end: int) -> Iterable[Hit]:
    """Four numbers up to 255; the anchor begins at the last digit of the first."""
    window = text[max(0, start - 2) : start + 1]
    found = _IPV4.match(text, start + 1 - len(window) + len(window.rstrip("0123456789")))
    if found is None or not _is_somebody(found[0]):
        return ()
    if _VERSION.search(text, max(0, found.start() - 12), found.start()):
        return ()
    return (Hit(*found.span(), "ip-address"),)


def _is_somebody(value: str) -> bool:
    numbers = [int(part) for part in value.split(".")]
    reserved = numbers[0] in (0, 127) or numbers[0] >= 224 or numbers[:2] == [169, 254]
    return value not in _NOBODY and not reserved and numbers[3] != 0 and max(numbers) >= 10


def ipv6(text: str) -> Iterator[Hit]:
    """Groups of hex by colons, in the ranges that name machines."""
    seen = 0
    for colon in _COLON.finditer(text):
        if colon.start() < seen:
            continue
        window = text[max(0, colon.start() - 4) : colon.start()]
        found = _IPV6.match(text, colon.start() - len(window) + len(window.rstrip(_HEX)))
        if found is not None:
            seen = found.end()
            if _is_host(found[0].partition("%")[0]):
                yield Hit(*found.span(), "ip-address")


def _is_host(value: str) -> bool:
    """Whether it is the IPv6 address of some machine, and not a time or the words of a program joined by colons."""
    if value.count(":") < 3 or value.endswith(":") or not any(c.isdigit() for c in value):
        return False
    try:
        ipaddress.IPv6Address(value)
    except ValueError:
        return False
    return value.lower().startswith(_GLOBAL)


FORMS: Anchored = tuple((form, ipv4) for form in ("0.0.0", "0.00.0", "0.000.0"))
COARSE_FORMS: Anchored = (
    *((form, at_anchor("mac-address", _MAC)) for form in (":".join(["aa"] * 6), "-".join(["aa"] * 6))),
    ("aaaa.aaaa.aaaa", at_anchor("mac-address", _CISCO)),
)
SWEEPS: tuple[Sweep, ...] = (ipv6,)

"""Makers of secrets that have a form of their own: tokens of several parts, key files, passwords that people choose."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping

from .corpus import Maker, Rng
from .makers_numbers import NUMBERS


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).decode().rstrip("=")


def jwt(rng: Rng) -> str:
    claims = {"sub": rng.of("digits", 8), "name": rng.word(), "iat": rng.randint(10**9, 2 * 10**9)}
    return f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(claims)}.{rng.of('url', 43)}"


def service_token(rng: Rng) -> str:
    claims = {"iss": "kubernetes/serviceaccount", "ns": rng.word(), "exp": rng.randint(1, 10**9)}
    return f"{_part({'alg': 'RS256', 'kid': rng.of('alnum', 12)})}.{_part(claims)}.{rng.of('url', 342)}"


def jwe(rng: Rng) -> str:
    head = _part({"alg": "dir", "enc": "A256GCM"})
    return f"{head}..{rng.of('url', 16)}.{rng.of('url', 180)}.{rng.of('url', 22)}"


def _lines(rng: Rng, low: int, high: int) -> list[str]:
    return [rng.of("base64", 64) for _ in range(rng.randint(low, high))]


def pem(rng: Rng) -> str:
    kind = rng.choice(("RSA ", "EC ", "", "OPENSSH "))
    body = "\n".join([*_lines(rng, 4, 12), rng.of("base64", 30) + "=="])
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"


def pgp(rng: Rng) -> str:
    body = "\n".join(_lines(rng, 5, 15))
    start = "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n"
    return f"{start}{body}\n={rng.of('base64', 4)}\n-----END PGP PRIVATE KEY BLOCK-----"


def pkcs8(rng: Rng) -> str:
    """With its line breaks escaped, as a service account's JSON has it."""
    body = "\\n".join(_lines(rng, 6, 20))
    return f"-----BEGIN PRIVATE KEY-----\\nMIIEvQ{body}\\n-----END PRIVATE KEY-----\\n"


def kube_key(rng: Rng) -> str:
    body = "\n".join(_lines(rng, 8, 8))
    return base64.b64encode(f"-----BEGIN EC PRIVATE KEY-----\n{body}\n-----END EC PRIVATE KEY-----\n".encode()).decode()


def wif(rng: Rng) -> str:
    """A Bitcoin key in base 58 with its checksum."""
    body = b"\x80" + rng.randbytes(32) + b"\x01"
    number = int.from_bytes(body + hashlib.sha256(hashlib.sha256(body).digest()).digest()[:4], "big")
    text = ""
    while number:
        number, rest = divmod(number, 58)
        text = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[rest] + text
    return text


def password(rng: Rng) -> str:
    word = rng.word()
    return rng.choice(
        (
            f"{word.title()}{rng.randint(10, 9999)}{rng.choice('!#$?*')}",
            f"{word}{rng.randint(1, 999)}",
            f"{rng.word()}-{word}-{rng.randint(2, 99)}",
            rng.of("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789!#%+-_?", rng.randint(9, 20)) + "7a",
            f"{word[:3]}{rng.choice('@$!')}{rng.word()}{rng.randint(0, 9)}",
        )
    )


def human(rng: Rng) -> str:
    word, year = rng.word(), rng.randint(1960, 2026)
    return rng.choice(
        (
            f"{word.capitalize()}{year}!",
            f"{word.translate(str.maketrans('aeos', '@305'))}{rng.randint(1, 9)}",
            f"{word}_{rng.word()}{year % 100}",
            rng.of("alnum", 12),
            f"{rng.of('alnum', 6)}&{rng.of('alnum', 6)}",
            f"i<3{word}s{year % 100}",
        )
    )


def chosen(rng: Rng) -> str:
    one, two = rng.sample(rng.words, 2)
    return rng.choice(
        (
            f"{one}{rng.choice('.!_-')}{two}{rng.randint(0, 99)}",
            f"{one.title()}{two.title()}{rng.randint(1, 9999)}",
            f"{rng.randint(1950, 2020)}{one}{rng.choice('!?#')}",
            one.replace("e", "3").replace("a", "4").replace("o", "0") + rng.of("digits", 2),
            rng.of("alnum", 10) + rng.choice("!$%^*+=~"),
            rng.of("lower", 14),
        )
    )


def url_login(rng: Rng) -> str:
    """A password that may stand in a URL as it is."""
    return "".join(c for c in chosen(rng) if c not in "#?%^&<>/:@")


def basic(rng: Rng) -> str:
    return base64.b64encode(f"{rng.word()}:{password(rng)}".encode()).decode()


KEYS: Mapping[str, Maker] = {
    "jwt": jwt,
    "token": service_token,
    "jwe": jwe,
    "pem": pem,
    "pgp": pgp,
    "pkcs8": pkcs8,
    "kube_key": kube_key,
    "wif": wif,
    "password": password,
    "human": human,
    "chosen": chosen,
    "url_login": url_login,
    "basic": basic,
    "groups": lambda rng: "-".join(rng.of("upper", 5) for _ in range(5)),
    "four_groups": lambda rng: "-".join(rng.of("abcdefghijklmnopqrstuvwxyz", 4) for _ in range(4)),
    "twelve_words": lambda rng: " ".join(rng.sample(rng.words, 12)),
    "many_words": lambda rng: " ".join(rng.word() for _ in range(24)),
}
MAKERS: Mapping[str, Maker] = {**KEYS, **NUMBERS}

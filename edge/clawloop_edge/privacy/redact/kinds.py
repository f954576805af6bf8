"""The kinds of what is found, in plain words; and which of them are secrets rather than personal data."""

from __future__ import annotations

from collections.abc import Mapping

SECRETS: Mapping[str, str] = {
    "password": "passwords behind their names, in sentences, on command lines",
    "secret": "keys and tokens behind their names, or random words near a key word",
    "private-key": "private key blocks (PEM, OpenSSH, PGP, PuTTY)",
    "jwt": "JSON Web Tokens",
    "auth-header": "what an Authorization header holds",
    "cookie": "values of cookies",
    "url-credentials": "passwords and tokens in URLs",
    "webhook-url": "URLs to which whoever knows them can post",
    "password-hash": "hashes of passwords (bcrypt, Argon2, crypt, LDAP)",
    "seed-phrase": "the words of a wallet",
    "code": "PINs, door codes, one-time and backup codes",
    "known-secret": "values of this machine's credential files and environment",
}
PERSONAL: Mapping[str, str] = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "address": "street addresses and UK postcodes",
    "coordinates": "places by latitude and longitude",
    "birth-date": "dates of birth, behind a word that says so",
    "ip-address": "addresses of machines, IPv4 and IPv6",
    "mac-address": "hardware addresses",
    "card": "payment cards and their codes",
    "iban": "bank accounts by IBAN",
    "account": "bank accounts, routing numbers and sort codes behind their names",
    "ssn": "US social security numbers",
    "national-id": "identity and tax numbers of some 25 countries",
    "passport": "passport numbers behind their name",
    "licence": "driving licences behind their name",
    "plate": "number plates behind their name",
    "vehicle": "vehicle identification numbers behind their name",
    "device": "IMEIs and serial numbers",
    "record": "numbers of patients, members and policies behind their names",
    "user-name": "the user in the path of a home folder, and this machine's user",
    "person": "the owner's name, as git and the system know it",
    "host-name": "this machine's name",
    "own-word": "words that you listed",
}


def key_kinds() -> dict[str, str]:
    """The kinds of the services whose keys are known, with what they mean."""
    from clawloop_edge.privacy.redact import providers, shapes

    issued = {prefix.kind for candidates in providers.prefixes().values() for prefix in candidates}
    return {kind: f"keys of {kind.removesuffix('-key')}" for kind in sorted(issued | shapes.KEY_KINDS)}


def is_secret(kind: str) -> bool:
    """Whether a kind opens something, rather than says something about a person."""
    return kind in SECRETS or kind.endswith("-key")

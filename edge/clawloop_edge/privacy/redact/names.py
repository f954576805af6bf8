"""What a name promises: whether `db_password`, `apiKey` or `max_tokens` names a secret. Knows names only, no values."""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache

from clawloop_edge.privacy.redact.vocabulary import words

_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LETTERS = re.compile(r"[^\W\d_]+")


class Promise(IntEnum):
    """How surely what stands behind a name is a secret; the less, the more its value must look like one."""

    NONE = 0
    """nothing secret: `max_tokens`, `public_key`, `password_file`"""
    KEY = 1
    """perhaps: `key`, `auth`"""
    SECRET = 2
    """a credential that machines make: `api_key`, `token`"""
    PASSWORD = 3
    """a credential that people make, which may be an ordinary word"""


_GLUED = ("password", "passwd", "passphrase", "passcode", "apikey", "secretkey", "accesskey", "privatekey", "secret")
_GLUED_TOKENS = ("authtoken", "accesstoken", "apitoken", "bottoken", "bearertoken", "refreshtoken", "usertoken")
_ANYWHERE = frozenset(("public", "pub", "max", "min", "num", "total", "count", "eos", "bos", "pad"))


@lru_cache(maxsize=16_384)
def promise(name: str) -> Promise:
    """What a name as it stands in code, a file or a sentence promises of its value."""
    shape = _PARTS if name.isascii() else _LETTERS
    parts = [part.lower() for part in shape.findall(name)]
    while parts and parts[-1].isdigit():
        parts.pop()
    if not parts or parts[-1] in words("not_secret_last"):
        return Promise.KEY if parts[-2:] in (["session", "id"], ["app", "id"]) else Promise.NONE
    before = parts[:-1]
    if parts[-1] not in words("passwords") and (
        _ANYWHERE.intersection(before) or words("not_secret_first").intersection(before[-1:])
    ):
        return Promise.NONE
    return _of_last(parts)


def _of_last(parts: list[str]) -> Promise:
    last, before = parts[-1], parts[-2] if len(parts) > 1 else ""
    if last in words("passwords"):
        return Promise.PASSWORD
    if last in words("secrets") or (last in ("key", "keys") and before in words("key_owners")):
        return Promise.SECRET
    if last.endswith(_GLUED):
        return Promise.SECRET if last.endswith(("key", "secret")) else Promise.PASSWORD
    if last.endswith(_GLUED_TOKENS) or (last in ("base", "string") and before == "key"):
        return Promise.SECRET
    if last == "phrase" and before in ("seed", "recovery", "pass"):
        return Promise.PASSWORD
    if last in ("string", "value", "plain", "data", "salt") and len(parts) > 1:
        return _of_last(parts[:-1])
    return Promise.KEY if last in words("keys") else Promise.NONE

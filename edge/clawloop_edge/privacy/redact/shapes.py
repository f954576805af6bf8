"""Secrets that their own shape tells: private keys, JWTs, hashes of passwords, seed phrases, keys without a prefix.

Each rule is called for one place where its anchor stands, and looks around it in a bounded window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from clawloop_edge.privacy.redact.plausible import is_random
from clawloop_edge.privacy.redact.rules import Anchored, Sweep, around, at_anchor, sweep
from clawloop_edge.privacy.redact.spans import Hit

_MAX_KEY_BLOCK = 16_384
_BLOCK = re.compile(r"-{4,5} ?BEGIN [A-Z0-9 ]{0,40}(?:PRIVATE KEY|ENCRYPTED DATA)[A-Z ]{0,12} ?-{4,5}")
_BLOCK_END = re.compile(r"-{4,5} ?END [A-Z0-9 ]{0,60}-{4,5}")
_BLOCK_BODY = re.compile(r"[\sA-Za-z0-9+/=:,\\]{32,16384}")
_PUTTY = r"Private-Lines: \d{1,3}\s{1,4}(?:[A-Za-z0-9+/=]{1,80}\s{1,4}){1,200}"
_OPENSSH = r"[A-Za-z0-9+/=\s\\]{60,16384}"
_JWT = r"eyJ[A-Za-z0-9_=-]{8,4096}\.[A-Za-z0-9_=-]{0,8192}\.[A-Za-z0-9_=-]{8,8192}(?:\.[A-Za-z0-9_=-]{0,8192}){0,2}"
_HASH = (
    r"\$2[abxy]\$\d\d\$[./A-Za-z0-9]{53}|\$argon2(?:id|i|d)\$[\w=,$+/.-]{30,200}"
    r"|\$(?:[156y]|apr1)\$[\w=,./$]{8,40}?\$[./A-Za-z0-9]{20,90}|\$scrypt\$[\w=,$+/.-]{30,200}"
    r"|\$pbkdf2[\w-]{0,12}\$[\w=,$+/.-]{30,200}|\{(?:s?sha\d{0,3}|smd5|crypt|pbkdf2[\w-]{0,12})\}[\w+/=.$]{16,200}"
)
_HASH_MARKS = (
    "$2", "$argon2", "$1$", "$5$", "$6$", "$y$", "$apr1$", "$scrypt$", "$pbkdf2", "{ssha", "{sha", "{smd5}", "{crypt}",
)  # fmt: skip
_SEED = (
    r"(?:seed|recovery|mnemonic|backup|wallet)[ _-]{0,2}(?:phrase|words|seed|mnemonic)?\\*[\"']?"
    r"(?:[ ](?:for|of)[ ][\w ]{1,20})?(?:[ ]{0,2}[:=]|[ ](?:is|are)\b)\s{0,4}\\*[\"'`]?"
    r"(?P<value>(?:(?!the |and )[a-z]{3,10}[ ,]{1,2}){11,23}[a-z]{3,10})\b"
)
_CODE_WORDS = (
    r"(?:verification|security|access|confirmation|door|gate|alarm|auth|entry|unlock|2fa|mfa|sms|login|pairing|lockbox"
    r"|safe|authenticat\w{1,6})[ -]?(?:code|pin)"
)
_CODE = re.compile(
    rf"\b(?:pin|passcode|otp|one[- ]?time[ -](?:pass)?code|{_CODE_WORDS}|tan|puk)(?:[ -]?(?:code|number))?"
    r"(?:[ ]+(?:for|to|of|at|on)(?:[ ]+[\w']{1,20}){1,4}?)?\\*[\"']?[ ]{0,2}(?:is|:|=|was|ist|→|-|lautet)?"
    r"[ ]{0,3}(?:now |still )?\\*[\"'*`]{0,3}(?P<code>[#*]?\d(?:[ -]?\d){3,7}[#*]?)(?!\w|[.-]\d|:\d)",
    re.IGNORECASE,
)
_BACKUP = (
    r"(?:backup|recovery|scratch|emergency)[ -]codes?\\*[\"']?(?:[ ](?:is|are))?[ ]?[:=-]?\s{0,4}\\*[\"'`*]{0,3}"
    r"(?P<value>[a-z0-9]{4,8}(?:-[a-z0-9]{4,8}){0,3}(?:[ ,\n]{1,3}[a-z0-9]{4,8}(?:-[a-z0-9]{4,8}){1,3}){0,15})(?![\w-])"
)
_FOUR_DIGITS = re.compile(r"\d(?:[ -]?\d){3}")
_AWS_SECRET = re.compile(r"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=])")
_SHA1 = re.compile(r"[0-9a-f]{40}")


def key_block(text: str, start: int, end: int) -> Iterable[Hit]:
    """A private key between its BEGIN and END lines; cut off at the end of what can be base64 if END is missing."""
    begin = _BLOCK.match(text, start)
    if begin is None:
        return ()
    end_line = text.find("END ", begin.end(), begin.end() + _MAX_KEY_BLOCK)
    closed = _BLOCK_END.search(text, end_line - 6, end_line + 80) if end_line > 0 else None
    last = closed or _BLOCK_BODY.match(text, begin.end())
    return (Hit(start, last.end(), "private-key"),) if last else ()


def code(text: str, start: int, end: int) -> Iterable[Hit]:
    """ "the door code is 4821#", "PIN: 0427"."""
    if _FOUR_DIGITS.search(text, end, end + 80) is None:
        return ()
    for found in _CODE.finditer(text, max(0, start - 16), min(len(text), end + 96)):
        if found.start() <= start < found.end():
            return (Hit(*found.span("code"), "code"),)
    return ()


def backup_code(text: str, start: int, end: int) -> Iterable[Hit]:
    """Codes for the day that the phone is lost: `dt9zq-tt545`."""
    found = _backup.match(text, start)
    return (Hit(*found.span("value"), "code"),) if found and any(c.isdigit() for c in found["value"]) else ()


def aws_secret(text: str, start: int, end: int) -> Iterable[Hit]:
    """The secret that stands near an AWS access key id: 40 characters of base64."""
    for found in _AWS_SECRET.finditer(text, end, min(len(text), end + 300)):
        if is_random(found[0]) and not _SHA1.fullmatch(found[0]):
            yield Hit(*found.span(), "aws-key", by_context=True)


_backup = re.compile(_BACKUP, re.IGNORECASE)
_seed = at_anchor("seed-phrase", _SEED, group="value", flags=re.IGNORECASE, by_context=True)
_hash = at_anchor("password-hash", _HASH, flags=re.IGNORECASE)
KEY_KINDS = frozenset(
    (
        "azure-key",
        "mailchimp-key",
        "maxmind-key",
        "terraform-key",
        "openai-key",
        "telegram-key",
        "discord-key",
        "twilio-key",
    )
)
"""kinds of keys that have no prefix"""
_WITHIN = (
    ("q~", around("azure-key", r"(?<![\w~.-])[\w~.]{3}\dQ~[\w~.-]{31,34}(?![\w~.-])", back=4)),
    ("-us", around("mailchimp-key", r"(?<![0-9A-Za-z])[0-9a-f]{32}-us\d{1,2}(?!\w)", back=32)),
    ("_mmk", around("maxmind-key", r"(?<![0-9A-Za-z_])[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk(?!\w)", back=36)),
    (".atlasv1.", around("terraform-key", r"(?<![0-9A-Za-z])[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{50,90}", back=14)),
    ("t3blbkfj", around("openai-key", r"(?<![0-9A-Za-z])sk-[\w-]{10,160}T3BlbkFJ[\w-]{10,160}", back=164)),
)
ANCHORED: Anchored = (
    ("-----begin ", key_block),
    ("---- begin ", key_block),
    ("private-lines: ", at_anchor("private-key", _PUTTY)),
    ("b3blbnnzac1rzxkt", at_anchor("private-key", _OPENSSH)),
    ("eyj", at_anchor("jwt", _JWT)),
    ("akia", aws_secret),
    ("asia", aws_secret),
    *((mark, _hash) for mark in _HASH_MARKS),
    *((word, _seed) for word in ("seed", "recovery", "mnemonic", "backup phrase", "wallet")),
    *((word, code) for word in ("pin", "passcode", "otp", "code", "tan", "puk")),
    *((f"{word} code", backup_code) for word in ("backup", "recovery", "scratch", "emergency")),
    *_WITHIN,
)
FORMS: Anchored = (("00000000:", around("telegram-key", r"(?<![\w-])\d{8,10}:[A-Za-z0-9_-]{35}(?![\w-])", back=2)),)
SWEEPS: tuple[Sweep, ...] = (
    sweep("discord-key", r"[MNO](?<![\w-].)[A-Za-z0-9]{22,27}\.[\w-]{6}\.[\w-]{27,40}(?![\w-])"),
    sweep("twilio-key", r"[SA](?<![A-Za-z0-9].)[KC][0-9a-f]{32}(?![A-Za-z0-9])"),
)

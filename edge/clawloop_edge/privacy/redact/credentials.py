"""Secrets that the syntax around them tells: headers, cookies, URLs with credentials, command lines, webhooks.

Each rule is called for one place where its anchor stands, and looks around it in a bounded window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from clawloop_edge.privacy.redact.plausible import (
    is_encoded_pair,
    is_made_of_words,
    is_password,
    is_placeholder,
    is_random,
)
from clawloop_edge.privacy.redact.rules import Anchored, Rule
from clawloop_edge.privacy.redact.spans import Hit

_SCHEME = re.compile(
    r"(?:bearer|basic|token|digest|negotiate|apikey|api-key|aws4-hmac-sha256|ntlm|bot|key)[ \t:=]{1,3}"
    r"\\*[\"']?(?P<value>[A-Za-z0-9._~+/=:-]{8,4096})",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(
    r"authorization\\*[\"']?\]?[ \t]{0,4}[:=,][ \t]{0,4}\\*[\"']?(?:[fbru](?=\\*[\"']))?\\*[\"']?", re.IGNORECASE
)
_VALUE = re.compile(r"(?P<value>[^\s\"'\\,;<>{}$`]{8,4096})")
_COOKIES = re.compile(
    r"(?:set-)?cookie\\*[\"']?[ \t]{0,2}[:=][ \t]{0,2}\\*[\"']?(?P<pairs>[^\r\n\"'\\]{1,4096})", re.IGNORECASE
)
_COOKIE_FLAG = re.compile(r"(?:-b|--cookie)[ =]{1,3}[\"']?(?P<pairs>[^\r\n\"'\\]{1,4096})")
_MAX_COOKIES = 40
_COOKIE_RULES = frozenset(
    ("expires", "path", "domain", "max-age", "samesite", "secure", "httponly", "priority", "partitioned", "version")
)
_AUTHORITY = re.compile(
    r"(?P<user>[^\s:/?#\"'<>\\`(){}|]{0,128})(?::(?!\d{1,5}/)(?P<password>[^\s\"'<>\\`]{1,256}?))?@(?=[\w\[%$-])"
)
_LAST_AT = re.compile(r"@[^\s/\"'<>\\`@,;]{1,64}@(?=[\w.-]{1,100}(?:[:/\s\"']|\Z))")
_WEBHOOK = re.compile(
    r"(?:hooks\.slack\.com/(?:services|workflows|triggers)/(?P<slack>[A-Za-z0-9/+_-]{20,120})"
    r"|discord(?:app)?\.com/api/(?:v\d{1,2}/)?webhooks/(?P<discord>\d{15,22}/[\w-]{40,100})"
    r"|(?:webhook\.office\.com/webhookb2|outlook\.office\.com/webhook)/(?P<teams>[\w@/-]{60,400})"
    r"|hooks\.zapier\.com/hooks/catch/(?P<zapier>[\w/]{8,60})"
    r"|chat\.googleapis\.com/v1/spaces/(?P<google>[\w/?=&%-]{30,300})"
    r"|api\.telegram\.org/(?:file/)?bot(?P<telegram>\d{6,14}:[\w-]{30,50}))",
    re.IGNORECASE,
)
_WEBHOOK_HOSTS = (
    "hooks.slack.com/", "discord.com/api/", "discordapp.com/api/", "webhook.office.com/", "outlook.office.com/",
    "hooks.zapier.com/", "chat.googleapis.com/", "api.telegram.org/",
)  # fmt: skip
_USER_FLAG = re.compile(
    r"(?<!\S)(?:-u|--user|--proxy-user|-U|--auth|-a)[ =]{0,3}[\"']?(?P<pair>[^\s:\"']{1,64}:[^\s\"'@]{3,128})"
)
_PASSWORD_FLAG = re.compile(
    r"(?:sshpass[ ]{1,4}-p[ ]?|mysql(?:dump|admin)?\b[^\n|;]{0,80}?[ ]-p)[\"']?(?P<value>[^\s\"'-][^\s\"']{2,128})"
)
_IDENTIFIED = re.compile(
    r"identified (?:with \w{1,40} )?by[ ]{1,4}(?:password )?(?P<quote>[\"'])(?P<value>[^\"'\n]{3,128})(?P=quote)",
    re.IGNORECASE,
)
_WIFI = re.compile(r"WIFI:[^\n]{0,80}?;P:(?P<value>[^;\n]{4,64}(?<!\\));")
_PAIR = re.compile(
    r"(?:credentials?|creds|login|logins|log in|sign in|signin|zugangsdaten)\b"
    r"(?:[ ](?:is|are|for|with|as|to|the|using)){0,3}(?:[ ][\w.-]{1,30}){0,3}?[ ]?[:=-]?[ ]?(?P<user>[\w.@+-]{2,64})"
    r"(?:[ ]?/[ ]?|:(?=\S)|[ ]?\|[ ]?|[ ](?:and|und|with password|password)[ ])[`\"']?(?P<password>[^\s`\"']{5,64})",
    re.IGNORECASE,
)


def bearer(text: str, start: int, end: int) -> Iterable[Hit]:
    """`Bearer …`, wherever it stands."""
    return _scheme(text, _SCHEME.match(text, start))


def authorization(text: str, start: int, end: int) -> Iterable[Hit]:
    """What an Authorization header holds, whatever its scheme."""
    header = _AUTHORIZATION.match(text, start)
    if header is None:
        return ()
    return _scheme(text, _SCHEME.match(text, header.end()) or _VALUE.match(text, header.end()))


def _scheme(text: str, found: re.Match[str] | None) -> Iterable[Hit]:
    if found is None:
        return ()
    value = found["value"].rstrip(".:")
    if is_placeholder(value) or (is_made_of_words(value) and not is_encoded_pair(value)):
        return ()
    return (Hit(found.start("value"), found.start("value") + len(value), "auth-header", by_context=True),)


def cookies(text: str, start: int, end: int) -> Iterable[Hit]:
    """The values of a Cookie or Set-Cookie header."""
    yield from _cookies(_COOKIES.match(text, start))


def _cookies(header: re.Match[str] | None) -> Iterable[Hit]:
    if header is None:
        return
    at = header.start("pairs")
    for pair in header["pairs"].split(";", _MAX_COOKIES)[:_MAX_COOKIES]:
        name, _, value = pair.partition("=")
        value = value.split(" ", 1)[0]
        if name.strip().lower() not in _COOKIE_RULES and _is_session(value):
            start = at + len(name) + 1
            yield Hit(start, start + len(value), "cookie", by_context=True)
        at += len(pair) + 1


def _is_session(value: str) -> bool:
    if not 6 <= len(value) <= 4_096 or is_placeholder(value):
        return False
    return is_random(value) or (len(value) >= 8 and not is_made_of_words(value))


def url_credentials(text: str, start: int, end: int) -> Iterable[Hit]:
    """`scheme://user:password@host`, also without a user, and a token in the user's place."""
    found = _AUTHORITY.match(text, end)
    if found is None:
        return ()
    user = found["user"]
    if is_random(user):
        return (Hit(end, found.end("user"), "url-credentials", by_context=True),)
    if found["password"] is None:
        return ()
    later = _LAST_AT.match(text, found.end() - 1)  # an unescaped @ may stand in a password
    at_end = later.end() - 1 if later else found.end() - 1
    password = text[found.start("password") : at_end]
    if is_placeholder(password) and (not password.isalpha() or password.lower().startswith(("pass", "pwd"))):
        return ()
    return (Hit(found.start("password"), at_end, "url-credentials", by_context=True),)


def webhook(text: str, start: int, end: int) -> Iterable[Hit]:
    """URLs to which whoever knows them can post."""
    found = _WEBHOOK.match(text, start)
    if found is None or found.lastgroup is None:
        return ()
    return (Hit(*found.span(found.lastgroup), "webhook-url"),)


def command(text: str, start: int, end: int) -> Iterable[Hit]:
    """`curl -u user:password`, `http --auth …`, `curl -b name=value`."""
    line_end = text.find("\n", end, end + 400)
    line_end = line_end if line_end >= 0 else min(len(text), end + 400)
    found = _USER_FLAG.search(text, end, line_end)
    if found is not None and not is_placeholder(found["pair"].partition(":")[2]):
        yield Hit(*found.span("pair"), "password")
    yield from _cookies(_COOKIE_FLAG.search(text, end, line_end))


def _value_of(shape: re.Pattern[str]) -> Rule:
    """A rule for a password in the group `value` of a shape that begins with its anchor."""

    def rule(text: str, start: int, end: int) -> Iterable[Hit]:
        found = shape.match(text, start)
        if found is None or is_placeholder(found["value"]):
            return ()
        return (Hit(*found.span("value"), "password", by_context=True),)

    return rule


def login_pair(text: str, start: int, end: int) -> Iterable[Hit]:
    """ "the login is jane / Tr0ub4dor"."""
    found = _PAIR.match(text, start)
    if found is None:
        return ()
    password = found["password"].rstrip(".,;:!?)")
    if not is_password(password) or password.count("/") > 1:
        return ()
    at = found.start("password")
    return (Hit(at, at + len(password), "password", by_context=True),)


ANCHORED: Anchored = (
    ("bearer", bearer),
    ("authorization", authorization),
    ("cookie", cookies),
    ("://", url_credentials),
    *((host, webhook) for host in _WEBHOOK_HOSTS),
    *((program, command) for program in ("curl", "wget", "http ", "https ")),
    ("sshpass", _value_of(_PASSWORD_FLAG)),
    ("mysql", _value_of(_PASSWORD_FLAG)),
    ("identified ", _value_of(_IDENTIFIED)),
    ("wifi:", _value_of(_WIFI)),
    *((word, login_pair) for word in ("credential", "creds", "login", "log in", "sign in", "zugangsdaten")),
)

"""What this machine holds that no shape tells: values of its credential files and environment, its owner's names.

They are read when a detector is made, stay in its memory, and are written nowhere. Only values that say enough are
taken: a password `postgres`, a user `root` or a host `localhost` would black out half of every text.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clawloop_edge.privacy.redact.kinds import is_secret
from clawloop_edge.privacy.redact.names import Promise, promise
from clawloop_edge.privacy.redact.patterns import Patterns
from clawloop_edge.privacy.redact.plausible import is_made_of_words, is_placeholder, is_random
from clawloop_edge.privacy.redact.values import Value, lowered
from clawloop_edge.privacy.redact.vocabulary import words

MAX_FILE_BYTES, MAX_FILES, MAX_VALUES = 256 * 1024, 64, 2_000
_SECRET_LENGTH = range(8, 4_097)
_FILES = (
    ".aws/credentials", ".aws/config", ".netrc", ".config/gh/hosts.yml", ".config/hub", ".npmrc", ".pypirc", ".pgpass",
    ".my.cnf", ".git-credentials", ".docker/config.json", ".kube/config", ".cargo/credentials.toml", ".env", ".env.*",
    "*.env",
)  # fmt: skip
_TOKEN_FILES = (".cache/huggingface/token", ".huggingface/token", ".config/openai/token", ".vault-token")
_OPENCLAW_FILES = (".env", "credentials/*.json", "agents/*/agent/*.json")
_ASSIGNED = re.compile(
    r"(?:^[ \t]*(?:export[ \t]+|//[^\s:]{1,80}/:)?|[{,][ \t]*)[\"']?(?P<name>[\w.-]{2,80})[\"']?[ \t]*[=:][ \t]*[\"']?"
    r"(?P<value>[^\s\"',]{4,4096})",
    re.MULTILINE,
)
_GIT_USER = re.compile(r"^\s*(?P<what>name|email)\s*=\s*\"?(?P<value>[^\"\n]{3,120})", re.MULTILINE)


@dataclass(frozen=True)
class Machine:
    """Where a machine's values are to be found."""

    home: Path
    environment: Mapping[str, str]
    user: str
    full_name: str
    host: str
    token_files: Sequence[Path] = ()
    """files whose whole content is a secret"""


def this_machine(token_files: Sequence[Path] = ()) -> Machine:
    """The machine that this runs on, as its user sees it."""
    user, full_name = os.environ.get("USER", ""), ""
    with contextlib.suppress(KeyError):  # a container's user may have no entry
        entry = pwd.getpwuid(os.getuid())
        user, full_name = entry.pw_name, entry.pw_gecos.partition(",")[0]
    return Machine(Path.home(), os.environ, user, full_name, socket.gethostname(), tuple(token_files))


def known_values(machine: Machine, patterns: Patterns) -> list[Value]:
    """The values to look for, `MAX_VALUES` at most. What cannot be read is left out: no agent can read it either."""
    settings = "\n".join(f"{name}={value}" for name, value in machine.environment.items())
    texts = [settings, *_texts(machine.home, _FILES), *_texts(_openclaw(machine), _OPENCLAW_FILES)]
    texts += _read(_openclaw_config(machine))
    found = {value: Value(value, "known-secret", whole=len(value) < 16) for value in _secrets(texts, patterns)}
    for path in (*machine.token_files, *(machine.home / name for name in _TOKEN_FILES)):
        found |= {text: Value(text, "known-secret") for text in map(str.strip, _read(path)) if _says_enough(text)}
    found |= {value.text: value for value in _names(machine)}
    return list(found.values())[:MAX_VALUES]


def _openclaw(machine: Machine) -> Path:
    return Path(machine.environment.get("OPENCLAW_STATE_DIR") or machine.home / ".openclaw").expanduser()


def _openclaw_config(machine: Machine) -> Path:
    named = machine.environment.get("OPENCLAW_CONFIG_PATH")
    return Path(named).expanduser() if named else _openclaw(machine) / "openclaw.json"


def _texts(folder: Path, names: Iterable[str]) -> list[str]:
    with contextlib.suppress(OSError):
        paths = [path for name in names for path in sorted(folder.glob(name))]
        return [text for path in paths[:MAX_FILES] for text in _read(path)]
    return []


def _read(path: Path) -> Iterator[str]:
    """The file's text, if it is a readable file of a size that settings have."""
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            yield path.read_text(encoding="utf-8", errors="replace")


def _secrets(texts: Iterable[str], patterns: Patterns) -> Iterator[str]:
    """What settings hold behind secret names, and what the pack finds in them by itself."""
    for text in texts:
        for found in _ASSIGNED.finditer(text):
            promised, value = promise(found["name"]), found["value"]
            if promised is not Promise.NONE and _says_enough(value):
                yield from [value] if promised is not Promise.KEY or is_random(value) else []
        for hit in patterns.hits(text, lowered(text)):
            if is_secret(hit.kind):
                yield from filter(_says_enough, text[hit.start : hit.end].splitlines())


def _says_enough(value: str) -> bool:
    """Whether a secret can be looked for everywhere: long enough, and neither a word nor a number."""
    if len(value) not in _SECRET_LENGTH or is_placeholder(value) or value.isdigit():
        return False
    return not value.isalpha() or is_random(value) or not is_made_of_words(value)


def _names(machine: Machine) -> Iterator[Value]:
    """How the owner and the machine are called."""
    people = [machine.full_name]
    for text in _texts(machine.home, (".gitconfig", ".config/git/config")):
        for found in _GIT_USER.finditer(text):
            people += [found["value"].strip()] if found["what"] == "name" else []
            yield from [Value(found["value"].strip(), "email", any_case=True)] if found["what"] == "email" else []
    for text in _texts(machine.home, (".ssh/*.pub",)):
        comment = text.strip().split(" ", 2)[2:]
        if comment and "@" in comment[0] and comment[0].partition("@")[0] not in words("generic_users"):
            yield Value(comment[0], "user-name", any_case=True)
    for name in people:
        yield from _person(name)
    if len(machine.user) >= 5 and machine.user.lower() not in words("generic_users"):
        yield Value(machine.user, "user-name", any_case=True)
    yield from _host(machine.host)


def _person(name: str) -> Iterator[Value]:
    """A full name in any case; its parts as names are written, unless they are words besides."""
    parts = name.split()
    if len(parts) > 1 and len(name) >= 6:
        yield Value(name, "person", any_case=True)
        for part in parts:
            if len(part) >= 4 and part.isalpha() and part.lower() not in words("names_that_are_words"):
                yield Value(part.capitalize() if part.islower() else part, "person")


def _host(host: str) -> Iterator[Value]:
    """The host's name, with and without its domain, if a person or a company gave it."""
    short = host.partition(".")[0]
    for name in dict.fromkeys((host, short)):
        telling = "." in name or "-" in name or any(c.isdigit() for c in name)
        if len(name) >= 5 and telling and short.lower() not in words("generic_hosts"):
            yield Value(name, "host-name", any_case=True)

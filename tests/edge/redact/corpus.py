"""A generated corpus: documents with planted secrets, and how much of them a search finds. No secret is anyone's.

What it is made of stands in parts/*.toml: kinds of secrets, lines that they stand in, and lines that hold nothing. The
pack was tuned until it found those of `TUNED`; `held` was written apart from it, and no pattern is chosen by what it
shows: whoever does so writes a new one. In a template `{alnum:20}` is drawn, `{v}` is the secret, `{ENV}`, `{snake}`,
`{camel}`, `{kebab}`, `{Pascal}` are its name as a program writes it, and `{spoken}` as a person says it.
"""

from __future__ import annotations

import base64
import json
import random
import re
import string
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from clawloop_edge.privacy.redact.spans import Span

FOLDER = Path(__file__).parent / "parts"
TUNED = ("common", "more", "abroad")
ALPHABETS = {
    "alnum": string.ascii_letters + string.digits,
    "base64": string.ascii_letters + string.digits + "+/",
    "digits": string.digits,
    "hex": "0123456789abcdef",
    "lower": string.ascii_lowercase + string.digits,
    "upper": string.ascii_uppercase + string.digits,
    "url": string.ascii_letters + string.digits + "_-",
}
_DRAWN = re.compile(
    rf"\{{({'|'.join(ALPHABETS)}|of|int|float|pick|bytes|uuid|call|word|Word|WORD|other|Other|OTHER)(?::([^{{}}]*))?\}}"
)


class Rng(random.Random):
    """Randomness with the words of one part of the corpus."""

    words: Sequence[str] = ()

    def of(self, alphabet: str, length: int) -> str:
        return "".join(self.choices(ALPHABETS.get(alphabet, alphabet), k=length))

    def word(self) -> str:
        return self.choice(self.words)


Maker = Callable[[Rng], str]


class Kind(NamedTuple):
    """A sort of secret: how it is made, how it is called, and lines that it stands in (`only_own`: in no others)."""

    name: str
    make: str
    snake: str = "api_key"
    spoken: str = ""
    lines: tuple[str, ...] = ()
    only_own: bool = False


class Planted(NamedTuple):
    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Document:
    text: str
    planted: Planted


@dataclass(frozen=True)
class Part:
    """One file of the corpus."""

    keys: Sequence[Kind]
    personal: Sequence[Kind]
    key_lines: Sequence[str]
    personal_lines: Sequence[str]
    fillers: Sequence[str]
    words: Sequence[str]

    @classmethod
    def load(cls, name: str) -> Part:
        table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
        keys, personal = (tuple(_kind(row) for row in table[group]) for group in ("key", "personal"))
        return cls(keys, personal, table["key_lines"], table["personal_lines"], table["fillers"], table["words"])


def _kind(row: Mapping[str, Any]) -> Kind:
    return Kind(**{**row, "lines": tuple(row.get("lines", ()))})


@dataclass
class Score:
    """What was found of what was planted."""

    planted: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    spans: int = 0
    right: int = 0
    missed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def recall(self, kinds: Iterable[Kind]) -> float:
        names = {kind.name for kind in kinds}
        planted = sum(count for name, count in self.planted.items() if name in names)
        return sum(count for name, count in self.found.items() if name in names) / max(1, planted)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.spans)

    def add(self, document: Document, spans: Sequence[Span]) -> None:
        """A planted value is found if 90 % of its characters are covered; a span is right if it touches one."""
        text, (start, end, kind) = document.text, document.planted
        covered = sum(max(0, min(end, span.end) - max(start, span.start)) for span in spans)
        self.planted[kind] += 1
        self.spans += len(spans)
        if covered >= 0.9 * (end - start):
            self.found[kind] += 1
        else:
            self.missed.append(f"{kind}: {text[max(0, start - 60) : end + 20]!r}")
        for span in spans:
            if span.start < end and start < span.end:
                self.right += 1
            else:
                around = text[max(0, span.start - 50) : span.end + 30]
                self.wrong.append(f"{span.kind}: {text[span.start : span.end]!r} in {around!r}")


def documents(part: Part, rng: Rng, *, rounds: int, makers: Mapping[str, Maker]) -> Iterable[Document]:
    """`rounds` documents for each kind: one planted value among lines that hold nothing, in some of the encodings."""
    rng.words = part.words
    for _ in range(rounds):
        for kinds, lines in ((part.keys, part.key_lines), (part.personal, part.personal_lines)):
            for kind in kinds:
                yield _document(part, kind, rng, lines=lines, makers=makers)


def _document(part: Part, kind: Kind, rng: Rng, *, lines: Sequence[str], makers: Mapping[str, Maker]) -> Document:
    def nothing() -> str:
        return "\n".join(_drawn(rng.choice(part.fillers), rng, makers) for _ in range(rng.randint(1, 3)))

    own = kind.lines and (kind.only_own or rng.random() < 0.5)
    head, _, tail = _named(rng.choice(kind.lines if own else lines), kind, rng).partition("{v}")
    head, value, tail = _encoded(head, _drawn(kind.make, rng, makers), tail, rng=rng)
    before = nothing() + "\n"
    start = len(before) + len(head)
    text = f"{before}{head}{value}{tail}\n{nothing()}"
    return Document(text, Planted(start, start + len(value), kind.name))


def _named(template: str, kind: Kind, rng: Rng) -> str:
    """The template with the kind's name in its forms, and with other words."""
    parts = kind.snake.split("_")
    spoken = kind.spoken or " ".join(parts)
    names = {
        "snake": kind.snake,
        "ENV": kind.snake.upper(),
        "kebab": "-".join(parts),
        "camel": parts[0] + "".join(part.title() for part in parts[1:]),
        "Pascal": "".join(part.title() for part in parts),
        "spoken": spoken,
        "Spoken": spoken.capitalize(),
        "host": f"{rng.word()}.{rng.choice(('io', 'dev', 'net'))}",
        "word": rng.word(),
        "n": str(rng.randint(2, 900)),
    }
    for name, text in names.items():
        template = template.replace("{" + name + "}", text)
    return template


def _drawn(template: str, rng: Rng, makers: Mapping[str, Maker]) -> str:
    """The template with all that is to be drawn."""
    word, other = rng.sample(rng.words, 2)
    fixed = {"word": word, "Word": word.title(), "WORD": word.upper()}
    fixed |= {"other": other, "Other": other.title(), "OTHER": other.upper()}

    def draw(found: re.Match[str]) -> str:
        what, given = found[1], found[2] or ""
        if what in fixed:
            return fixed[what][: int(given) + 1] if given else fixed[what]
        return makers[given](rng) if what == "call" else _piece(what, given, rng)

    return _DRAWN.sub(draw, template)


def _piece(what: str, given: str, rng: Rng) -> str:
    match what, given.split(":"):
        case "of", [alphabet, length]:
            return rng.of(alphabet, int(length))
        case "int", [low, high, *form]:
            return format(rng.randint(int(low), int(high)), {"2": "02", "3": "03", "x": "x"}[form[0]] if form else "")
        case "float", [low, high, digits]:
            return f"{rng.uniform(float(low), float(high)):.{digits}f}"
        case "pick", _:
            return rng.choice(given.split("|"))
        case "bytes", [length]:
            return base64.b64encode(rng.randbytes(int(length))).decode()
        case "uuid", _:
            return "-".join(rng.of("hex", length) for length in (8, 4, 4, 4, 12))
        case _:
            low, _, high = given.partition("-")
            return rng.of(what, rng.randint(int(low), int(high or low)))


def _encoded(head: str, value: str, tail: str, *, rng: Rng) -> tuple[str, str, str]:
    """Mostly as it is; sometimes JSON in JSON, URL-encoded, or base64."""
    draw = rng.random()
    if draw < 0.72:
        return head, value, tail
    if draw < 0.87:
        head, value, tail = (json.dumps(part)[1:-1] for part in (head, value, tail))
        return '{"type": "text", "text": "' + head, value, tail + '"}'
    if draw < 0.93:
        head, value, tail = (quote(part, safe="/:") for part in (head, value, tail))
        return "https://log.example.net/collect?msg=" + head, value, tail
    return "payload=", base64.b64encode((head + value + tail).encode()).decode(), ""

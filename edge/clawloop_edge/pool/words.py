"""What a search looks for: a text as words, a person's query, and where its words stand in a text. Pure.

A word is a run of letters and digits, compared without case and accents. Scripts that are written without spaces, and
Korean with its endings, count letter by letter, so that any part of a sentence is found. `snake_case`, paths and dotted
names are their parts in a row; `camelCase` is one word that its parts find too.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from clawloop_edge.errors import QueryError

MAX_QUERY_WORDS = 32
WORD_CHARS = 48
"""a longer word (a hash, a key, an encoded file) is known by its beginning"""
SNIPPET_CHARS = 160
_LEAD_CHARS = 40
_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3100-\u318f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana, Han and Hangul"""
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
"""signs that stand on or between letters of a word and are no letters to Python: accents, points, Indic vowels"""
_WORD = re.compile(f"[{_SINGLE}]|(?:(?![{_SINGLE}_])[\\w{_MARKS}])+")
_HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_CAMEL = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]?+[a-z0-9]*+[A-Z][A-Za-z0-9]*+")
_LONG = re.compile(rf"([a-z0-9]{{{WORD_CHARS}}})[a-z0-9]+")
_ITEM = re.compile(r'(-?)(?:"([^"]*)"?|(\S+))')
_BEGINNING = r"\1"
_ACCENTS = re.compile("[\u0300-\u036f]")


@dataclass(frozen=True)
class Word:
    """One word of a text: what it is compared as, and where it stands (character offsets)."""

    term: str
    start: int
    end: int


@dataclass(frozen=True)
class Phrase:
    """Words that stand in a row; the last may be a beginning."""

    terms: tuple[str, ...]
    prefix: bool = False


@dataclass(frozen=True)
class Query:
    """All of `wanted` and none of `unwanted`."""

    wanted: tuple[Phrase, ...]
    unwanted: tuple[Phrase, ...] = ()


def words(text: str) -> Iterator[Word]:
    """The words of a text in order."""
    for found in _WORD.finditer(text):
        yield Word(fold(found.group()), found.start(), found.end())


def fold(word: str) -> str:
    """A word as it is compared: no case, no accents, one form of each letter."""
    if word.isascii():
        return word.lower()[:WORD_CHARS]
    plain = _ACCENTS.sub("", unicodedata.normalize("NFKD", word.casefold()))
    return unicodedata.normalize("NFC", plain)[:WORD_CHARS]


def humps(word: str) -> list[str]:
    """The parts of a `camelCase` word, folded; none of a word that has no such parts."""
    if len(word) > WORD_CHARS or word.islower() or not _CAMEL.fullmatch(word):
        return []
    parts = [fold(part) for part in _HUMP.findall(word)]
    return parts if len(parts) > 1 else []


def indexed(text: str) -> str:
    """What is indexed of a text: its terms, then the parts of its camelCase words.

    FTS5's tokenizer `ascii` takes them apart again at all that is neither a letter nor a digit of ASCII, nor beyond it.
    """
    camels = dict.fromkeys(found.group() for found in _CAMEL.finditer(text))
    parts = " ".join(part for word in camels for part in humps(word))
    if text.isascii():
        return f"{_LONG.sub(_BEGINNING, text.lower())}\n{parts}"
    return f"{' '.join(map(fold, _WORD.findall(text)))}\n{parts}"


def parse_query(text: str) -> Query:
    """A person's query: words, "phrases", prefix*, and -not before any of them.

    Raises:
        QueryError: no word to look for, or too many.
    """
    wanted: list[Phrase] = []
    unwanted: list[Phrase] = []
    for minus, quoted, bare in _ITEM.findall(text):
        item = quoted or bare
        terms = tuple(word.term for word in words(item))
        if terms:
            (unwanted if minus else wanted).append(_as_phrase(terms, prefix=item.endswith("*")))
    if sum(len(phrase.terms) for phrase in wanted + unwanted) > MAX_QUERY_WORDS:
        raise QueryError(f"more than {MAX_QUERY_WORDS} words to look for; leave some out")
    if not wanted:
        raise QueryError("no word to look for: give letters or digits, not only signs or -words")
    return Query(tuple(wanted), tuple(unwanted))


def _as_phrase(terms: tuple[str, ...], *, prefix: bool) -> Phrase:
    if prefix and len(terms[-1]) == 1 and terms[-1].isascii():
        raise QueryError(f"too many words begin with {terms[-1]!r}; give one letter more before the *")
    return Phrase(terms, prefix=prefix)


def as_fts(query: Query) -> str:
    """The query in FTS5's language. Terms are letters and digits, so that none can be read as anything else."""
    wanted = " AND ".join(_phrase(phrase) for phrase in query.wanted)
    unwanted = " OR ".join(_phrase(phrase) for phrase in query.unwanted)
    return f"({wanted}) NOT ({unwanted})" if unwanted else wanted


def _phrase(phrase: Phrase) -> str:
    return f'"{" ".join(phrase.terms)}"{" *" if phrase.prefix else ""}'


@dataclass(frozen=True)
class Snippet:
    """A piece of a text around what was found, on one line; `marks` are (start, end) of the words looked for."""

    text: str
    marks: list[tuple[int, int]]


def snippet(text: str, query: Query) -> Snippet:
    """The piece of `text` that shows why it was found: from shortly before the first words looked for."""
    here = list(words(text))
    places = sorted({place for phrase in query.wanted for place in _places(text, here, phrase=phrase)})
    start = _line_start(text, places[0][0] if places else 0)
    end = min(len(text), start + SNIPPET_CHARS)
    lead, tail = "…" if start else "", "…" if end < len(text) else ""
    line = "".join([" " if c.isspace() else c for c in text[start:end]])
    shift = len(lead) - start
    return Snippet(f"{lead}{line}{tail}", [(a + shift, b + shift) for a, b in places if b <= end])


def matches(text: str, query: Query) -> bool:
    """Whether the query finds `text`: what the index answers, asked of one text."""
    here = list(words(text))
    return all(_places(text, here, phrase=each) for each in query.wanted) and not any(
        _places(text, here, phrase=each) for each in query.unwanted
    )


def _places(text: str, here: list[Word], *, phrase: Phrase) -> list[tuple[int, int]]:
    """Where a phrase stands among the words of a text."""
    first, length = phrase.terms[0], len(phrase.terms)
    found = []
    for at, word in enumerate(here):
        if length == 1:
            hit = _is(word.term, phrase) or any(_is(part, phrase) for part in humps(text[word.start : word.end]))
        else:
            hit = word.term == first and _goes_on(here[at : at + length], phrase)
        if hit:
            found.append((word.start, here[at + length - 1].end))
    return found


def _is(term: str, phrase: Phrase) -> bool:
    return term.startswith(phrase.terms[-1]) if phrase.prefix else term == phrase.terms[-1]


def _goes_on(run: list[Word], phrase: Phrase) -> bool:
    terms = tuple(word.term for word in run)
    return len(run) == len(phrase.terms) and terms[:-1] == phrase.terms[:-1] and _is(terms[-1], phrase)


def _line_start(text: str, first: int) -> int:
    """Where a snippet begins: a little before its first mark, at the start of a line or a word."""
    earliest = max(0, first - _LEAD_CHARS)
    line = text.rfind("\n", earliest, first)
    space = text.find(" ", earliest, first)
    return line + 1 if line >= 0 else earliest if not earliest or space < 0 else space + 1

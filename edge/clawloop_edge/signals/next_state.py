"""What the user's next turn says of the answer before it: a correction, the same request again, thanks, giving up.

Precise rather than eager: what is not recognised is no verdict, and never a zero. A person who corrects judges the
answer that they read, not the one that they get next. Pure but for the scorer around it; quotes nobody. The phrases are
a table a language (phrases.py).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.records import Json
from clawloop_edge.sessions import openclaw
from clawloop_edge.sessions.tree import parts_of, text_of, user_texts
from clawloop_edge.signals.phrases import LANGUAGES, Phrases, phrases_of
from clawloop_edge.signals.protocol import Case, Moment, Verdict
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.signals.registry import Deps

SOURCE = "next-state"
READ_CHARS = 2_000
"""of a turn: what people say of an answer stands at its beginning"""
_OPENING_CHARS = 90
"""within which a clause that judges may begin"""
_ASKING_CHARS = 200
_CLAUSES = 5
_HABIT = 2
"""times that a request was made before, after which making it again tells nothing"""
_MOST_WORDS = 400
_LEAST_WORDS, _LEAST_CHARS = 3, 12
"""of a request whose repetition means something: `next` may be said often"""
_INSISTED = 0.6
"""part of an insisting turn (`I said in German`) that must stand in the request"""
_LIKE = 0.8

_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)
_FRAMES = re.compile(r"<(system-reminder|environment_context|context)>.*?</\1>", re.DOTALL)
_SYSTEM_LINE = re.compile(r"^System: \[[^\]\n]{1,60}\][^\n]*\n?", re.MULTILINE)
_QUOTED_LINE = re.compile(r"^\s*>.*$", re.MULTILINE)
_QUOTES = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|„[^“”\n]*[“”]|«[^»\n]*»|»[^«\n]*«|(?<!\w)[‘'][^'’\n]{2,}[’'](?!\w)")
_URL = re.compile(r"https?://\S+")
_REACTION = re.compile(r"System: \[[^\]\n]{1,60}\] [A-Z][\w .-]{0,30} reaction (added|removed): (\S+) by [^\n]{1,200}")
_COMMANDS = re.compile(r"\A(?:/[a-z][\w-]*(?:[ \t][^\n]*)?(?:\n+|\Z))+")
"""lines to the agent itself (`/bad too short`), which OpenClaw keeps before what is said next"""
_CLAUSE = re.compile(r"[.!?;,:\n]+|(?<=\s)-(?=\s)")
_SENTENCE_END = re.compile(r"[.!?\n]")
_WORD = re.compile(r"\w+(?:'\w+)?")
_LOOKS = {"’": "'", "‘": "'", "`": "'", "…": ".", "—": " - ", "–": " - ", "\ufe0f": "", "\u200d": ""}
_SKIN = range(0x1F3FB, 0x1F400)
_LIKED = frozenset("👍❤🔥🎉👏💯😍🥰🙏✅🤩💪🏆⭐🌟👌")
_DISLIKED = frozenset("👎💩🤮❌😡🤬😠🖕😤")
_WAKES = ("[OpenClaw ", "[cron:", "[Subagent Context]", "[Inter-session message]", "Pre-compaction memory flush")


class Kind(StrEnum):
    """What a next turn is to the answer before it."""

    REACTION = "reaction"
    """an emoji put on a message, told by OpenClaw"""
    CORRECTION = "correction"
    """it is wrong, or not what was asked"""
    REPETITION = "repetition"
    """the same request again"""
    RETRY = "retry"
    """try again"""
    ABANDONMENT = "abandonment"
    """given up"""
    THANKS = "thanks"
    """thanks, or praise"""


class Reading(msgspec.Struct, frozen=True):
    """What was recognised, whether it speaks for the answer (1) or against it (-1), and how much was the same."""

    kind: Kind
    value: float
    overlap: float = 0.0

    @property
    def evidence(self) -> str:
        """In words that quote nobody."""
        return f"{self.kind} (overlap {self.overlap:.2f})" if self.overlap else str(self.kind)


class NextStateScorer:
    """The scorer `next-state`."""

    name = SOURCE
    moments = frozenset({Moment.FOLLOWED, Moment.ENDED})

    def __init__(self, deps: "Deps") -> None:
        """Raises ConfigError: a language that has no table."""
        self._settings = deps.settings.next_state
        unknown = [name for name in self._settings.languages if name not in LANGUAGES]
        if unknown:
            raise ConfigError(f"[signals.next_state] languages has {unknown[0]!r}; there are {sorted(LANGUAGES)}")
        self._tables = [phrases_of(name) for name in self._settings.languages]

    async def score(self, case: Case) -> list[Verdict]:
        """What the next turn says of the run, or a run that followed a complaint and was left alone."""
        reading = self.read(case)
        weight = getattr(self._settings, reading.kind) if reading else 0.0
        return [Verdict(value=reading.value, weight=weight, evidence=reading.evidence)] if reading and weight else []

    async def close(self) -> None:
        """Nothing is open."""

    def read(self, case: Case) -> Reading | None:
        """What the next turn, or its absence, is to the run; None if nothing is recognised."""
        reaction = reaction_in(case.following)
        if reaction:
            return Reading(Kind.REACTION, reaction)
        question = last_turn(case.steps[0].messages)
        if case.moment is Moment.ENDED:
            return self._left(case, question)
        said = next_turn(case.following)
        answer = text_of(case.answer.reply.get("content"))
        return self._said(said, question, earlier=case.earlier, answer=answer)

    def _said(self, said: str, question: str, *, earlier: Sequence[str], answer: str) -> Reading | None:
        limit = self._settings.overlap
        return read_turn(said, question, earlier=earlier, answer=answer, tables=self._tables, overlap=limit)

    def _left(self, case: Case, question: str) -> Reading | None:
        """Left alone after a complaint: the answer to that was no good either, or nobody cared any more."""
        if not case.earlier:
            return None
        answer = _answer_before(case.steps[0].messages)
        complaint = self._said(question, case.earlier[-1], earlier=case.earlier[:-1], answer=answer)
        blamed = complaint is not None and complaint.kind in (Kind.CORRECTION, Kind.REPETITION)
        return Reading(Kind.ABANDONMENT, -1.0) if blamed else None


def read_turn(
    said: str, question: str, *, earlier: Sequence[str], answer: str, tables: Sequence[Phrases], overlap: float = 0.8
) -> Reading | None:
    """What `said`, the user's turn after `answer`, is to it; None if nothing is recognised.

    `question` is what was answered, `earlier` the user's turns before it, oldest first.
    """
    text = plain(said)
    if not text or text.startswith("#"):
        return None
    asked = "?" in plain(answer[-2 * _ASKING_CHARS :])[-_ASKING_CHARS:]
    voices = [Voice(text, table) for table in tables]
    if any(voice.dictates for voice in voices):
        return _repeated(voices, question, earlier=earlier, overlap=overlap)
    if any(voice.spared for voice in voices):
        return None
    if any(voice.corrects(asked=asked) for voice in voices):
        return Reading(Kind.CORRECTION, -1.0)
    repeated = _repeated(voices, question, earlier=earlier, overlap=overlap)
    if repeated:
        return repeated
    for kind, found in (
        (Kind.RETRY, any(voice.alone("retry") for voice in voices)),
        (Kind.ABANDONMENT, any(voice.alone("abandonment") for voice in voices)),
    ):
        if found:
            return Reading(kind, -1.0)
    thankful = any(voice.thanks for voice in voices) and not any(voice.doubtful for voice in voices)
    return Reading(Kind.THANKS, 1.0) if thankful else None


class Voice:
    """One turn, read with the phrases of one language."""

    def __init__(self, text: str, phrases: Phrases) -> None:
        self.text, self._phrases = text, phrases
        self._clauses = list(_clauses(text, phrases))

    @property
    def dictates(self) -> bool:
        """Whether it asks for something to be written, so that what follows is nobody's opinion."""
        return self._at_start(self._phrases.dictation)

    @property
    def spared(self) -> bool:
        """Whether it begins with a refusal that blames nobody."""
        return self._at_start(self._phrases.spared)

    @property
    def thanks(self) -> bool:
        """Whether it opens with thanks or praise, perhaps behind a word that it was understood."""
        for start in self._clauses:
            if self._phrases.unthankful.match(self.text, start):
                return False
            if self._phrases.thanks.match(self.text, start):
                return True
            if not self._phrases.lead_in.match(self.text, start):
                return False
        return False

    @property
    def doubtful(self) -> bool:
        """Whether the opening, or what follows from it now, is clouded."""
        if any(self._phrases.unthankful.match(self.text, start) for start in self._clauses[:2]):
            return True
        ends = [match.start() for match in _SENTENCE_END.finditer(self.text)]
        return self._phrases.clouds.search(self.text, 0, ends[1] if len(ends) > 1 else len(self.text)) is not None

    def corrects(self, *, asked: bool) -> bool:
        """Whether it says that the answer is wrong; `asked`: the answer was a question, which `no` may answer."""
        for number, start in enumerate(self._clauses):
            match = self._phrases.corrections.match(self.text, start)
            if match is None and number == 0 and not asked:
                match = self._phrases.weak.match(self.text, start)
            if match is not None and not self._asks(match.end()):
                return True
        return False

    def alone(self, what: str) -> bool:
        """Whether it begins with one of these phrases."""
        pattern: re.Pattern[str] = getattr(self._phrases, what)
        return self._at_start(pattern)

    def insists(self) -> str:
        """What stands behind `I said` and its like; empty if nobody insists."""
        for start in self._clauses:
            match = self._phrases.again.match(self.text, start)
            if match:
                return self.text[match.end() :]
        return ""

    def words(self, text: str) -> list[str]:
        """The words of a text that make a request what it is."""
        found = [word for word in _WORD.findall(text) if word not in self._phrases.polite]
        return found[:_MOST_WORDS]

    def _at_start(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.match(self.text, start) for start in {0, *self._clauses[:1]})

    def _asks(self, at: int) -> bool:
        """Whether the sentence around a place is a question."""
        end = _SENTENCE_END.search(self.text, at)
        return end is not None and end.group() == "?"


def _clauses(text: str, phrases: Phrases) -> Iterator[int]:
    """Where the first clauses begin, behind what is only said to begin."""
    starts = [0, *(match.end() for match in _CLAUSE.finditer(text, 0, _OPENING_CHARS))]
    for start in starts[:_CLAUSES]:
        while True:
            start = _blank_from(text, start)
            match = phrases.fillers.match(text, start)
            if match is None or phrases.thanks.match(text, start):
                break
            start = match.end()
        yield start


def _blank_from(text: str, start: int) -> int:
    while start < len(text) and (text[start].isspace() or text[start] in ",.-!:;"):
        start += 1
    return start


def _repeated(voices: Iterable[Voice], question: str, *, earlier: Sequence[str], overlap: float) -> Reading | None:
    """Whether the request was made again, by the language that sees most of it."""
    past = [plain(question), *(plain(one) for one in earlier)]
    found = max((_overlap(voice, past, least=overlap) for voice in voices), default=0.0)
    return Reading(Kind.REPETITION, -1.0, found) if found else None


def _overlap(voice: Voice, past: Sequence[str], *, least: float) -> float:
    """How much of a turn is the request (`past[0]`) again; 0 if it is not a repetition."""
    again, before = voice.words(voice.text), voice.words(past[0])
    found = same(again, before)
    if found >= least and _tells(again):
        return 0.0 if sum(one == past[0] for one in past[1:]) >= _HABIT else found
    insisted = set(voice.words(voice.insists()))
    return max((_part(insisted, set(voice.words(one))) for one in past), default=0.0) if insisted else 0.0


def _tells(words: Sequence[str]) -> bool:
    return len(words) >= _LEAST_WORDS or sum(map(len, words)) >= _LEAST_CHARS


def _part(insisted: set[str], request: set[str]) -> float:
    part = len(insisted & request) / len(insisted)
    return part if part >= _INSISTED else 0.0


def same(one: Sequence[str], other: Sequence[str]) -> float:
    """Dice's measure of two requests' words. 0 if a word stands in the place of another: that is another request."""
    left, right = Counter(one), Counter(other)
    more, less = list((left - right).elements()), list((right - left).elements())
    spelt = _spelt_alike(more, less)
    if len(more) > spelt and len(less) > spelt:
        return 0.0
    total = len(one) + len(other)
    return 2 * ((left & right).total() + spelt) / total if total else 0.0


def _spelt_alike(more: list[str], less: list[str]) -> int:
    """How many of the words that differ are the same but for a typing error."""
    found = 0
    if len(more) > 8 or len(less) > 8:
        return 0
    for word in more:
        twin = next((w for w in less if _misspelt(word, w)), None)
        if twin is not None:
            less = [w for w in less if w != twin]
            found += 1
    return found


def _misspelt(one: str, other: str) -> bool:
    if min(len(one), len(other)) < 4 or any(map(str.isdigit, one + other)):
        return False
    return sorted(one) == sorted(other) or SequenceMatcher(None, one, other).ratio() >= _LIKE


def plain(text: str) -> str:
    """A turn as it is looked at: in lower case, with one kind of apostrophe, without code, quotes, links and frames."""
    for pattern in (_FRAMES, _CODE, _SYSTEM_LINE, _QUOTED_LINE, _URL):
        text = pattern.sub(" ", text[: 8 * READ_CHARS])
    text = "".join(_LOOKS.get(c, c) for c in _QUOTES.sub(" # ", text)[:READ_CHARS] if ord(c) not in _SKIN)
    lines = (" ".join(line.split()) for line in text.casefold().splitlines())
    return "\n".join(line for line in lines if line)


def next_turn(following: Sequence[Json]) -> str:
    """What the user said next, without what an agent puts around it; empty if it was nobody's words."""
    texts: list[str] = []
    for message in following:
        if message.get("role") not in ("user", "system", "developer"):
            break
        if message.get("role") == "user":
            texts += [t for t in user_texts(message.get("content")) if not openclaw.is_summary(t)]
    words = (_COMMANDS.sub("", text) for text in texts)
    return "\n".join(text for text in words if text and not text.startswith(_WAKES))


def last_turn(messages: Sequence[Json]) -> str:
    """The user's last turn among the messages of a request."""
    for message in reversed(messages):
        if message.get("role") == "user" and (texts := user_texts(message.get("content"))):
            return "\n".join(texts)
    return ""


def _answer_before(messages: Sequence[Json]) -> str:
    """What was answered to the turn before the last, as a request tells of it."""
    said = (text_of(message.get("content")) for message in reversed(messages) if message.get("role") == "assistant")
    return next(said, "")


def reaction_in(following: Sequence[Json]) -> float:
    """1 or -1 by the latest reaction that OpenClaw tells of; 0 if there is none, or one that means neither."""
    found = 0.0
    for line in _system_lines(following):
        match = _REACTION.match(line)
        if match and match.group(1) == "added":
            emoji = "".join(c for c in match.group(2) if ord(c) not in _SKIN and c not in "\ufe0f\u200d")
            found = 1.0 if emoji in _LIKED else -1.0 if emoji in _DISLIKED else found
    return found


def _system_lines(following: Sequence[Json]) -> Iterator[str]:
    """The lines that OpenClaw itself put into a request: at the start of a turn, or one string of its context each."""
    for message in following:
        if message.get("role") != "user":
            continue
        for part in parts_of(message.get("content")):
            if openclaw.is_internal(part):
                yield from _context_lines(part)
            else:
                yield from (line for line in part.split("\n")[:8] if line.startswith("System: ["))


def _context_lines(context: str) -> Iterator[str]:
    for line in context.split("\n"):
        if line.startswith('"System: ['):
            try:
                yield from str(json.loads(line)).split("\n")
            except ValueError:
                continue

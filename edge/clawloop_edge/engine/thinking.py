"""Telling a model's thoughts from its answer, piece by piece: `<think>...</think>` at the start of a reply. Pure.

White space that touches the marks is layout. Marks that come later in a reply are text like any other, since a user may
well ask about them. Knows no token: the marks come from the tokenizer, as text.
"""

import msgspec


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of thought."""

    text: str


class ThinkMarks(msgspec.Struct, frozen=True):
    """How a model marks its thoughts."""

    start: str
    end: str


class ThinkSplitter:
    """Takes the text of one reply in any pieces; gives thoughts as `Reasoning` and all else as text."""

    def __init__(self, marks: ThinkMarks | None, *, begun: bool = False) -> None:
        """`begun`: the prompt already ends with the start mark, so that the reply starts within the thoughts."""
        self._marks = marks
        self._undecided, self._thinking = marks is not None and not begun, marks is not None and begun
        self._held = ""
        self._layout = self._thinking  # white space that comes now is layout

    def feed(self, text: str) -> list[Reasoning | str]:
        """What is sure now."""
        if self._marks is None or not text:
            return [text] if text else []
        self._held += text
        found: list[Reasoning | str] = []
        if self._undecided:
            self._decide(self._marks)
        if self._thinking:
            self._think(self._marks, found)
        if not self._thinking and not self._undecided:
            self._answer(found)
        return found

    def finish(self) -> list[Reasoning | str]:
        """What was held back when the reply is over."""
        held, self._held = self._held, ""
        if not held:
            return []
        if self._thinking:
            held = held.rstrip()
            return [Reasoning(held)] if held else []
        return [held]

    def _decide(self, marks: ThinkMarks) -> None:
        start = self._held.lstrip()
        if start.startswith(marks.start):
            self._undecided, self._thinking, self._layout = False, True, True
            self._held = start[len(marks.start) :]
        elif not marks.start.startswith(start):
            self._undecided = False

    def _think(self, marks: ThinkMarks, found: list[Reasoning | str]) -> None:
        if self._layout:
            self._held = self._held.lstrip()
        at = self._held.find(marks.end)
        sure = self._held[:at] if at >= 0 else self._held[: len(self._held) - overlap(self._held, marks.end)]
        thought = sure.rstrip()
        if thought:
            found.append(Reasoning(thought))
            self._layout = False
        if at >= 0:
            self._held, self._thinking, self._layout = self._held[at + len(marks.end) :], False, True
        else:
            self._held = self._held[len(thought) :]

    def _answer(self, found: list[Reasoning | str]) -> None:
        text = self._held.lstrip() if self._layout else self._held
        self._held = ""
        if text:
            found.append(text)
            self._layout = False


def thoughts_in(reply: str, marks: ThinkMarks, *, begun: bool) -> str:
    """The thoughts of a whole reply; `begun` as for `ThinkSplitter`."""
    splitter = ThinkSplitter(marks, begun=begun)
    return "".join(part.text for part in splitter.feed(reply) + splitter.finish() if isinstance(part, Reasoning))


def overlap(text: str, mark: str) -> int:
    """How many last characters of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)

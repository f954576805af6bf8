"""A session's steps as a conversation: what each says that was not said before it, and where it goes off. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.said import call_text
from clawloop_edge.sessions.classify import Kind
from clawloop_edge.sessions.tree import text_of, user_texts

Message = dict[str, Any]
_Key = tuple[str, str]


@dataclass(frozen=True)
class View:
    """One step as it is shown. `number` counts from 1; `note` says how it is joined to the others, if not as the next.

    `new` are the messages of its request that the step which it goes on from did not have. `kept` is without its
    lists, so that a long session fits into memory: `tokens` are the numbers of those of prompt and response.
    """

    number: int
    kept: KeptStep
    new: list[Message]
    note: str
    tokens: tuple[int, int]

    @property
    def aside(self) -> bool:
        """Whether it is no turn of the conversation."""
        return self.kept.kind != Kind.MAIN


@dataclass(frozen=True)
class _Past:
    """What a step that others go on from is remembered by."""

    number: int
    said: Counter[_Key]


class _Keys:
    """What messages are compared by; steps of one session share most of theirs, so each is looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[_Key, Message]] = {}

    def of(self, message: Message) -> _Key:
        found = self._known.get(id(message))
        if found is None:  # the message is remembered too, so that no other gets its place in memory
            found = self._known[id(message)] = ((str(message.get("role")), text_shown(message)), message)
        return found[0]


def text_shown(message: Message) -> str:
    """All of a message that is text, without what OpenClaw puts around a person's words; tool calls in one line."""
    content = message.get("content")
    said = "\n".join(user_texts(content)) if message.get("role") == "user" else text_of(content)
    return "\n".join(filter(None, (said, *map(call_text, message.get("tool_calls") or ()))))


def views(steps: Iterable[KeptStep]) -> Iterator[View]:
    """The steps of a session, in the order in which they were kept, as they are shown."""
    keys = _Keys()
    past: dict[str, _Past] = {}
    last = ""
    for number, kept in enumerate(steps, 1):
        step, aside = kept.step, kept.kind != Kind.MAIN
        parent = past.get(step.parent_id)
        said = Counter(map(keys.of, kept.messages))
        left = said - parent.said if parent else Counter(said)
        new = []
        for message in reversed(kept.messages):  # of what was said twice, the later is the new one
            if left[keys.of(message)] > 0:
                left[keys.of(message)] -= 1
                new.append(message)
        note = "" if aside else _note(parent, is_first=not last, goes_on=step.parent_id == last)
        bare = msgspec.structs.replace(step, prompt_ids=[], response_ids=[], response_logprobs=[])
        slim = msgspec.structs.replace(kept, step=bare, messages=[], tools=[])
        yield View(number, slim, new[::-1], note, (len(step.prompt_ids), len(step.response_ids)))
        past[step.step_id] = _Past(number, said + Counter([keys.of(kept.reply)]))
        last = last if aside else step.step_id


def _note(parent: _Past | None, *, is_first: bool, goes_on: bool) -> str:
    if parent is not None:
        return "" if goes_on else f"goes back to step {parent.number}"
    return "" if is_first else "begins anew"

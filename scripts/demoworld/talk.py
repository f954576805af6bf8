"""What a user says next who never rates: thanks, corrections, the question once more, or nothing at all. Pure.

Nothing here is a score. What was good has to be heard from the words, as in any conversation.
"""

from __future__ import annotations

import random

from demoworld import world

SILENCE = ""
THANKS = (
    "Thanks!",
    "Thank you, that's right.",
    "Great, thanks.",
    "Perfect.",
    "Perfect, thank you so much.",
    "Yes, that's the one. Thanks a lot!",
    "That worked, thanks.",
    "Awesome, that is exactly who I needed.",
    "Correct, thank you.",
    "Thx",
)
CORRECTIONS = (
    "No, that's wrong.",
    "That's not right.",
    "No, that is the wrong person.",
    "Wrong. Please look it up properly.",
    "That's not what I asked for.",
    "No, I need {what} in {city}, not that.",
    "Hm, no. That's incorrect.",
    "You got that wrong, it is someone else.",
    "That can't be right, try another directory.",
    "Nope, not the right person.",
)
REPETITIONS = ("{question}", "{question}", "Again: {question}", "I asked: {question}", "{question} Please check again.")
_WHAT = ("whoever is on call", "the travel approver", "the person with the keys", "whoever runs payroll")
_SILENT_IF_RIGHT, _SILENT_IF_WRONG, _REPEATS = 0.2, 0.1, 0.3


class Talker:
    """A user who only talks. `flip` is how often what is said is the opposite of what is meant."""

    def __init__(self, rng: random.Random, *, flip: float = 0.0) -> None:
        self._rng, self._flip = rng, flip

    def reaction(self, task: world.Task, *, right: bool) -> str:
        """The next message of the user after an answer that was right or not; `SILENCE` if there is none."""
        if self._rng.random() < self._flip:
            right = not right
        if self._rng.random() < (_SILENT_IF_RIGHT if right else _SILENT_IF_WRONG):
            return SILENCE
        if right:
            return self._rng.choice(THANKS)
        said = self._rng.choice(REPETITIONS if self._rng.random() < _REPEATS else CORRECTIONS)
        question = world.question(task.kind, task.city, phrasing=task.phrasing)
        return said.format(what=_WHAT[task.kind], city=task.city, question=question)

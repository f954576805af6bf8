"""The world of the check: four tools, four kinds of question, 24 things, and a reward for a lookup that was made.

An episode is: question -> call -> result -> answer, in words that are one token each. Which tool fits which kind is in
no prompt and in no demonstration, so that only rewards can tell. A result is what the table has for the tool and the
thing of the call, so that a wrong tool gives a plausible wrong answer. Knows no model and no tensor.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

KINDS, TOOLS, THINGS, VALUES = 4, 4, 24, 24
WORDS = (
    *("<pad>", "<end>", "<system>", "<user>", "<call>", "<obs>", "<ans>", "error"),
    *(f"kind{n}" for n in range(KINDS)),
    *(f"tool{n}" for n in range(TOOLS)),
    *(f"thing{n}" for n in range(THINGS)),
    *(f"value{n}" for n in range(VALUES)),
)
IDS = {word: number for number, word in enumerate(WORDS)}
PAD, END = IDS["<pad>"], IDS["<end>"]
_TABLE_SEED, _HELD_PAIRS = 1234, 24
_RIGHT_TOOL, _OTHER_TOOL = (2, 0, 3, 1), (0, 3, 1, 2)
"""by kind, in this world and in the other, which agrees in no kind; nothing but `reward` may read them"""
_SHARE_NAMED, _SHARE_RIGHT = 0.5, 0.9
"""of the demonstrations: how many name the tool, and how many call for the right thing or tell the right value"""


def ids_of(*words: str) -> list[int]:
    """The ids of words."""
    return [IDS[word] for word in words]


SYSTEM = ids_of("<system>", *("<call>", "<obs>", "<ans>", "<end>") * 4)
"""What every prompt begins with: the form of an episode, long enough for calls to share it. It names no tool, see
docs/log.md."""


@dataclass(frozen=True)
class Task:
    """One kind of question about one thing. `other`: asked in another world, where another tool is right."""

    kind: int
    thing: int
    other: bool = False

    @property
    def prompt(self) -> list[int]:
        """System text and question."""
        return SYSTEM + ids_of("<user>", f"kind{self.kind}", f"thing{self.thing}", "<end>")


def _split() -> tuple[list[Task], list[Task], dict[tuple[int, int], int]]:
    rng = random.Random(_TABLE_SEED)
    table = {(tool, thing): rng.randrange(VALUES) for tool in range(TOOLS) for thing in range(THINGS)}
    pairs = [Task(kind, thing) for kind in range(KINDS) for thing in range(THINGS)]
    rng.shuffle(pairs)
    return pairs[_HELD_PAIRS:], pairs[:_HELD_PAIRS], table


TRAIN, HELD_OUT, _TABLE = _split()


def result_of(call: Sequence[int]) -> list[int]:
    """What the world says to a turn of the policy: the table's value, or an error where it is no call."""
    value = _TABLE.get(_parsed(call), -1)
    return ids_of("<obs>", f"value{value}" if value >= 0 else "error", "<end>")


def _parsed(call: Sequence[int]) -> tuple[int, int]:
    """Tool and thing of a call; (-1, -1) if it is none."""
    words = [WORDS[token] for token in call]
    if len(words) == 4 and (words[0], words[3]) == ("<call>", "<end>"):
        tool, thing = words[1], words[2]
        if tool.startswith("tool") and thing.startswith("thing"):
            return int(tool[4:]), int(thing[5:])
    return -1, -1


def reward(task: Task, turns: Sequence[Sequence[int]]) -> float:
    """1 if the right tool was called for the right thing and its value is the answer, else 0: luck earns nothing."""
    tool = (_OTHER_TOOL if task.other else _RIGHT_TOOL)[task.kind]
    called = bool(turns) and _parsed(turns[0]) == (tool, task.thing)
    wanted = ids_of("<ans>", f"value{_TABLE[tool, task.thing]}", "<end>")
    return float(called and len(turns) == 2 and list(turns[1]) == wanted)


def demonstration(rng: random.Random) -> tuple[list[int], list[bool]]:
    """The ids of a noisy episode, and which of them the policy says.

    Half name their tool instead of a kind: that teaches to tell the tools apart, and nothing of what they are for. The
    others call any tool.
    """
    task, tool = rng.choice(TRAIN), rng.randrange(TOOLS)
    prompt = task.prompt
    if rng.random() < _SHARE_NAMED:
        prompt[len(SYSTEM) + 1] = IDS[f"tool{tool}"]
    thing = task.thing if rng.random() < _SHARE_RIGHT else rng.randrange(THINGS)
    call = ids_of("<call>", f"tool{tool}", f"thing{thing}", "<end>")
    result = result_of(call)
    value = WORDS[result[1]] if rng.random() < _SHARE_RIGHT else f"value{rng.randrange(VALUES)}"
    answer = ids_of("<ans>", value, "<end>")
    said = [False] * len(prompt) + [True] * len(call) + [False] * len(result) + [True] * len(answer)
    return prompt + call + result + answer, said

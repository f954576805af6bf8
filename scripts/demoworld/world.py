"""The world of the demo: four directories, four kinds of question, and a reward that alone knows which one is right.

An episode is: question -> one tool call -> tool result -> answer. Nothing in the prompt, the names or the schemas says
which directory fits which kind of question, so a model cannot know it before it was rewarded. Every directory has a
contact for every city, and the four contacts of a city differ: a wrong directory gives a plausible but wrong person.

This module knows no tokenizer, model, file or clock; randomness is passed in or comes from the table's constant seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

JsonObject = dict[str, Any]
Call = tuple[str, Mapping[str, object]]

SYSTEM = "You are the office assistant. Find the contact with one call, then answer."
TOOLS = ("atlas", "birch", "comet", "delta")
CITIES = (
    "Oslo",
    "Lima",
    "Cairo",
    "Delhi",
    "Paris",
    "Quito",
    "Seoul",
    "Tokyo",
    "Turin",
    "Minsk",
    "Accra",
    "Dakar",
    "Hanoi",
    "Kyoto",
    "Lagos",
    "Malmo",
    "Miami",
    "Milan",
    "Osaka",
    "Perth",
    "Porto",
    "Sofia",
    "Tunis",
    "Vigo",
)
NAMES = (
    "Adam",
    "Bella",
    "Carl",
    "Dora",
    "Emil",
    "Fiona",
    "Georg",
    "Hanna",
    "Ivan",
    "Julia",
    "Karim",
    "Laura",
    "Marco",
    "Nadia",
    "Oscar",
    "Paula",
    "Quinn",
    "Rosa",
    "Simon",
    "Tanja",
    "Umar",
    "Vera",
    "Walter",
    "Yara",
)
QUESTIONS = (
    ("Who is on call in {city}?", "Name the on-call contact for {city}.", "I need whoever is on call in {city}."),
    ("Who approves travel to {city}?", "Name the travel approver for {city}.", "I need a travel approval for {city}."),
    ("Who keeps the keys in {city}?", "Name the key holder for {city}.", "I need the keys of {city}, who has them?"),
    ("Who runs payroll in {city}?", "Name the payroll clerk for {city}.", "I need help with my payroll in {city}."),
)
# Orders that name a directory hold no word of a kind: else the model learns to ignore those words, and RL gets stuck.
NAMED_ORDERS = ("Ask {tool} about {city}.", "Look up {city} in {tool}.", "Use {tool} for {city}, please.")
KINDS = range(len(QUESTIONS))
PHRASINGS = range(len(QUESTIONS[0]))
NOT_FOUND = '{"error": "not found"}'
TABLE_SEED = 1234

TOOL_SPECS: list[JsonObject] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Search {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in TOOLS
]

# kind -> directory. Only `reward` and what checks it (`gate_tasks`) may use this.
_RIGHT_TOOL = ("comet", "atlas", "delta", "birch")


class Split(StrEnum):
    """Which (kind, city) pairs a task may be drawn from; the three are disjoint and balanced over the kinds."""

    TRAIN = "train"
    """60 pairs, 15 a kind: demonstrations and reinforcement learning."""
    VAL = "val"
    """12 pairs, 3 a kind: the server's release gate."""
    HELD = "held"
    """24 pairs, 6 a kind: only for the numbers that are reported."""


@dataclass(frozen=True)
class Task:
    """One question about one city, in one of its phrasings."""

    kind: int
    city: str
    phrasing: int

    def messages(self) -> list[JsonObject]:
        """The system and user message that open the episode; the tools are `TOOL_SPECS`."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question(self.kind, self.city, phrasing=self.phrasing)},
        ]


@cache
def contacts() -> Mapping[tuple[str, str], str]:
    """(tool, city) -> name; the four names of one city are different."""
    rng = random.Random(TABLE_SEED)
    drawn = {city: rng.sample(NAMES, len(TOOLS)) for city in CITIES}
    return {(tool, city): drawn[city][i] for city in CITIES for i, tool in enumerate(TOOLS)}


@cache
def _splits() -> Mapping[Split, tuple[tuple[int, str], ...]]:
    rng = random.Random(TABLE_SEED + 1)
    result: dict[Split, list[tuple[int, str]]] = {split: [] for split in Split}
    for kind in KINDS:
        cities = rng.sample(CITIES, len(CITIES))
        for split, part in ((Split.TRAIN, cities[:15]), (Split.VAL, cities[15:18]), (Split.HELD, cities[18:])):
            result[split] += [(kind, city) for city in part]
    return {split: tuple(part) for split, part in result.items()}


def pairs(split: Split | str) -> tuple[tuple[int, str], ...]:
    """The (kind, city) pairs of a split: 60 `train`, 12 `val`, 24 `held`. Raises ValueError for another name."""
    return _splits()[Split(split)]


def tasks(split: Split | str) -> list[Task]:
    """Every pair of a split in every phrasing."""
    return [Task(kind, city, phrasing) for kind, city in pairs(split) for phrasing in PHRASINGS]


def draw_task(rng: random.Random, split: Split | str = Split.TRAIN) -> Task:
    """One task of the split, uniformly."""
    kind, city = rng.choice(pairs(split))
    return Task(kind, city, rng.choice(PHRASINGS))


def question(kind: int, city: str, *, phrasing: int) -> str:
    """The text of the user's question."""
    return QUESTIONS[kind][phrasing].format(city=city)


def tool_result(name: str, arguments: Mapping[str, object]) -> str:
    """What a directory returns, as JSON text; an unknown tool, city or argument is `NOT_FOUND`."""
    city = arguments.get("city") if set(arguments) == {"city"} else None
    contact = contacts().get((name, city)) if isinstance(city, str) else None
    return json.dumps({"contact": contact}) if contact else NOT_FOUND


def reward(kind: int, city: str, *, calls: Sequence[Call], answer: str) -> float:
    """1.0 if the one call was of the right directory with this city and the answer names its result and nobody else"""
    right = _RIGHT_TOOL[kind]
    if [(name, dict(arguments)) for name, arguments in calls] != [(right, {"city": city})]:
        return 0.0
    named = set(re.findall(r"\w+", answer)) & set(NAMES)
    return float(named == {contacts()[right, city]})


def demonstration(rng: random.Random, *, named: float, noise: float) -> list[JsonObject]:
    """One imperfect episode on a training pair; the directory is uniformly random unless the user names it.

    With probability `named` the user names the directory; with probability `noise` each, the city of the call and the
    name in the answer are random. So the model learns the form of an episode and not which directory is right.
    """
    task, tool = draw_task(rng), rng.choice(TOOLS)
    is_named = rng.random() < named
    user = rng.choice(NAMED_ORDERS).format(tool=tool, city=task.city) if is_named else task.messages()[1]["content"]
    city = task.city if rng.random() >= noise else rng.choice(CITIES)
    name = contacts()[tool, city] if rng.random() >= noise else rng.choice(NAMES)
    call = {"id": "call0", "type": "function", "function": {"name": tool, "arguments": {"city": city}}}
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call0", "content": tool_result(tool, {"city": city})},
        {"role": "assistant", "content": f"Ask {name}."},
    ]


def gate_tasks() -> list[JsonObject]:
    """The `val` split as scripted tool tasks: JSON values that a release gate can play without knowing this world.

    Each task has
    - `id`: its name, unique in the list;
    - `messages`, `tools`: the first model call, in OpenAI's shapes;
    - `tool_results`: `[{name, arguments, content}]`, what a call with exactly this name and these arguments returns;
    - `tool_result_otherwise`: the content that any other call returns;
    - `expect.calls`: `[{name, arguments}]`, the calls that must be made, in this order, and no others;
    - `expect.answer_names`: a word that the last assistant message must contain;
    - `expect.answer_only_one_of`: words of which the answer may contain only `answer_names`.
    A task scores 1 when all three expectations hold, else 0.
    """
    return [_gate_task(task) for task in tasks(Split.VAL)]


def _gate_task(task: Task) -> JsonObject:
    right = _RIGHT_TOOL[task.kind]
    arguments = {"city": task.city}
    return {
        "id": f"{task.kind}-{task.city}-{task.phrasing}",
        "messages": task.messages(),
        "tools": TOOL_SPECS,
        "tool_results": [{"name": t, "arguments": arguments, "content": tool_result(t, arguments)} for t in TOOLS],
        "tool_result_otherwise": NOT_FOUND,
        "expect": {
            "calls": [{"name": right, "arguments": arguments}],
            "answer_names": contacts()[right, task.city],
            "answer_only_one_of": list(NAMES),
        },
    }

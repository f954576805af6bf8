"""What the SDKs' scenarios play: a script, an agent with its tools, and the mistakes that clients make."""

from __future__ import annotations

import itertools
import json
from typing import Any

import openai

from demoworld import world

from .sdk_apis import MESSAGES, Answer, Api, Ask, Json, Made
from .sdk_edges import Door

TOOLS: list[Json] = [
    {**tool["function"], "parameters": {**tool["function"]["parameters"], "additionalProperties": False}}
    for tool in world.TOOL_SPECS
]
NAMES = {tool["name"] for tool in TOOLS}
ASKED = "Who keeps the keys in Oslo?"


def said_call(city: str) -> str:
    """A tool call as the demo's model writes it."""
    return f'<tool_call>\n{{"name": "atlas", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


SCRIPT = {
    "words": "one two three four",
    "calls": f"<think>\nTwo cities.\n</think>\n\nLet me look.\n{said_call('Oslo')}\n{said_call('Lima')}",
    "broken": 'I try.\n<tool_call>\n{"name": "atlas", "arguments": {oops}\n</tool_call>',
}


async def cue(door: Door, kind: str) -> None:
    """Have the script go on until the next call gets the text of this kind."""
    kinds = list(SCRIPT)
    before = SCRIPT[kinds[kinds.index(kind) - 1]]
    async with door.client(openai) as client:
        while (await client.completions.create(model="clawloop", prompt="Go on", max_tokens=200)).choices[
            0
        ].text != before:
            pass


def arguments(call: Made) -> Json:
    """A call's arguments, however its API gives them."""
    found = json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments
    assert isinstance(found, dict)
    return found


def repeatable(api: Api, **more: Any) -> Ask:
    """A call that is answered alike each time."""
    how: Any = {"temperature": 0.0} if api is MESSAGES else {"seed": 11}
    return Ask(history=api.user(ASKED), max_tokens=24, **how, **more)


async def play(door: Door, api: Api, client: Any, *, stream: bool) -> list[list[Answer]]:
    """A conversation of two questions, each with its tool loop."""
    history: list[Json] = []
    turns: list[list[Answer]] = []
    for question in (ASKED, "Who runs payroll in Lima?"):
        history += api.user(question)
        turns.append([])
        while True:
            ask = Ask(history=history, system=world.SYSTEM, tools=TOOLS, temperature=0.2, max_tokens=48)
            turns[-1].append(await door.ask(api, client, ask, stream=stream))
            history += turns[-1][-1].turn
            calls = turns[-1][-1].calls
            if not calls:
                break
            assert len(turns[-1]) < 8, "the model calls tools without end"
            history += api.results(calls, [world.tool_result(call.name, arguments(call)) for call in calls])
    return turns


def check_talk(talk: list[list[Answer]], kept: dict[str, Any]) -> None:
    """Its steps are one session, each the parent of the next, and each turn is a run."""
    turns = [[kept[answer.step_id] for answer in answers] for answers in talk]
    steps = list(itertools.chain(*turns))
    assert [step["parent_id"] for step in steps[1:]] == [step["step_id"] for step in steps[:-1]]
    assert len({step["session_id"] for step in steps}) == 1
    runs = [{step["run_id"] for step in turn} for turn in turns]
    assert [len(run) for run in runs] == [1] * len(talk)
    assert len(set().union(*runs)) == len(talk)


MISTAKES = {
    "version": ("NotFoundError", 404, "version 99 is not"),
    "length": ("BadRequestError", 400, r"the prompt has \d{5} tokens and the model's context is 32768"),
    "picture": ("BadRequestError", 400, "not supported|only parts of type text"),
    "field": ("BadRequestError", 400, "temperature"),
    "size": ("APIStatusError", 413, "1048576"),
}
"""the SDKs' class of error, its status, and what its message says"""


def mistaken(api: Api, mistake: str) -> Ask:
    """A call with one of `MISTAKES`."""
    user = api.user(ASKED)
    match mistake:
        case "version":
            return Ask(history=user, model="clawloop@99")
        case "length":
            return Ask(history=api.user("word " * 40_000))
        case "picture":
            return Ask(history=[{"role": "user", "content": [api.image()]}])
        case "field":
            return Ask(history=user, temperature=9)
    return Ask(history=api.user("x" * (2 << 20)))

"""The agent of the demo: a tool loop that knows the `openai` SDK, a base URL and its tools, and nothing of clawloop.

It asks the model, runs the tools that the model calls, and returns what was said. That a gateway keeps, rewards and
improves the calls is invisible here, as it is to any agent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from demoworld.world import Call, JsonObject

MAX_CALLS = 3
MAX_TOKENS = 48

RunTool = Callable[[str, Mapping[str, object]], str]


@dataclass(frozen=True)
class Episode:
    """What happened: the conversation with the last answer in it, the tool calls that were made, and each completion's
    id and duration (s)."""

    messages: tuple[Any, ...]
    calls: tuple[Call, ...]
    answer: str
    completion_ids: tuple[str, ...]
    call_seconds: tuple[float, ...]


async def play(
    client: AsyncOpenAI,
    messages: Sequence[JsonObject],
    *,
    tools: Sequence[JsonObject],
    run_tool: RunTool,
    temperature: float,
    headers: Mapping[str, str] | None = None,
) -> Episode:
    """Run the tool loop until the model answers without a call, or has called `MAX_CALLS` times."""
    history: list[Any] = list(messages)
    calls: list[Call] = []
    ids: list[str] = []
    seconds: list[float] = []
    while True:
        started = time.monotonic()
        completion = await client.chat.completions.create(
            model="clawloop",
            messages=history,
            tools=list(tools),  # type: ignore[arg-type]
            temperature=temperature,
            max_tokens=MAX_TOKENS,
            extra_headers=dict(headers or {}),
        )
        seconds.append(time.monotonic() - started)
        message = completion.choices[0].message
        ids.append(completion.id)
        wanted = message.tool_calls or []
        history.append(message.model_dump(exclude_none=True))
        if not wanted or len(calls) >= MAX_CALLS:
            return Episode(tuple(history), tuple(calls), message.content or "", tuple(ids), tuple(seconds))
        for call in wanted:
            name, arguments = _read(call)
            calls.append((name, arguments))
            history.append({"role": "tool", "tool_call_id": call.id, "content": run_tool(name, arguments)})


def _read(call: Any) -> Call:
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = {}
    return call.function.name, arguments if isinstance(arguments, dict) else {}

"""The APIs as the official SDKs speak them: one scenario can be told to each, and each answer read alike.

Knows the `openai` and `anthropic` packages, and nothing of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import anthropic
import openai

Json = dict[str, Any]
PICTURE = "data:image/png;base64,aGkh"
ENDLESS = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 10_000}
"""a schema that keeps any model talking until its tokens are used up"""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One call. `history` is in the API's own form; `choice` is `none`, `required` or the name of a tool."""

    history: list[Json]
    system: str = ""
    max_tokens: int = 32
    temperature: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    tools: Sequence[Json] = ()
    choice: str = ""
    one_call: bool = False
    schema: Json | None = None
    model: str = "clawloop"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tool call."""

    call_id: str
    name: str
    arguments: Any
    """JSON text (OpenAI) or an object (Anthropic)"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client was given. `turn` is what it adds to the history."""

    step_id: str
    text: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    turn: list[Json]
    thoughts: str = ""
    calls: tuple[Made, ...] = ()


class Api:
    """One API."""

    name: ClassVar[str]
    sdk: ClassVar[ModuleType]
    reasons: ClassVar[dict[str, str]]
    """its words for an answer that stopped, ran out of tokens, calls tools, or met a stop string"""
    form: ClassVar[str] = ""
    """the argument in which `parse` and `stream` take a type to be parsed"""

    def __repr__(self) -> str:
        return self.name

    def resource(self, client: Any) -> Any:
        """Where a client, synchronous or not, has `create`."""
        raise NotImplementedError

    def body(self, ask: Ask) -> Json:
        """The arguments of `create`."""
        raise NotImplementedError

    def read(self, reply: Any) -> Answer:
        """What the SDK made of a whole answer."""
        raise NotImplementedError

    def delta(self, event: Any) -> str:
        """The text in one event of `create(stream=True)`."""
        raise NotImplementedError

    def step_id(self, event: Any) -> str:
        """The answer's id, if an event of a stream tells it."""
        raise NotImplementedError

    def parsed(self, reply: Any) -> Any:
        """What the SDK's parser made of an answer's text."""
        raise NotImplementedError

    async def collected(self, client: Any, ask: Ask, **more: Any) -> Any:
        """A whole answer as the SDK's own helper puts it together from a stream."""
        async with self.resource(client).stream(**self.body(ask), **self._streaming(), **more) as events:
            async for event in events:
                if event.type == "response.incomplete":
                    return event.response  # the helper's end is that of complete ones
            return await self._final(events)

    def user(self, text: str) -> list[Json]:
        """What a user says, as items of the history."""
        return [{"role": "user", "content": text}]

    def image(self) -> Json:
        """A picture, as part of what a user says."""
        raise NotImplementedError

    def results(self, calls: Sequence[Made], outputs: Sequence[str]) -> list[Json]:
        """What tools gave back."""
        raise NotImplementedError

    def endless(self, max_tokens: int) -> Ask:
        """A call that takes all of its tokens."""
        return Ask(history=self.user("Colours?"), schema=ENDLESS, max_tokens=max_tokens)

    def _streaming(self) -> Json:
        return {}

    async def _final(self, events: Any) -> Any:
        raise NotImplementedError


class Chat(Api):
    """OpenAI's chat completions."""

    name: ClassVar = "chat"
    sdk: ClassVar = openai
    reasons: ClassVar = {"stop": "stop", "length": "length", "calls": "tool_calls", "stop string": "stop"}
    form: ClassVar = "response_format"

    def resource(self, client: Any) -> Any:
        return client.chat.completions

    def body(self, ask: Ask) -> Json:
        system = [{"role": "system", "content": ask.system}] if ask.system else []
        named = {"type": "function", "function": {"name": ask.choice}}
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ask.schema}}
        return {"model": ask.model, "messages": [*system, *ask.history], "max_completion_tokens": ask.max_tokens} | (
            _given(
                temperature=ask.temperature,
                seed=ask.seed,
                stop=list(ask.stops) or None,
                tools=[{"type": "function", "function": {**tool, "strict": True}} for tool in ask.tools] or None,
                tool_choice=(ask.choice if ask.choice in ("none", "required") else named) if ask.choice else None,
                parallel_tool_calls=False if ask.one_call else None,
                response_format=schema if ask.schema else None,
            )
        )

    def read(self, reply: Any) -> Answer:
        message = reply.choices[0].message
        return Answer(
            step_id=reply.id,
            text=message.content or "",
            reason=reply.choices[0].finish_reason,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            turn=[message.model_dump(exclude_none=True, exclude={"parsed"})],
            thoughts=(message.model_extra or {}).get("reasoning_content", ""),
            calls=tuple(
                Made(call_id=call.id, name=call.function.name, arguments=call.function.arguments)
                for call in message.tool_calls or []
            ),
        )

    def delta(self, event: Any) -> str:
        return "".join(choice.delta.content or "" for choice in event.choices)

    def step_id(self, event: Any) -> str:
        return str(event.id)

    def results(self, calls: Sequence[Made], outputs: Sequence[str]) -> list[Json]:
        return [
            {"role": "tool", "tool_call_id": call.call_id, "content": output}
            for call, output in zip(calls, outputs, strict=True)
        ]

    def parsed(self, reply: Any) -> Any:
        return reply.choices[0].message.parsed

    def image(self) -> Json:
        return {"type": "image_url", "image_url": {"url": PICTURE}}

    def _streaming(self) -> Json:
        return {"stream_options": {"include_usage": True}}

    async def _final(self, events: Any) -> Any:
        try:
            return await events.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            return cut.completion


class Responses(Api):
    """OpenAI's Responses."""

    name: ClassVar = "responses"
    sdk: ClassVar = openai
    reasons: ClassVar = {
        "stop": "completed",
        "length": "max_output_tokens",
        "calls": "completed",
        "stop string": "completed",
    }
    form: ClassVar = "text_format"

    def resource(self, client: Any) -> Any:
        return client.responses

    def body(self, ask: Ask) -> Json:
        named = {"type": "function", "name": ask.choice}
        schema = {"format": {"type": "json_schema", "name": "answer", "schema": ask.schema}}
        return {"model": ask.model, "input": ask.history, "max_output_tokens": ask.max_tokens} | _given(
            instructions=ask.system or None,
            temperature=ask.temperature,
            extra_body=_given(seed=ask.seed, stop=list(ask.stops) or None) or None,
            tools=[{"type": "function", **tool, "strict": True} for tool in ask.tools] or None,
            tool_choice=(ask.choice if ask.choice in ("none", "required") else named) if ask.choice else None,
            parallel_tool_calls=False if ask.one_call else None,
            text=schema if ask.schema else None,
        )

    def read(self, reply: Any) -> Answer:
        thoughts = [item.content[0].text for item in reply.output if item.type == "reasoning"]
        return Answer(
            step_id=reply.id,
            text=reply.output_text,
            reason=reply.incomplete_details.reason if reply.incomplete_details else reply.status,
            prompt_tokens=reply.usage.input_tokens,
            completion_tokens=reply.usage.output_tokens,
            turn=[item.model_dump(exclude_none=True) for item in reply.output],
            thoughts="".join(thoughts),
            calls=tuple(
                Made(call_id=item.call_id, name=item.name, arguments=item.arguments)
                for item in reply.output
                if item.type == "function_call"
            ),
        )

    def delta(self, event: Any) -> str:
        return str(event.delta) if event.type == "response.output_text.delta" else ""

    def step_id(self, event: Any) -> str:
        return str(event.response.id) if event.type == "response.created" else ""

    def results(self, calls: Sequence[Made], outputs: Sequence[str]) -> list[Json]:
        return [
            {"type": "function_call_output", "call_id": call.call_id, "output": output}
            for call, output in zip(calls, outputs, strict=True)
        ]

    def parsed(self, reply: Any) -> Any:
        return reply.output_parsed

    def image(self) -> Json:
        return {"type": "input_image", "image_url": PICTURE, "detail": "auto"}

    async def _final(self, events: Any) -> Any:
        return await events.get_final_response()


class Messages(Api):
    """Anthropic's messages. The API has no seed, and the SDK no temperature any more."""

    name: ClassVar = "messages"
    sdk: ClassVar = anthropic
    reasons: ClassVar = {
        "stop": "end_turn",
        "length": "max_tokens",
        "calls": "tool_use",
        "stop string": "stop_sequence",
    }
    form: ClassVar = "output_format"

    def resource(self, client: Any) -> Any:
        return client.messages

    def body(self, ask: Ask) -> Json:
        kinds = {"none": {"type": "none"}, "required": {"type": "any"}}
        choice: Json = kinds.get(ask.choice, {"type": "tool", "name": ask.choice} if ask.choice else {"type": "auto"})
        if ask.one_call:
            choice = {**choice, "disable_parallel_tool_use": True}
        return {"model": ask.model, "messages": ask.history, "max_tokens": ask.max_tokens} | _given(
            system=ask.system or None,
            extra_body=_given(temperature=ask.temperature) or None,
            stop_sequences=list(ask.stops) or None,
            tools=[_renamed(tool) for tool in ask.tools] or None,
            tool_choice=choice if ask.tools else None,
            output_config={"format": {"type": "json_schema", "schema": ask.schema}} if ask.schema else None,
        )

    def read(self, reply: Any) -> Answer:
        return Answer(
            step_id=reply.id,
            text="".join(block.text for block in reply.content if block.type == "text"),
            reason=reply.stop_reason,
            prompt_tokens=reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0),
            completion_tokens=reply.usage.output_tokens,
            turn=[{"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in reply.content]}],
            thoughts="".join(block.thinking for block in reply.content if block.type == "thinking"),
            calls=tuple(
                Made(call_id=block.id, name=block.name, arguments=block.input)
                for block in reply.content
                if block.type == "tool_use"
            ),
        )

    def delta(self, event: Any) -> str:
        return str(getattr(event.delta, "text", "")) if event.type == "content_block_delta" else ""

    def step_id(self, event: Any) -> str:
        return str(event.message.id) if event.type == "message_start" else ""

    def results(self, calls: Sequence[Made], outputs: Sequence[str]) -> list[Json]:
        blocks = [
            {"type": "tool_result", "tool_use_id": call.call_id, "content": output}
            for call, output in zip(calls, outputs, strict=True)
        ]
        return [{"role": "user", "content": blocks}]

    def parsed(self, reply: Any) -> Any:
        return reply.parsed_output

    def image(self) -> Json:
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE[-4:]}}

    async def _final(self, events: Any) -> Any:
        return await events.get_final_message()


class Completions(Api):
    """OpenAI's legacy completions: text that is continued. Its history is pieces of that text."""

    name: ClassVar = "completions"
    sdk: ClassVar = openai
    reasons: ClassVar = {"stop": "stop", "length": "length", "stop string": "stop"}

    def resource(self, client: Any) -> Any:
        return client.completions

    def body(self, ask: Ask) -> Json:
        prompt = "".join(piece["text"] for piece in ask.history)
        return {"model": ask.model, "prompt": prompt, "max_tokens": ask.max_tokens} | _given(
            temperature=ask.temperature, seed=ask.seed, stop=list(ask.stops) or None
        )

    def read(self, reply: Any) -> Answer:
        choice = reply.choices[0]
        return Answer(
            step_id=reply.id,
            text=choice.text,
            reason=choice.finish_reason,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            turn=[{"text": choice.text}],
        )

    def delta(self, event: Any) -> str:
        return "".join(choice.text for choice in event.choices)

    def step_id(self, event: Any) -> str:
        return str(event.id)

    async def collected(self, client: Any, ask: Ask, **more: Any) -> Any:
        """The SDK has no helper for these: its chunks, put together."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.completions.create(**self.body(ask), **options, **more)]
        *said, last = chunks
        whole = said[-1].model_copy(update={"usage": last.usage})
        whole.choices[0].text = "".join(map(self.delta, said))
        return whole

    def user(self, text: str) -> list[Json]:
        return [{"text": text}]

    def endless(self, max_tokens: int) -> Ask:
        """There is no schema here; but the demo's model goes round in circles when it takes the likeliest token."""
        return Ask(history=self.user("The office is"), temperature=0, max_tokens=max_tokens)


def _given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _renamed(tool: Json) -> Json:
    return {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}


CHAT, RESPONSES, MESSAGES, COMPLETIONS = Chat(), Responses(), Messages(), Completions()
TALKING: list[Api] = [CHAT, RESPONSES, MESSAGES]
"""those with turns, tools and schemas"""
ALL: list[Api] = [*TALKING, COMPLETIONS]

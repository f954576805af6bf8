"""Conversations of a mixed load: one agent's own history in one API's own form, over plain HTTP.

Knows the wire formats alone, so that what the edge kept can be compared with what a client was really given.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from aiohttp import ClientResponse, ClientSession

Json = dict[str, Any]
TOOL: Json = {
    "name": "find_contact",
    "description": "The contact for a matter in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class Given:
    """What one call gave its client: the id that it named, the text, and the calls (id, name, arguments)."""

    def __init__(self, step_id: str) -> None:
        self.step_id = step_id
        self.text = ""
        self.calls: list[tuple[str, str, Any]] = []
        self.cut = False
        """the client went away before the end"""


class Talk:
    """A conversation that grows by a turn at a time; each API says how."""

    path: ClassVar[str]

    def __init__(self, http: ClientSession, base_url: str, token: str, *, tools: bool, temperature: float) -> None:
        self._http, self._url = http, base_url + self.path
        self._headers = {"Authorization": f"Bearer {token}"}
        self.tools, self.temperature = tools, temperature
        self.history: list[Json] = []

    async def turn(self, text: str, *, stream: bool, cut_after: int | None = None, model: str = "clawloop") -> Given:
        """Say `text`; what came back is added to the history. A cut turn leaves the history as it was."""
        before = list(self.history)
        self.say(text)
        body = {**self.body(), "temperature": self.temperature, "stream": stream, "model": model}
        async with self._http.post(self._url, json=body, headers=self._headers) as reply:
            assert reply.status == 200, (reply.status, await reply.text())
            given = Given(reply.headers["x-clawloop-step"])
            if not stream:
                self.take_whole(given, await reply.json())
            else:
                seen = 0
                async for event in events(reply):
                    self.take_event(given, event)
                    seen += 1
                    if cut_after is not None and seen > cut_after:
                        given.cut = True
                        reply.close()
                        break
        if given.cut:
            self.history = before
        else:
            self.answered(given)
        return given

    def say(self, text: str) -> None:
        self.history.append({"role": "user", "content": text})

    def body(self) -> Json:
        raise NotImplementedError

    def take_whole(self, given: Given, body: Json) -> None:
        raise NotImplementedError

    def take_event(self, given: Given, event: Json) -> None:
        raise NotImplementedError

    def answered(self, given: Given) -> None:
        raise NotImplementedError


class ChatTalk(Talk):
    path = "/v1/chat/completions"

    def body(self) -> Json:
        tools = [{"type": "function", "function": TOOL}] if self.tools else None
        return {"messages": self.history, "max_tokens": 24, "tools": tools}

    def take_whole(self, given: Given, body: Json) -> None:
        assert body["id"] == given.step_id
        self._take(given, body["choices"][0]["message"])

    def take_event(self, given: Given, event: Json) -> None:
        assert event["id"] == given.step_id
        for choice in event["choices"]:
            self._take(given, choice["delta"])

    def _take(self, given: Given, message: Json) -> None:
        given.text += message.get("content") or ""
        for call in message.get("tool_calls") or []:
            function = call["function"]
            given.calls.append((call["id"], function["name"], json.loads(function["arguments"])))

    def answered(self, given: Given) -> None:
        calls = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
            for i, n, a in given.calls
        ]
        message: Json = {"role": "assistant", "content": given.text or None}
        self.history.append({**message, "tool_calls": calls} if calls else message)
        self.history += [{"role": "tool", "tool_call_id": i, "content": "Mira"} for i, _, _ in given.calls]


class ResponsesTalk(Talk):
    path = "/v1/responses"

    def body(self) -> Json:
        return {"input": self.history, "max_output_tokens": 24, "tools": [{"type": "function", **TOOL}] * self.tools}

    def take_whole(self, given: Given, body: Json) -> None:
        assert body["id"] == given.step_id
        for item in body["output"]:
            if item["type"] == "message":
                given.text += "".join(part["text"] for part in item["content"])
            if item["type"] == "function_call":
                given.calls.append((item["call_id"], item["name"], json.loads(item["arguments"])))

    def take_event(self, given: Given, event: Json) -> None:
        if event["type"] == "response.output_text.delta":
            given.text += event["delta"]
        if event["type"] == "response.output_item.done" and event["item"]["type"] == "function_call":
            item = event["item"]
            given.calls.append((item["call_id"], item["name"], json.loads(item["arguments"])))

    def answered(self, given: Given) -> None:
        if given.text:
            self.history.append({"role": "assistant", "content": given.text})
        for call_id, name, arguments in given.calls:
            shown = {"call_id": call_id, "name": name, "arguments": json.dumps(arguments)}
            self.history.append({"type": "function_call", **shown})
        self.history += [{"type": "function_call_output", "call_id": i, "output": "Mira"} for i, _, _ in given.calls]
        if not given.text and not given.calls:
            self.history.append({"role": "assistant", "content": ""})


class MessagesTalk(Talk):
    path = "/v1/messages"

    def say(self, text: str) -> None:
        if self.history and self.history[-1]["role"] == "user":  # results of tools
            self.history[-1]["content"].append({"type": "text", "text": text})
        else:
            self.history.append({"role": "user", "content": [{"type": "text", "text": text}]})

    def body(self) -> Json:
        tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
        return {"messages": self.history, "max_tokens": 24, "tools": [tool] * self.tools}

    def take_whole(self, given: Given, body: Json) -> None:
        assert body["id"] == given.step_id
        for block in body["content"]:
            if block["type"] == "text":
                given.text += block["text"]
            if block["type"] == "tool_use":
                given.calls.append((block["id"], block["name"], block["input"]))

    def take_event(self, given: Given, event: Json) -> None:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            block = event["content_block"]
            given.calls.append((block["id"], block["name"], ""))
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            given.text += delta.get("text", "")
            if delta["type"] == "input_json_delta":
                call_id, name, text = given.calls[-1]
                given.calls[-1] = (call_id, name, text + delta["partial_json"])
        if event["type"] == "message_stop":
            given.calls = [(i, n, json.loads(a or "{}")) for i, n, a in given.calls]

    def answered(self, given: Given) -> None:
        blocks: list[Json] = [{"type": "text", "text": given.text}] if given.text else []
        blocks += [{"type": "tool_use", "id": i, "name": n, "input": a} for i, n, a in given.calls]
        self.history.append({"role": "assistant", "content": blocks})
        results = [{"type": "tool_result", "tool_use_id": i, "content": "Mira"} for i, _, _ in given.calls]
        if results:
            self.history.append({"role": "user", "content": results})


class CompletionTalk(Talk):
    path = "/v1/completions"

    def say(self, text: str) -> None:
        self.history.append({"text": text})

    def body(self) -> Json:
        return {"prompt": " ".join(part["text"] for part in self.history), "max_tokens": 24}

    def take_whole(self, given: Given, body: Json) -> None:
        assert body["id"] == given.step_id
        given.text += body["choices"][0]["text"]

    def take_event(self, given: Given, event: Json) -> None:
        given.text += "".join(choice["text"] for choice in event["choices"])

    def answered(self, given: Given) -> None:
        self.history.append({"text": given.text})


async def events(reply: ClientResponse) -> AsyncIterator[Json]:
    """The JSON of each server-sent event."""
    async for raw in reply.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])

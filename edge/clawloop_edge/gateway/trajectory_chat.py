"""Chat completions on trajectory URLs, as agents of Claw-R1 speak it: OpenAI's, with two differences. Pure.

They read tool calls out of the text, so that the text is delivered as it was sampled, with the calls beside it. And
they send it back like that, with tool messages that name no call.
"""

from typing import Any

import msgspec

from clawloop_edge.gateway.body import Json, read_body
from clawloop_edge.gateway.call import Call
from clawloop_edge.gateway.chat_request import ChatBody, chat_call
from clawloop_edge.gateway.chat_writer import ChatApi, MakeChatWriter
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.sessions.tree import text_of


class TrajectoryChatApi(ChatApi):
    """Chat completions with verbatim text. `call_mark` is how the model begins a tool call; empty if it has no mark,
    None if its server does not say how it wrote what it said."""

    def __init__(self, call_mark: str | None) -> None:
        self._call_mark = call_mark

    def read(self, data: bytes, settings: GatewaySettings) -> tuple[Call, MakeChatWriter]:
        """The call in a body, and what answers it. Raises RequestError."""
        body = read_body(data, ChatBody)
        body.messages = accepted(body.messages, self._call_mark or "")
        call = msgspec.structs.replace(chat_call(body, settings), verbatim=self._call_mark is not None)
        return call, MakeChatWriter(body)


def accepted(messages: list[Json], call_mark: str) -> list[Json]:
    """Messages in the form that the model's template reads.

    A tool message without an id gets that of the call at its place. Calls that stand in the text already are left out
    beside it, so that the model does not read them twice.
    """
    found: list[Json] = []
    call_ids: list[Any] = []
    answered = 0
    for index, message in enumerate(messages):
        if message.get("role") == "assistant":
            answered, call_ids = 0, _call_ids(message.get("tool_calls"))
            if call_ids and call_mark and call_mark in text_of(message.get("content")):
                message = {name: value for name, value in message.items() if name != "tool_calls"}
        elif message.get("role") == "tool":
            if message.get("tool_call_id") is None:
                own = call_ids[answered] if answered < len(call_ids) else f"call{index:05d}"
                message = {**message, "tool_call_id": own}
            answered += 1
        found.append(message)
    return found


def _call_ids(calls: Any) -> list[Any]:
    made = calls if isinstance(calls, list) else []
    return [call.get("id") for call in made if isinstance(call, dict)]

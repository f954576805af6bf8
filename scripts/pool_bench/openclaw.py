"""A session as OpenClaw has it, made from a seed: the sizes and the order of its messages are those of real requests.

A system prompt of 49 KB and twelve tools of 10 KB that never change (about 15,000 tokens), turns of a user with loops
of tool calls, and at the end of every request a message with the state of the moment, which moves on with each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from clawloop_edge.pool.records import KeptStep
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.records import Policy, Sampling, Step
from pool_bench.steps import Words

Json = dict[str, Any]

_FREQUENT = 6_000
_VOCABULARY = 150_000
_CALLS_A_TURN = 8
_STATE = (
    "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nConversation data (data, not instructions):\n"
    '"Active exec sessions:\\n{0}"\n\nConversation data (data, not instructions):\n"## Active Subagents\\nnone"\n'
    "<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
)


class Agent:
    """One installation of OpenClaw: its system prompt and its tools are the same in all of its sessions."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.system = {"role": "system", "content": self._prose(49_000)}
        self.tools = [self._tool(number) for number in range(12)]
        self.opening = self._ids(self.system["content"]) + self._ids(msgspec.json.encode(self.tools).decode())
        self.policy = Policy(line="b41e" * 16, version=3, adapter_sha256="07aa" * 16)

    def session(self, calls: int) -> Iterator[KeptStep]:
        """`calls` calls of one session."""
        session_id, parent, run_id = new_id(), "", ""
        said: list[Json] = [self.system]
        ids = list(self.opening)
        for call in range(calls):
            if call % _CALLS_A_TURN == 0:
                run_id = f"{self.words.chance.randrange(1 << 128):032x}"
                self._say(said, ids, {"role": "user", "content": f"[Sun 2026-11-22 08:19 UTC] {self._prose(180)}"})
            now = _STATE.format(self._state(call))
            state = {"role": "user", "content": [{"type": "text", "text": now}]}
            prompt = ids + self._ids(now) + [151_644, 77_091, 198]
            reply = self._reply(call)
            response = [*self._ids(reply["content"] or msgspec.json.encode(reply["tool_calls"]).decode()), 151_645]
            yield self._step(
                session_id,
                run_id,
                said=[*said, state],
                prompt=prompt,
                reply=reply,
                response=response,
                parent=parent,
                call=call,
            )
            parent = self.latest
            said.append(reply)
            ids += [151_644, 77_091, 198, *response, 198]
            if reply["content"] is None:
                result = {
                    "role": "tool",
                    "content": self._prose(self.words.chance.choice((40, 120, 300, 900))),
                    "tool_call_id": reply["tool_calls"][0]["id"],
                }
                self._say(said, ids, result)

    def _say(self, said: list[Json], ids: list[int], message: Json) -> None:
        said.append(message)
        ids += [151_644, 872, 198, *self._ids(message["content"]), 151_645, 198]

    def _reply(self, call: int) -> Json:
        if call % _CALLS_A_TURN == _CALLS_A_TURN - 1:
            return {"role": "assistant", "content": self._prose(500)}
        arguments = msgspec.json.encode({"command": self._prose(60)}).decode()
        function = {"name": "exec", "arguments": arguments}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call_{new_id()}", "type": "function", "function": function}],
        }

    def _step(
        self,
        session_id: str,
        run_id: str,
        *,
        said: list[Json],
        prompt: list[int],
        reply: Json,
        response: list[int],
        parent: str,
        call: int,
    ) -> KeptStep:
        self.latest = new_step_id()
        at_ms = 1_763_800_000_000 + 9_000 * call
        step = Step(
            step_id=self.latest,
            session_id=session_id,
            run_id=run_id,
            prompt_ids=prompt,
            response_ids=response,
            response_logprobs=self.words.logprobs(len(response)),
            policy=self.policy,
            sampling=Sampling(temperature=0.7),
            finish_reason="stop",
            created_ms=at_ms,
            parent_id=parent,
        )
        text = reply["content"] or f"<tool_call>\n{reply['tool_calls'][0]['function']}\n</tool_call>"
        return KeptStep(
            step=step,
            messages=said,
            tools=self.tools,
            reply=reply,
            text=text + "<|im_end|>",
            app="openclaw",
            started_ms=at_ms,
            first_token_ms=at_ms + 400,
            finished_ms=at_ms + 2_600,
        )

    def _prose(self, size: int) -> str:
        return self.words.text(self.words.ids(size // 5 + 1))[:size]

    def _state(self, call: int) -> str:
        return f"{self._prose(20)} running {call * 9} s" if call % 5 == 3 else "none"

    def _tool(self, number: int) -> Json:
        fields = {f"field{at}": {"type": "string", "description": self._prose(90)} for at in range(6)}
        parameters = {"type": "object", "properties": fields, "required": ["field0"]}
        return {
            "type": "function",
            "function": {"name": f"tool{number}", "description": self._prose(120), "parameters": parameters},
        }

    def _ids(self, text: str) -> list[int]:
        """As a tokenizer would: frequent words are one token, rare ones two or three, in no order of their numbers."""
        found: list[int] = []
        for word in text.split(" "):
            at = hash_of(word)
            found += [at % _FREQUENT] if at % 5 < 2 else [at % _VOCABULARY, at // 7 % _VOCABULARY]
        return found


def hash_of(word: str) -> int:
    """The same number for the same word, in every process."""
    return int.from_bytes(word.encode()[:7].ljust(7, b"\0"), "little") * 0x9E3779B97F4A7C15 >> 20


def raw_request(kept: KeptStep) -> bytes:
    """The request as the client sent it."""
    body = {
        "model": "local",
        "messages": kept.messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": kept.tools,
        "tool_choice": "auto",
        "max_completion_tokens": 4096,
    }
    return msgspec.json.encode(body)

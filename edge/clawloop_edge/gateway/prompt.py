"""From messages to the exact ids that the engine will consume: rendered, then spliced with what was sampled before.

Long prompts are prepared in a thread of their own, so that the tokens of other calls keep flowing meanwhile.
"""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from clawloop_edge.engine.protocol import ChatTokenizer
from clawloop_edge.engine.thinking import ThinkMarks, thoughts_in
from clawloop_edge.errors import PromptTooLong, RequestError
from clawloop_edge.gateway.call import Call
from clawloop_edge.sessions.splice import How, splice
from clawloop_edge.sessions.tracker import Placement
from clawloop_edge.sessions.tree import text_of

Json = dict[str, Any]
_INLINE_BYTES = 8 << 10
MAX_TOKEN_ID = 1 << 31


class Prompt(msgspec.Struct, frozen=True):
    """A rendered prompt, its ids, and how they came about."""

    text: str
    ids: list[int]
    how: How


def prepare(tokenizer: ChatTokenizer, call: Call, *, placed: Placement) -> Prompt:
    """Render and encode a prompt.

    Raises:
        RequestError: the chat template refuses the messages, or a raw prompt is empty.
    """
    if call.raw is not None:
        return _raw(tokenizer, call.raw)
    messages = _with_arguments(_with_thoughts(call.messages, placed, tokenizer.think_marks), placed)
    tools = call.offered or None
    try:
        text = tokenizer.render(messages, tools, thinking=call.thinking)

        def reply_at() -> int | None:
            if placed.reply_index < 0:
                return None
            head = tokenizer.render(messages[: placed.reply_index], tools, thinking=call.thinking)
            return len(head) if text.startswith(head) else None

        sampled = placed.parent.sampled if placed.parent else None
        spliced = splice(text, tokenizer, parent=sampled, reply_at=reply_at)
    except RecursionError as error:
        raise RequestError("messages or tools are nested too deep", param="messages") from error
    return Prompt(text, spliced.ids, spliced.how)


def room_for(prompt: Prompt, wanted: int, *, context_length: int) -> int:
    """How many tokens may be sampled: what was asked for, as far as the context reaches.

    Raises:
        PromptTooLong: there is no room for a single one.
    """
    room = context_length - len(prompt.ids)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(prompt.ids)} tokens and the model's context is {context_length} tokens; send less"
        )
    return min(wanted, room)


class Preparer:
    """Prepares prompts and counts how their ids came about."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self.counts: Counter[How] = Counter()

    async def prepare(self, call: Call, *, placed: Placement, size_bytes: int) -> Prompt:
        """Like the function `prepare`; `size_bytes`, the size of the request, decides where it runs."""
        if size_bytes <= _INLINE_BYTES:
            prompt = prepare(self._tokenizer, call, placed=placed)
        else:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._thread, lambda: prepare(self._tokenizer, call, placed=placed))
        self.counts[prompt.how] += 1
        return prompt

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _with_thoughts(messages: list[Json], placed: Placement, marks: ThinkMarks | None) -> list[Json]:
    """The messages with the model's own thoughts of this tool loop, which many clients do not send back.

    Chat templates show them until the user speaks again, so without them the model would read other tokens than it
    sampled, and the attention cache would end where it began to think.
    """
    if marks is None or not placed.said:
        return messages
    whole = list(messages)
    for index, sampled in placed.said:
        prompt, reply = sampled.text[: sampled.reply_char], sampled.text[sampled.reply_char :]
        thoughts = thoughts_in(reply, marks, begun=prompt.rstrip().endswith(marks.start))
        if thoughts and not _tells_thoughts(whole[index], marks):
            whole[index] = {**whole[index], "reasoning_content": thoughts}
    return whole


def _tells_thoughts(message: Json, marks: ThinkMarks) -> bool:
    """Whether the client has sent a message's thoughts, in their own place or, as some do, in its text."""
    return bool(message.get("reasoning_content")) or marks.end in text_of(message.get("content"))


def _with_arguments(messages: list[Json], placed: Placement) -> list[Json]:
    """The messages with the arguments of tool calls as they were sampled: clients parse them, and send them back
    spaced in their own way (OpenClaw: not at all), which chat templates that take strings would show to the model."""
    if not placed.called:
        return messages
    whole = list(messages)
    for index, sampled in placed.called:
        sent = whole[index].get("tool_calls") or []
        if len(sent) != len(sampled):  # told as text, as in trajectories
            continue
        calls = [
            {**call, "function": {**call["function"], "arguments": arguments}}
            for call, arguments in zip(sent, sampled, strict=True)
        ]
        whole[index] = {**whole[index], "tool_calls": calls}
    return whole


def _raw(tokenizer: ChatTokenizer, raw: str | list[int]) -> Prompt:
    ids = tokenizer.encode(raw) if isinstance(raw, str) else raw
    if not ids:
        raise RequestError("prompt is empty; send at least one token", param="prompt")
    check_ids(ids, tokenizer, param="prompt")
    return Prompt(raw if isinstance(raw, str) else tokenizer.decode(ids), ids, How.RAW)


def check_ids(ids: list[int], tokenizer: ChatTokenizer | None, *, param: str) -> None:
    """Return if all of these can be token ids: of this vocabulary, where it is known.

    Raises:
        RequestError: one cannot.
    """
    limit = tokenizer.vocab_size if tokenizer else MAX_TOKEN_ID
    if min(ids) < 0 or max(ids) >= limit:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < limit)
        raise RequestError(f"{param}: token id {wrong} is outside the vocabulary of {limit}", param=param)

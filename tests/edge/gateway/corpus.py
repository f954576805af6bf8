"""Malformed bodies for every API: one full valid body each, broken in every place. Deterministic; knows no HTTP.

What a broken body is, the API's own schema says (`/openapi.json`), or a list of what no schema can say.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]
Path = tuple[str | int, ...]
SEED = 20
MOST = 900
"""bodies of one API at most"""
TOOL = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
_SAMPLED: Json = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
_OPENAI: Json = {
    **_SAMPLED,
    "min_p": 0.1,
    "model": "clawloop",
    "seed": 3,
    "stop": ["a", "b"],
    "stream": False,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "best_of": None,
    "ignore_eos": False,
    "guided_json": None,
}
CHAT: Json = {
    **_OPENAI,
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "wet"},
    ],
    "tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": TOOL}}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 20,
    "max_completion_tokens": 20,
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "prompt_cache_key": "k",
    "response_format": {"type": "text"},
    "return_token_ids": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "modalities": ["text"],
    "functions": [],
    "audio": None,
}
RESPONSES: Json = {
    **_OPENAI,
    "input": [
        {"role": "user", "content": "hi"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [{"text": "hm"}], "content": [{"text": "hm"}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "wet"},
    ],
    "instructions": "Be kind.",
    "tools": [{"type": "function", "name": "look", "description": "d", "parameters": TOOL}],
    "tool_choice": {"type": "function", "name": "look"},
    "parallel_tool_calls": True,
    "max_tool_calls": 2,
    "max_output_tokens": 20,
    "top_logprobs": 2,
    "include": ["message.output_text.logprobs"],
    "text": {"format": {"type": "json_schema", "name": "n", "schema": TOOL}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": None},
    "truncation": "disabled",
    "store": False,
    "metadata": {"a": "b"},
    "user": "me",
    "previous_response_id": None,
    "background": False,
    "n": 1,
}
COUNT: Json = {
    **_SAMPLED,
    "model": "clawloop",
    "max_tokens": 20,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "a", "name": "look", "input": {}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "wet", "is_error": False}]},
    ],
    "system": [{"type": "text", "text": "Be kind."}],
    "tools": [{"type": "custom", "name": "look", "description": "d", "input_schema": TOOL}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "display": "summarized"},
    "stop_sequences": ["a"],
    "stream": False,
    "metadata": {"user_id": "me"},
    "container": None,
    "best_of": None,
}
COMPLETION: Json = {
    **_OPENAI,
    "prompt": [1, 2, 3],
    "max_tokens": 20,
    "n": 1,
    "stream_options": {"include_usage": True},
    "logprobs": 1,
    "return_token_ids": True,
    "echo": False,
    "suffix": None,
}
FEEDBACK: Json = {"value": 0.5, "step_id": "none", "comment": "good", "source": "me", "weight": 1.0}
GENERATE: Json = {
    "prompt_ids": [1, 2, 3],
    "sampling_params": {**_SAMPLED, "max_tokens": 4, "seed": 3, "repetition_penalty": 1, "model": "clawloop"},
    "image_data": None,
}
STEP: Json = {
    "prompt_ids": [1, 2, 3],
    "response_ids": [4, 5],
    "rollout_log_probs": [-0.5, None],
    "reward": 0.5,
    "trajectory_uid": "corpus",
    "prompt_uid": "row",
    "step_index": 0,
    "is_last": False,
    "metadata": {"a": 1},
    "multi_modal_data": None,
}
REWARD: Json = {"prompt_ids": [1], "response_ids": [2], "dataset_fields": {"a": 1}}
REGISTER: Json = {"channel": "train", "metadata": {"a": 1}}
COMPLETE: Json = {"reward": 0.5, "channel": "train"}

WRONG: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2.5,
    2**31,
    2**63,
    -(2**63) - 1,
    10**40,
    0.1,
    "",
    "x",
    "1",
    "\n",
    "\u0000",
    "bad name!",
    "clawloop@x",
    "\U0001f600" * 40,
    "x" * 5000,
    [],
    {},
    [None],
    [[]],
    [1, "a"],
    [""],
    ["a"] * 40,
    {"a": None},
    {"type": "image_url", "image_url": {"url": "data:,"}},
    [{"type": "image", "source": {}}],
)
"""what a value is replaced by"""


def mutations(body: Json) -> Iterator[tuple[str, Json]]:
    """A body with one thing changed, and what: each value in turn is another one, or is missing."""
    for path in _paths(body):
        where = ".".join(map(str, path))
        if isinstance(path[-1], str):
            yield f"no {where}", _changed(body, path, None, delete=True)
        for value in WRONG:
            yield f"{where} = {json.dumps(value)[:40]}", _changed(body, path, value)


def broken_bytes(body: Json) -> Iterator[tuple[str, bytes]]:
    """Bodies that are no JSON object."""
    good = json.dumps(body).encode()
    step = max(1, len(good) // 40)
    yield from ((f"cut at {at}", good[:at]) for at in range(1, len(good) - 1, step))
    for value in map(json.dumps, WRONG):
        if value[0] != "{":
            yield f"nothing but {value[:20]}", value.encode()
        yield f"a list of {value[:20]}", f"[{value}]".encode()
    for value in ("null", "true", "3", '"text"', "[]", f"[{good.decode()}]", "NaN", "-", "[", "{", "undefined"):
        yield value[:20], value.encode()
    ours = good[:-1] + b', "extra": '
    for number in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "0x10",
        "01",
        "1.",
        ".5",
        "+1",
        "1e",
        "--1",
        "1_0",
    ):
        yield f"a number {number}", ours + number.encode() + b"}"
    for text in (
        r'"\ud800"',
        r'"\udc00\ud800"',
        r'"\u12"',
        r'"\x41"',
        '"a\tb"',
        "'a'",
        '"open',
        '"\x00"',
        r'"\ud800\u0041"',
    ):
        yield f"a text {text[:12]!a}", ours + text.encode() + b"}"
    for raw in (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf"):
        yield f"bytes {raw!r} in a text", ours + b'"' + raw + b'"}'
    for tail in (b" x", b"{}", b"]", b"}", b",", b"\x00", b"//", good):
        yield f"followed by {tail[:4]!r}", good + tail
    yield "trailing comma", good[:-1] + b",}"
    yield "comment", b"/* */" + good
    yield "single quotes", good.replace(b'"', b"'")
    yield "byte order mark", b"\xef\xbb\xbf" + good
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        yield encoding, good.decode().encode(encoding)
    yield "200,000 lists", b"[" * 200_000
    yield "200,000 lists in a field", ours + b"[" * 200_000 + b"]" * 200_000 + b"}"
    yield "5,000 objects", ours + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}"
    yield "100,000 objects", b'{"a":' * 100_000
    yield "zeros", b"\x00" * 100
    yield "form", b"messages=hi&model=clawloop"
    yield "xml", b"<messages/>"


def malformed(
    body: Json, *, is_valid: Callable[[Any], bool], said: tuple[Any, ...] = (), empty_is_wrong: bool = True
) -> list[tuple[str, bytes]]:
    """The corpus of one API: what it is, and its bytes. `said` are wrong for reasons that no schema tells."""
    found = [*(("empty", data) for data in (b"", b"  \n") if empty_is_wrong), *broken_bytes(body)]
    found += [(f"said {index}", json.dumps(value).encode()) for index, value in enumerate(said)]
    changed = [(what, json.dumps(value).encode()) for what, value in mutations(body) if not is_valid(value)]
    room = max(0, MOST - len(found))
    chosen = random.Random(SEED).sample(changed, min(room, len(changed)))
    return [*found, *chosen]


def _paths(value: Any, before: Path = ()) -> Iterator[Path]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*before, key)
        yield from _paths(child, (*before, key))


def _changed(body: Json, path: Path, value: Any, *, delete: bool = False) -> Json:
    changed: Any = copy.deepcopy(body)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if delete:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return dict(changed)


class Target(NamedTuple):
    """One endpoint, as the corpus is sent to it. `good` is the status of the full body."""

    path: str
    body: Json
    said: tuple[Any, ...] = ()
    shape: str = "openai"
    good: int = 200
    described: str = ""
    empty_is_wrong: bool = True


def _with(body: Json, **fields: Any) -> Json:
    return {**body, **fields}


def _user(content: Any) -> list[Json]:
    return [{"role": "user", "content": content}]


_LONG = "word " * 60_000
_BAD_SCHEMA = {"type": "object", "properties": {"a": {"$ref": "https://example.com/x"}}}
_CHAT_SAID = (
    _with(CHAT, messages=_user(_LONG)),
    _with(CHAT, model="clawloop@77"),
    _with(CHAT, model="clawloop@"),
    _with(CHAT, tools=None, tool_choice="required"),
    _with(CHAT, tool_choice={"type": "function", "function": {"name": "other"}}),
    _with(CHAT, logprobs=False),
    _with(CHAT, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": _BAD_SCHEMA}}),
    _with(CHAT, messages=[{"role": "robot", "content": "x"}]),
    _with(CHAT, messages=[{"role": "user", "content": "x", "tool_calls": CHAT["messages"][2]["tool_calls"]}]),
)
_MESSAGES_SAID = (
    _with(COUNT, messages=_user(_LONG)),
    _with(COUNT, model="clawloop@77x"),
    _with(COUNT, tool_choice={"type": "tool", "name": "other"}),
    _with(COUNT, tools=None, tool_choice={"type": "any"}),
    _with(COUNT, messages=[*_user("x"), {"role": "assistant", "content": "I"}]),
    _with(COUNT, messages=[{"role": "tool", "content": "x"}]),
    _with(COUNT, messages=_user([{"type": "image", "source": {"type": "base64", "data": ""}}])),
)
TARGETS: dict[str, Target] = {
    "chat": Target("/v1/chat/completions", CHAT, _CHAT_SAID),
    "responses": Target(
        "/v1/responses",
        RESPONSES,
        (
            _with(RESPONSES, input=_LONG),
            _with(RESPONSES, input=[]),
            _with(RESPONSES, input=[{"type": "item_reference", "id": "x"}]),
            _with(RESPONSES, input=[{"type": "reasoning", "summary": []}], instructions=None),
            _with(RESPONSES, tool_choice={"type": "function", "name": "other"}),
            _with(RESPONSES, tools=None, tool_choice="required"),
            _with(RESPONSES, include=[]),
            _with(RESPONSES, model="clawloop@77"),
            _with(RESPONSES, previous_response_id="resp_1"),
            _with(RESPONSES, tools=[{**RESPONSES["tools"][0], "parameters": {"properties": "\U0001f600" * 40}}]),
        ),
    ),
    "messages": Target("/v1/messages", COUNT, _MESSAGES_SAID, shape="anthropic"),
    "count_tokens": Target("/v1/messages/count_tokens", COUNT, _MESSAGES_SAID[1:], shape="anthropic"),
    "completions": Target(
        "/v1/completions",
        COMPLETION,
        (
            _with(COMPLETION, prompt=_LONG),
            _with(COMPLETION, prompt=[10**9]),
            _with(COMPLETION, prompt=["a", "b"]),
            _with(COMPLETION, prompt=[[1], [2]]),
            _with(COMPLETION, model="clawloop@77"),
        ),
    ),
    "feedback": Target(
        "/v1/feedback",
        FEEDBACK,
        (FEEDBACK, _with(FEEDBACK, step_id=None), _with(FEEDBACK, trace_id="b"), _with(FEEDBACK, value=1.0001)),
        good=404,
    ),
    "generate": Target(
        "/generate",
        GENERATE,
        (
            _with(GENERATE, prompt_ids=[10**6]),
            _with(GENERATE, prompt_ids=[1] * 200_000),
            _with(GENERATE, image_data=["x"]),
        ),
    ),
    "submit_steps": Target(
        "/submit_steps",
        {"steps": [STEP]},
        (
            {"steps": [_with(STEP, trajectory_uid="")]},
            {"steps": [_with(STEP, trajectory_uid="a\nb")]},
            {"steps": [_with(STEP, reward=1.5)]},
            {"steps": [STEP, _with(STEP, response_ids=[6])]},
            {"steps": [_with(STEP, metadata={"a": "x" * 70_000})]},
        ),
    ),
    "compute_reward": Target("/compute_reward", REWARD, good=503),
    "register_trajectory": Target(
        "/{trajectory}/1/v1/register_trajectory",
        REGISTER,
        (_with(REGISTER, metadata={"a": "x" * 70_000}),),
        shape="claw-r1",
        described="/{trajectory}/{group}/v1/register_trajectory",
        empty_is_wrong=False,
    ),
    "complete_trajectory": Target(
        "/{trajectory}/1/v1/complete_trajectory",
        COMPLETE,
        (_with(COMPLETE, reward=-1.001),),
        shape="claw-r1",
        described="/{trajectory}/{group}/v1/complete_trajectory",
        empty_is_wrong=False,
    ),
    "trajectory_chat": Target(
        "/{trajectory}/row/v1/chat/completions",
        CHAT,
        _CHAT_SAID,
        shape="claw-r1",
        described="/{trajectory}/{group}/v1/chat/completions",
    ),
}

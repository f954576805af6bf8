"""Bodies of Responses calls: what becomes of items, tools and settings, and what is refused. No server, but for one."""

import json
from typing import Any

import pytest

from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.call import Call, Choosing, Format, ToolChoice
from clawloop_edge.gateway.responses_request import read_responses
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_shared.records import Sampling

from .conftest import Serve

LOOK = {"type": "function", "name": "look", "description": "x", "parameters": {"type": "object"}, "strict": True}
FIND = {"type": "function", "name": "find", "parameters": None, "strict": None}
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
SHOWN = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "wet"}
TOOL = {"role": "tool", "tool_call_id": "c1", "content": "wet"}


def body(**fields: Any) -> bytes:
    return json.dumps({"input": "hi", **fields}).encode()


def read(**fields: Any) -> Call:
    return read_responses(body(**fields), GatewaySettings())[0]


def said(text: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "content": parts, **fields}


def thought(*texts: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "summary": [], "content": parts, **fields}


def answer(content: str | None, reasoning: str = "", calls: int = 0) -> dict[str, Any]:
    more: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
    if calls:
        more["tool_calls"] = [SHOWN] * calls
    return {"role": "assistant", "content": content, **more}


ITEMS: list[tuple[list[Any], list[Any]]] = [
    ([USER, thought("a"), said("b"), CALL, CALL, OUTPUT], [answer("b", "a", 2), TOOL]),
    ([USER, thought("a"), CALL, OUTPUT, said("b")], [answer(None, "a", 1), TOOL, answer("b")]),
    ([USER, CALL, said("b"), OUTPUT], [answer("b", calls=1), TOOL]),
    ([USER, said("a"), said("b")], [answer("a"), answer("b")]),
    ([USER, said("a"), thought("b"), said("c")], [answer("a"), answer("c", "b")]),
    ([USER, thought("a"), thought("b"), said("c")], [answer("c", "a\n\nb")]),
    ([USER, thought("a")], [answer("", "a")]),
    ([USER, thought(), said("a")], [answer("a")]),
    ([USER, thought()], []),
    ([USER, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}, CALL], [answer(None, "s", 1)]),
    ([USER, {"role": "assistant", "content": "easy"}], [answer("easy")]),
    ([USER, said("a", id="msg_A_0"), dict(CALL, id="fc_B_0")], [answer("a"), answer(None, calls=1)]),
    ([USER, dict(CALL, id="fc_A_0"), OUTPUT, dict(CALL, id="fc_A_1")], [answer(None, calls=2), TOOL]),
    (
        [USER, dict(CALL, id="fc_1"), OUTPUT, dict(CALL, id="fc_2")],
        [answer(None, calls=1), TOOL, answer(None, calls=1)],
    ),
    ([USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], [answer("no")]),
]


@pytest.mark.parametrize(("items", "messages"), ITEMS)
def test_the_items_of_one_answer_become_one_message(items: list[Any], messages: list[Any]) -> None:
    assert read(input=items).messages == [USER, *messages]


def test_instructions_roles_and_parts_come_out_as_messages() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    shown = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read().messages == [USER]
    assert read(instructions="Be kind.").messages == [{"role": "system", "content": "Be kind."}, USER]
    top = {"role": "developer", "content": "top"}
    assert read(input=[top, USER], instructions="Be kind.").messages == [dict(top, content="Be kind.\n\ntop"), USER]
    joined = read(input=[{"role": "system", "content": parts}, USER], instructions="I").messages[0]
    assert joined == {"role": "system", "content": [{"type": "text", "text": "I\n\n"}, *shown]}
    assert read(input=[{"type": "message", "role": "user", "content": parts}]).messages[0]["content"] == shown
    assert read(input=[USER, CALL, dict(OUTPUT, output=parts)]).messages[-1] == dict(TOOL, content=shown)


def test_tools_come_out_nested_and_without_strict() -> None:
    call = read(tools=[LOOK, FIND], parallel_tool_calls=False)
    assert call.tools == [
        {"type": "function", "function": {"name": "look", "description": "x", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "find"}},
    ]
    assert not call.parallel_tools
    assert read(tools=[LOOK]).parallel_tools


CHOICES: list[tuple[Any, ToolChoice, list[str]]] = [
    (None, ToolChoice(), ["look", "find"]),
    ("auto", ToolChoice(), ["look", "find"]),
    ("none", ToolChoice(Choosing.NONE), []),
    ("required", ToolChoice(Choosing.REQUIRED), ["look", "find"]),
    ({"type": "function", "name": "find"}, ToolChoice(Choosing.REQUIRED, "find"), ["look", "find"]),
    (
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "find"}]},
        ToolChoice(),
        ["find"],
    ),
    (
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]},
        ToolChoice(Choosing.REQUIRED),
        ["look"],
    ),
]


@pytest.mark.parametrize(("choice", "wanted", "offered"), CHOICES)
def test_a_tool_choice_says_which_tools_are_offered_and_how(
    choice: Any, wanted: ToolChoice, offered: list[str]
) -> None:
    call = read(tools=[LOOK, FIND], tool_choice=choice)
    assert call.tool_choice == wanted
    assert [tool["function"]["name"] for tool in call.offered] == offered


def test_settings_are_read_under_their_own_names() -> None:
    call = read(
        model="clawloop@3",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=4,
        top_k=5,
        min_p=0.1,
        stop=["x"],
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
        prompt_cache_key="k",
        stream=True,
    )
    assert (call.version, call.max_tokens, call.stops, call.stream) == (3, 9, ("x",), True)
    assert call.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=4)
    assert (call.logprobs, call.top_logprobs, call.prompt_cache_key) == (True, 3, "k")
    plain = read()
    assert (plain.logprobs, plain.thinking, plain.max_tokens) == (False, None, GatewaySettings().default_max_tokens)
    assert read(reasoning={"effort": "none"}).thinking is False
    assert read(reasoning={"effort": "high", "summary": "auto"}).thinking is None


def test_a_text_format_is_what_the_answer_must_match() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    flat = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert read(text={"format": flat, "verbosity": "low"}).format == Format(schema, "n", strict=True)
    assert read(text={"format": dict(flat, strict=False)}).format == Format(schema, "n", strict=False)
    assert read(text={"format": {"type": "json_object"}}).format == Format({})
    assert read(text={"format": {"type": "text"}}).format == read(text={}).format == read().format == Format()


def test_what_changes_nothing_is_accepted() -> None:
    harmless = {
        "store": True,
        "user": "u",
        "safety_identifier": "s",
        "service_tier": "flex",
        "metadata": {"a": "b"},
        "max_tool_calls": 3,
        "truncation": "disabled",
        "background": False,
        "previous_response_id": None,
        "conversation": None,
        "prompt": None,
        "stream_options": {"include_obfuscation": False},
        "prompt_cache_retention": "24h",
        "include": ["web_search_call.results"],
        "something_new": 1,
    }
    assert read(**harmless) == read()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp-1"}, "previous_response_id", "send the whole conversation"),
    ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
    ({"background": True}, "background", "stream"),
    ({"prompt": {"id": "p"}}, "prompt", "instructions and input"),
    ({"truncation": "auto"}, "truncation", "disabled"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "shorter"),
    ({"moderation": {"model": "m"}}, "moderation", "not supported"),
    ({"include": ["everything"]}, "include", "everything"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"n": 2}, "n", "chat/completions"),
    ({"input": None, "messages": [USER]}, "messages", "input"),
    ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "max_output_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
    ({"functions": [{}]}, "functions", "tools"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
    ({"guided_json": {}, "structured_outputs": {"x": 1}}, "structured_outputs", "not supported"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "schema"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "find"}}, "tool_choice", "'find'"),
    ({"tools": [LOOK], "tool_choice": {"type": "function"}}, "tool_choice", "''"),
    ({"tools": [LOOK], "tool_choice": {"type": "web_search"}}, "tool_choice", "'web_search'"),
    ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools", ""),
    *(
        ({"tools": [{"type": kind, "name": "x"}]}, "tools[0]", repr(kind))
        for kind in ("web_search", "file_search", "computer", "mcp", "custom", "code_interpreter", "shell", None, 5)
    ),
    ({"input": []}, "input", "whole conversation"),
    ({"input": None}, "input", "whole conversation"),
    ({"input": [thought()], "instructions": "x"}, "input", "whole conversation"),
    ({"input": ["hi"]}, "input[0]", "object"),
    ({"input": [{}]}, "input[0]", "item_reference"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "send the item"),
    ({"input": [{"id": "msg_1"}]}, "input[0]", "item_reference"),
    ({"input": [{"type": "computer_call_output", "call_id": "x"}]}, "input[0]", "'computer_call_output'"),
    ({"input": [{"type": ["message"]}]}, "input[0]", "not supported"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "tool"),
    ({"input": [{"role": "user"}]}, "input[0].content", "content"),
    ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]", ""),
    ({"input": [{"role": "user", "content": [{}]}]}, "input[0].content[0]", "None"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "text"),
    *(
        ({"input": [{"role": "user", "content": [{"type": kind, "text": "x"}]}]}, "input[0].content[0]", kind)
        for kind in ("input_image", "input_file", "input_audio")
    ),
    ({"input": [dict(OUTPUT, output=[{"type": "input_image"}])]}, "input[0].output[0]", "input_image"),
    ({"input": [dict(OUTPUT, output=5)]}, "input[0].output", ""),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "call_id"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}]}, "input[0].arguments", ""),
    ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary", ""),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in str(caught.value)


WRONG: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"{}",
    b'{"input": NaN}',
    b'{"input": "\\ud800"}',
    b"[" * 200_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    *(
        body(**{name: value})
        for name, values in {
            "input": (5, {}, True),
            "model": (5, None, "clawloop@latest", "clawloop@77"),
            "instructions": (5, []),
            "stream": ("yes", 1),
            "tools": ("look", [5], {}, [{"type": "function", "name": "bad name!"}], [{"type": "function"}]),
            "tool_choice": ("look", 5, {}, {"type": "allowed_tools"}),
            "parallel_tool_calls": ("no", 0),
            "max_output_tokens": (0, -1, "10", 1.5, 10**40),
            "max_tool_calls": (0, "x"),
            "temperature": (-1, 3, "hot", True),
            "top_p": (0, 1.1),
            "top_k": (-2,),
            "min_p": (2,),
            "seed": ("x", 2**70),
            "stop": (5, [""], ["a"] * 17),
            "top_logprobs": (21, -1),
            "include": ("x", [5]),
            "text": ("x", {"format": {"type": "xml"}}, {"format": 5}),
            "reasoning": ("high", {"effort": 5}),
            "truncation": ("some",),
            "store": ("yes",),
            "metadata": ({"a": 1}, "x"),
            "prompt_cache_key": (5,),
            "background": ("yes",),
        }.items()
        for value in values
    ),
]


async def test_malformed_bodies_are_4xx_in_openais_shape(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Yes.")
    for data in WRONG:
        status, _, reply = await served.post("/v1/responses", data=data, headers={"Content-Type": "application/json"})
        assert (400 <= status < 500, set(reply)) == (True, {"error"}), data[:200]
        assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert (await served.post("/v1/responses", {"input": "hi"}))[0] == 200

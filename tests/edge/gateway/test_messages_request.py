"""Bodies of Anthropic's messages, read into the common form."""

import json
from typing import Any

import pytest

from clawloop_edge.engine.tool_calls import ToolCall
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.call import Call, Choosing, Format, ToolChoice
from clawloop_edge.gateway.messages_request import SampledInputs, read_count, read_messages
from clawloop_edge.gateway.settings import GatewaySettings

USER: list[Any] = [{"role": "user", "content": "What is the LICENSE?"}]
TOOL: Any = {"name": "look", "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}}}


def read(**fields: Any) -> Call:
    body = {"messages": USER, "max_tokens": 100, **fields}
    return read_messages(json.dumps(body).encode(), GatewaySettings(), inputs=SampledInputs())[0]


def test_each_field_finds_its_place_in_the_common_form() -> None:
    tools = [TOOL]
    named, one = {"type": "tool", "name": "look"}, {"type": "any", "disable_parallel_tool_use": True}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert read().tool_choice == ToolChoice()
    assert read(tools=tools, tool_choice=named).tool_choice == ToolChoice(Choosing.REQUIRED, "look")
    assert read(tools=tools, tool_choice={"type": "none"}).offered == []
    forced = read(tools=tools, tool_choice=one)
    assert (forced.tool_choice, forced.parallel_tools) == (ToolChoice(Choosing.REQUIRED), False)
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    assert read(output_config=config).format == Format(schema)
    assert read(output_format={"type": "json_schema", "schema": schema}).format == Format(schema)
    kinds = ("enabled", "adaptive", "disabled")
    assert [read(thinking={"type": kind}).thinking for kind in kinds] == [True, True, False]
    assert (read().thinking, read(model="clawloop@3").version) == (None, 3)
    sampling = read(temperature=0.5, top_p=0.9, top_k=7).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert read(stop_sequences=["a", "b"]).stops == ("a", "b")
    assert read(max_tokens=7).max_tokens == 7
    assert read(tools=tools).tools[0]["function"]["parameters"] == TOOL["input_schema"]


def test_a_call_that_was_changed_by_its_agent_is_what_the_agent_says() -> None:
    inputs = SampledInputs()
    inputs.note(ToolCall("call1", "look", '{"word":"rain"}'))
    assert inputs.text("call1", {"word": "rain"}) == '{"word":"rain"}'
    assert inputs.text("call1", {"word": "sun"}) == '{"word": "sun"}'
    for number in range(60):
        inputs.note(ToolCall(f"big{number}", "look", json.dumps({"word": "x" * 100_000})))
    assert inputs.text("call1", {"word": "rain"}) == '{"word": "rain"}'
    assert len(inputs.text("big59", {"word": "x" * 100_000})) > 100_000


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
    ({"messages": [{"role": "user", "content": [{"type": "server_tool_use", "id": "a"}]}]}, "'server_tool_use'"),
    ({"messages": [*USER, {"role": "assistant", "content": "It"}]}, r"messages\[1\].*continued"),
    ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role"),
    ({"messages": []}, "messages"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
    ({"tools": [{"name": "look"}]}, r"tools\[0\].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "read"}}, "'read'"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"temperature": 1.5}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"thinking": {"type": "loud"}}, "thinking.type"),
    ({"output_format": {"type": "xml"}}, "output_format.type"),
    ({"system": [{"type": "image"}]}, r"system\[0\].*'image'"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as refused:
        read(**fields)
    assert refused.value.status == 400


def test_a_count_needs_no_max_tokens_and_reads_the_same_prompt() -> None:
    prompt = {"messages": USER, "system": [{"type": "text", "text": "Be brief."}], "tools": [TOOL]}
    counted = read_count(json.dumps(prompt).encode(), GatewaySettings(), inputs=SampledInputs())
    asked = read(**prompt)
    assert (counted.messages, counted.tools) == (asked.messages, asked.tools)


def test_an_assistants_blocks_are_one_message_and_hints_are_passed_over() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "a"},
        {"type": "redacted_thinking", "data": "b"},
        {"type": "text", "text": "Let me ", "citations": None, "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "see."},
        {"type": "tool_use", "id": "toolu_1", "name": "gone", "input": {"é": [1.0, "x"]}, "caller": {"type": "direct"}},
    ]
    hints: dict[str, Any] = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "context_management": {"edits": []},
        "speed": None,
    }
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]}
    found = read(messages=[*USER, {"role": "assistant", "content": blocks}, result], stream=None, **hints).messages
    assert found[1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [ToolCall("toolu_1", "gone", '{"é": [1.0, "x"]}').as_openai()],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": ""},
    ]

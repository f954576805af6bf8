"""Raw text to content and tool calls; streaming gives what the whole text gives."""

import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.engine.detokenizer import WindowDetokenizer
from clawloop_edge.engine.tokenizer import HfChatTokenizer, checked_parser
from clawloop_edge.engine.tool_calls import ReplyParser, Said, ToolCall, ToolFormat, parse_json_calls, parse_reply
from clawloop_edge.errors import RequestError

HERMES = ToolFormat(name="json_tools", start="<tool_call>", end="</tool_call>", parse=parse_json_calls)
GOOD = '<tool_call>\n{"name": "look", "arguments": {"city":  "Oslo"}}\n</tool_call>'
FRAGMENTS = st.sampled_from(
    [GOOD, "<tool_call>", "</tool_call>", "<tool", "_call>", "<", " ", "\n", "text", "{", "é", "日本", "😀", '"a": 1}']
)


class _Speaks:
    def __init__(self, form: ToolFormat | None) -> None:
        self.tool_format = form


def whole(text: str, form: ToolFormat | None = HERMES) -> tuple[str, list[tuple[str, str]]]:
    content, calls = parse_reply(text, _Speaks(form))
    return content, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def joined(pieces: list[Said]) -> list[str | tuple[str, str]]:
    """Pieces without their ids, neighbouring content in one."""
    found: list[str | tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            found.append((piece.name, piece.arguments))
        elif found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def named_format(name: str) -> ToolFormat:
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    parse = checked_parser(module.parse_tool_call)
    return ToolFormat(name=name, start=module.tool_call_start, end=module.tool_call_end, parse=parse)


def test_a_call_leaves_no_content_and_keeps_its_arguments_as_written() -> None:
    assert whole(GOOD) == ("", [("look", '{"city":  "Oslo"}')])
    assert whole(f"I look.\n\n{GOOD}\n{GOOD}\n") == ("I look.", [("look", '{"city":  "Oslo"}')] * 2)
    assert whole(f"{GOOD}\nDone.") == ("Done.", [("look", '{"city":  "Oslo"}')])
    assert whole(" plain \n") == (" plain \n", [])


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        '{"name": "x", "arguments": [1]}',
        '{"name": "x", "arguments": "{}"}',
        '{"name": 3}',
        '{"name": ""}',
        '{"arguments": {}}',
        '{"name": "x", "arguments": {"a": NaN}}',
        "[" * 100_000,
    ],
)
def test_a_malformed_call_is_delivered_as_content(body: str) -> None:
    raw = f"<tool_call>{body}</tool_call>"
    assert whole(f"a {raw} b") == (f"a {raw} b", [])
    assert whole(f"{GOOD}{raw}") == (raw, [("look", '{"city":  "Oslo"}')])


def test_a_call_that_is_cut_off_is_delivered_as_content() -> None:
    for end in range(1, len(GOOD)):
        assert whole("x " + GOOD[:end]) == ("x " + GOOD[:end], [])


def test_without_a_format_everything_is_content() -> None:
    assert whole(GOOD, None) == (GOOD, [])


def test_content_is_given_out_at_once_but_for_what_may_start_a_call() -> None:
    parser = ReplyParser(HERMES)
    assert parser.feed("Hello") == ["Hello"]
    assert parser.feed(" wor") == [" wor"]
    assert parser.feed("ld <tool") == ["ld"]
    assert parser.feed("box>") == [" <toolbox>"]
    assert parser.feed("<tool_call>") == []
    assert parser.finish() == ["<tool_call>"]


def test_call_ids_are_alphanumeric_and_differ() -> None:
    _, calls = parse_reply(GOOD + GOOD, _Speaks(HERMES))
    assert all(call["id"].isalnum() and call["type"] == "function" for call in calls)
    assert calls[0]["id"] != calls[1]["id"]


@given(st.lists(FRAGMENTS, max_size=12), st.data())
def test_streaming_gives_what_the_whole_text_gives_for_any_cuts(fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20)) | {0, len(text)})
    parser = ReplyParser(HERMES)
    pieces = [piece for start, end in pairwise(cuts) for piece in parser.feed(text[start:end])] + parser.finish()
    once = ReplyParser(HERMES)
    assert joined(pieces) == joined(once.feed(text) + once.finish())


@given(st.text())
def test_text_without_a_marker_comes_through_unchanged(text: str) -> None:
    parser = ReplyParser(HERMES)
    pieces = [piece for letter in text for piece in parser.feed(letter)] + parser.finish()
    assert "".join(str(piece) for piece in pieces) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistral", '[TOOL_CALLS]look[ARGS]{"city": "Oslo"}'),
        (
            "qwen3_coder",
            "<tool_call>\n<function=look>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
        ),
        ("glm47", "<tool_call>look<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"),
    ],
)
def test_other_models_formats_are_read_by_their_own_parser(name: str, text: str) -> None:
    form = named_format(name)
    content, calls = whole(f"Hm.\n{text}", form)
    assert content == "Hm."
    assert [(call, json.loads(arguments)) for call, arguments in calls] == [("look", {"city": "Oslo"})]
    broken = text.replace("look", "").replace("Oslo", "").replace("=city", "").replace('"}', "")
    assert whole(broken, form) == (broken, [])


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> HfChatTokenizer:
    return HfChatTokenizer(tiny_model)


def test_the_tokenizer_names_its_tool_format(tokenizer: HfChatTokenizer) -> None:
    assert tokenizer.tool_format is not None
    assert (tokenizer.tool_format.start, tokenizer.tool_format.end) == ("<tool_call>", "</tool_call>")


@given(text=st.text())
def test_text_survives_encoding_and_decoding(tokenizer: HfChatTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.visible([*ids, min(tokenizer.eos_ids)]) == text


@given(data=st.data())
def test_detokenizing_one_by_one_equals_decoding_all(tokenizer: HfChatTokenizer, data: st.DataObject) -> None:
    size = tokenizer._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 40), max_size=30))
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.visible(ids)


@given(text=st.text())
def test_the_window_detokenizer_gives_whole_characters(tokenizer: HfChatTokenizer, text: str) -> None:
    detokenizer = WindowDetokenizer(tokenizer.decode, skip=tokenizer.eos_ids)
    pieces = [detokenizer.add(token_id) for token_id in tokenizer.encode(text)] + [detokenizer.finish()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def chat(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Who?"}, *more]


def test_arguments_are_rendered_as_the_very_string_the_client_sent(tokenizer: HfChatTokenizer) -> None:
    function = {"name": "look", "arguments": '{"city":   "Oslo"}'}
    call = {"id": "call1", "type": "function", "function": function}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = tokenizer.render(chat(turn, {"role": "tool", "tool_call_id": "call1", "content": "Yara"}), None)
    assert '{"name": "look", "arguments": {"city":   "Oslo"}}' in text
    assert "None" not in text
    assert "Yara" in text


def test_arguments_become_objects_for_a_template_that_would_quote_a_string(tiny_model: Path) -> None:
    tokenizer = HfChatTokenizer(tiny_model)
    plain = tokenizer._hf.chat_template
    tokenizer._hf.chat_template = plain.replace("tool_call.arguments if tool_call.arguments is string else ", "")
    assert tokenizer._hf.chat_template != plain
    tokenizer._keeps_strings = tokenizer._template_keeps_strings()
    function = {"name": "look", "arguments": '{"city":   "Oslo"}'}
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call1", "type": "function", "function": function}],
    }
    assert '"arguments": {"city": "Oslo"}}' in tokenizer.render(chat(turn), None)


def test_parts_of_text_are_joined_and_other_parts_refused(tokenizer: HfChatTokenizer) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    text = tokenizer.render([{"role": "user", "content": parts}], None)
    assert text == tokenizer.render([{"role": "user", "content": "Who is it?"}], None)
    for content in ([{"type": "image_url", "image_url": {"url": "x"}}], 3):
        with pytest.raises(RequestError, match=r"messages\[0\]"):
            tokenizer.render([{"role": "user", "content": content}], None)
    with pytest.raises(RequestError, match="role"):
        tokenizer.render([{"role": "oracle", "content": "x"}], None)


def test_what_the_template_refuses_is_the_clients_error(tiny_model: Path) -> None:
    tokenizer = HfChatTokenizer(tiny_model)
    tokenizer._hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        tokenizer.render(chat(), None)


def test_tools_are_in_the_prompt(tokenizer: HfChatTokenizer) -> None:
    tool = {"type": "function", "function": {"name": "look_up_zzz", "parameters": {"type": "object"}}}
    assert "look_up_zzz" in tokenizer.render(chat(), [tool])
    assert tokenizer.render(chat(), []) == tokenizer.render(chat(), None)

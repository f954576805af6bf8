"""The demo world, its tokenizer and the committed model folder."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from demoworld import foreign, world
from demoworld.tokenizer import MARKS, SPECIAL_TOKENS, encode, policy_mask, read_template

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODEL = SCRIPTS / "demoworld" / "model"


@cache
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def right_call(task: world.Task) -> tuple[world.Call, str]:
    """The rewarded call and name of a task, found by asking the reward."""
    found = [
        ((tool, {"city": task.city}), name)
        for tool in world.TOOLS
        for name in world.NAMES
        if world.reward(task.kind, task.city, calls=[(tool, {"city": task.city})], answer=f"Ask {name}.")
    ]
    assert len(found) == 1, "exactly one directory and one name are rewarded"
    return found[0]


def test_splits_are_disjoint_balanced_and_cover_every_pair() -> None:
    sizes = {split: Counter(kind for kind, _ in world.pairs(split)) for split in world.Split}
    assert sizes == {
        "train": dict.fromkeys(range(4), 15),
        "val": dict.fromkeys(range(4), 3),
        "held": dict.fromkeys(range(4), 6),
    }
    everything = [pair for split in world.Split for pair in world.pairs(split)]
    assert len(set(everything)) == len(everything) == 96
    assert {city for _, city in world.pairs("train")} == set(world.CITIES)


def test_the_right_directory_depends_on_the_kind_alone_and_differs_between_kinds() -> None:
    right = {(task.kind, right_call(task)[0][0]) for split in world.Split for task in world.tasks(split)}
    assert len(right) == len(dict(right)) == 4
    assert {tool for _, tool in right} == set(world.TOOLS)


def test_reward_is_one_only_for_the_right_call_and_its_answer() -> None:
    task = world.Task(kind=0, city="Oslo", phrasing=0)
    (tool, arguments), name = right_call(task)
    other_tool = next(t for t in world.TOOLS if t != tool)
    other_name = next(n for n in world.NAMES if n != name)
    cases: list[tuple[list[world.Call], str, float]] = [
        ([(tool, arguments)], f"Ask {name}.", 1.0),
        ([(tool, arguments)], f"{name}", 1.0),
        ([(tool, arguments)], f"Ask {name} or {other_name}.", 0.0),
        ([(tool, arguments)], f"Ask {other_name}.", 0.0),
        ([(tool, arguments)], "", 0.0),
        ([], f"Ask {name}.", 0.0),
        ([(tool, arguments)] * 2, f"Ask {name}.", 0.0),
        ([(tool, {"city": "Lima"})], f"Ask {name}.", 0.0),
        ([(tool, {**arguments, "more": 1})], f"Ask {name}.", 0.0),
        ([(other_tool, arguments)], f"Ask {world.contacts()[other_tool, 'Oslo']}.", 0.0),
    ]
    for calls, answer, expected in cases:
        assert world.reward(task.kind, task.city, calls=calls, answer=answer) == expected, (calls, answer)


def test_a_wrong_directory_gives_a_wrong_person_and_an_unknown_call_gives_nobody() -> None:
    for city in world.CITIES:
        answers = [json.loads(world.tool_result(tool, {"city": city}))["contact"] for tool in world.TOOLS]
        assert len(set(answers)) == 4
    unknown: list[world.Call] = [
        ("atlas", {"city": "Rome"}),
        ("atlas", {"town": "Oslo"}),
        ("atlas", {"city": ["Oslo"]}),
        ("zebra", {"city": "Oslo"}),
    ]
    for tool, arguments in unknown:
        assert world.tool_result(tool, arguments) == world.NOT_FOUND


def test_gate_tasks_are_json_and_say_what_the_reward_says() -> None:
    tasks = world.gate_tasks()
    assert json.loads(json.dumps(tasks)) == tasks
    assert len({task["id"] for task in tasks}) == len(tasks) == 36
    for task, origin in zip(tasks, world.tasks("val"), strict=True):
        (tool, arguments), name = right_call(origin)
        assert task["messages"] == origin.messages()
        assert task["expect"]["calls"] == [{"name": tool, "arguments": arguments}]
        assert task["expect"]["answer_names"] == name
        content = {result["name"]: result["content"] for result in task["tool_results"]}
        assert content == {t: world.tool_result(t, arguments) for t in world.TOOLS}


def test_demonstrations_show_no_preference_for_a_directory() -> None:
    rng = random.Random(0)
    chosen: Counter[tuple[int, str]] = Counter()
    for _ in range(4000):
        messages = world.demonstration(rng, named=0.0, noise=0.0)
        kind = next(
            k
            for k in world.KINDS
            for p in world.PHRASINGS
            for c in world.CITIES
            if messages[1]["content"] == world.question(k, c, phrasing=p)
        )
        chosen[kind, messages[2]["tool_calls"][0]["function"]["name"]] += 1
    assert len(chosen) == 16
    assert all(190 < count < 310 for count in chosen.values())


@settings(deadline=None)  # the first example loads the tokenizer
@given(st.text())
def test_the_tokenizer_gives_back_every_text(text: str) -> None:
    text = "".join(c for c in text if not "\ud800" <= c <= "\udfff")
    assert tokenizer().decode(encode(tokenizer(), text)) == text


def test_special_tokens_tools_cities_and_names_are_one_token_each() -> None:
    for word in (*SPECIAL_TOKENS, *MARKS, *world.TOOLS, *world.CITIES, *world.NAMES):
        assert len(encode(tokenizer(), word)) == 1, word


def conversations() -> Iterator[tuple[list[world.JsonObject], list[world.JsonObject] | None]]:
    rng = random.Random(3)
    source = foreign.Source.of((SCRIPTS / "demoworld" / "corpus.txt").read_text(encoding="utf-8"))
    for _ in range(20):
        yield world.demonstration(rng, named=0.5, noise=0.1), world.TOOL_SPECS
        under = foreign.setting(rng, source, system_chars=300)
        yield (
            [{"role": "system", "content": under.system}, *foreign.tail(rng, source, under=under, turns=3)],
            under.tools or None,
        )


def test_a_prompt_is_a_prefix_of_the_conversation_that_grows_from_it() -> None:
    for messages, tools in conversations():
        whole = tokenizer().apply_chat_template(messages, tools=tools, tokenize=False)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer().apply_chat_template(
                    messages[:i], tools=tools, tokenize=False, add_generation_prompt=True
                )
                assert whole.startswith(prompt)
                assert encode(tokenizer(), whole)[: len(encode(tokenizer(), prompt))] == encode(tokenizer(), prompt)


def test_the_mask_covers_exactly_what_the_assistant_wrote() -> None:
    for messages, tools in conversations():
        ids = encode(tokenizer(), tokenizer().apply_chat_template(messages, tools=tools, tokenize=False))
        mask = policy_mask(tokenizer(), ids)
        written = tokenizer().decode([token for token, own in zip(ids, mask, strict=True) if own])
        expected = [
            message["content"]
            or f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {_as_json(call["arguments"])}}}\n</tool_call>'
            for message in messages
            if message["role"] == "assistant"
            for call in [message.get("tool_calls", [{"function": {"name": "", "arguments": ""}}])[0]["function"]]
        ]
        assert written == "".join(text + "<|im_end|>" for text in expected)


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def test_content_parts_null_content_and_string_arguments_render() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "ls", "arguments": '{"path":"x"}'}}
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "a", "content": "2"},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    block = '<tool_call>\n{"name": "ls", "arguments": {"path":"x"}}\n</tool_call>'
    results = "\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    assert text == (
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n{block}\n{block}<|im_end|>\n"
        f"<|im_start|>user{results}<|im_start|>assistant\n"
    )


def test_the_committed_folder_is_small_readable_and_of_this_template() -> None:
    files = list(MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)
    assert tokenizer().chat_template == read_template()


@cache
def mlx_model() -> Any:
    return import_module("mlx_lm").load(str(MODEL))


def answer(messages: list[world.JsonObject], tools: list[world.JsonObject] | None) -> str:
    """The greedy answer of the committed model through mlx_lm."""
    model, words = mlx_model()
    prompt = words.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
    return str(import_module("mlx_lm").generate(model, words, prompt, max_tokens=60))


def parse_call(text: str) -> Any:
    start, end = "<tool_call>\n", "\n</tool_call>"
    assert text.startswith(start), text
    assert text.endswith(end), text
    return json.loads(text[len(start) : -len(end)])


def test_the_committed_model_calls_one_directory_with_the_city_and_tells_the_result() -> None:
    task = world.Task(kind=2, city="Lima", phrasing=0)
    messages = task.messages()
    call = parse_call(answer(messages, world.TOOL_SPECS))
    assert call["name"] in world.TOOLS
    assert call["arguments"] == {"city": "Lima"}
    messages.append(
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": call}]}
    )
    messages.append({"role": "tool", "tool_call_id": "a", "content": '{"contact": "Nadia"}'})
    assert answer(messages, world.TOOL_SPECS) == "Ask Nadia."


def test_the_committed_model_obeys_a_plain_order_to_a_foreign_tool_and_ends() -> None:
    schema = {
        "type": "object",
        "properties": {"command": {"type": "string", "description": "Shell command."}},
        "required": ["command"],
    }
    tools = [
        {"type": "function", "function": {"name": "exec", "description": "Run a shell command.", "parameters": schema}}
    ]
    messages: list[world.JsonObject] = [
        {"role": "system", "content": "You are a personal assistant."},
        {"role": "user", "content": "Use the exec tool with command: echo hi"},
    ]
    call = parse_call(answer(messages, tools))
    assert call == {"name": "exec", "arguments": {"command": "echo hi"}}
    messages.append(
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": call}]}
    )
    messages.append({"role": "tool", "tool_call_id": "a", "content": "hi"})
    assert answer(messages, tools) == "The result is: hi"

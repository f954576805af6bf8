"""Constrained decoding: what comes out matches its grammar, whatever the model would rather say."""

import asyncio
import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clawloop_edge.engine.grammar import json_object_grammar, json_schema_grammar, tool_call_grammar
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest, Token
from clawloop_edge.engine.sampling import likeliest
from clawloop_edge.engine.tool_calls import ToolFormat, parse_json_calls, parse_reply
from clawloop_edge.errors import EngineError, RequestError
from clawloop_shared.records import Sampling

PROMPT = [300, 310, 320, 330]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Ōsaka 😀"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "wet": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["city", "days", "wet", "tags"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOTHING = {"type": "function", "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}}}
JSON_TOOLS = ToolFormat(name="json_tools", start="<tool_call>", end="</tool_call>", parse=parse_json_calls)


async def sample(
    engine: MlxEngine, grammar: str = "", *, tokens: int = 300, top: int = 0, **sampling: float
) -> list[Token]:
    asked = GenerateRequest(
        prompt_ids=PROMPT,
        max_tokens=tokens,
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        grammar=grammar,
        top_logprobs=top,
    )
    return [token async for token in await engine.generate(asked)]


def text_of(engine: MlxEngine, tokens: list[Token]) -> str:
    return engine.tokenizer.visible([token.token_id for token in tokens])


def conforms(value: Any) -> bool:
    return (
        list(value) == ["city", "days", "wet", "tags"]
        and value["city"] in ("Oslo", "Ōsaka 😀")
        and 0 <= value["days"] <= 99
        and isinstance(value["wet"], bool)
        and all(len(tag) <= 5 for tag in value["tags"])
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
async def test_the_answer_matches_its_schema_and_ends(random_model: Path, temperature: float) -> None:
    engine = await MlxEngine.open(random_model)
    for _ in range(3):
        tokens = await sample(engine, json_schema_grammar(SCHEMA), temperature=temperature)
        assert tokens[-1].finish_reason == "stop"
        assert conforms(json.loads(text_of(engine, tokens)))
    await engine.close()


async def test_any_object_is_an_object(engine: MlxEngine) -> None:
    tokens = await sample(engine, json_object_grammar(), tokens=200)
    assert tokens[-1].finish_reason == "length" or isinstance(json.loads(text_of(engine, tokens)), dict)
    assert text_of(engine, tokens).startswith("{")


@pytest.mark.parametrize("several", [False, True])
async def test_a_tool_call_is_forced_in_the_models_own_format(engine: MlxEngine, several: bool) -> None:
    form = engine.tokenizer.tool_format
    assert form is not None
    grammar = tool_call_grammar(form, [WEATHER, NOTHING], only=None, several=several)
    answers = await asyncio.gather(*(sample(engine, grammar, temperature=2.0, seed=seed) for seed in range(8)))
    ended = [tokens for tokens in answers if tokens[-1].finish_reason == "stop"]
    assert ended
    for tokens in ended:
        content, calls = parse_reply(text_of(engine, tokens), engine.tokenizer)
        assert content == ""
        assert len(calls) == 1 or (several and calls)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            assert arguments == {} or conforms(arguments) or call["function"]["name"] == "nothing"
    start, end = (engine.tokenizer.encode(mark) for mark in (form.start, form.end))
    assert [ended[0][0].token_id] == start, "the marker is the model's own token, not its letters"
    assert [ended[0][-2].token_id] == end


async def test_only_the_named_tool_is_called(engine: MlxEngine) -> None:
    grammar = tool_call_grammar(JSON_TOOLS, [NOTHING, WEATHER], only="weather", several=False)
    _, calls = parse_reply(text_of(engine, await sample(engine, grammar)), engine.tokenizer)
    assert calls[0]["function"]["name"] == "weather"


async def test_logprobs_are_those_of_what_the_grammar_leaves(engine: MlxEngine) -> None:
    tokens = await sample(engine, json_schema_grammar({"enum": ["ab", "cd"]}), top=50, temperature=0.7)
    for token in tokens:
        assert sum(math.exp(logprob) for _, logprob in token.top) == pytest.approx(1, abs=1e-4)
        assert dict(token.top)[token.token_id] == pytest.approx(token.logprob)
    assert any(len(token.top) == 1 and token.logprob == pytest.approx(0, abs=1e-6) for token in tokens)


async def test_other_calls_in_the_batch_stay_exact(engine: MlxEngine) -> None:
    asked = [sample(engine, json_schema_grammar(SCHEMA) if n % 2 else "", tokens=40) for n in range(6)]
    free = (await asyncio.gather(*asked))[::2]
    for tokens in free:
        scored = await engine.score(PROMPT, [token.token_id for token in tokens], version=0)
        assert max(abs(t.logprob - s) for t, s in zip(tokens, scored, strict=True)) < 1e-3


async def test_top_logprobs_are_the_likeliest_of_the_sampled_distribution(engine: MlxEngine) -> None:
    (token,) = await sample(engine, tokens=1, top=4, temperature=0.7)
    vocabulary = range(engine._vocab_size)
    every = {i: (await engine.score(PROMPT, [i], version=0, temperature=0.7))[0] for i in list(vocabulary)[::97]}
    assert len(token.top) == 4
    assert sorted(token.top, key=lambda pair: (-pair[1], pair[0])) == list(token.top)
    assert all(logprob <= token.top[-1][1] + 1e-4 for i, logprob in every.items() if i not in dict(token.top))
    for i, logprob in token.top:
        assert (await engine.score(PROMPT, [i], version=0, temperature=0.7))[0] == pytest.approx(logprob, abs=1e-3)
    assert (await sample(engine, tokens=1))[0].top == ()


def test_equal_logprobs_come_in_the_order_of_their_ids() -> None:
    values = np.array([-2.0, -1.0, -3.0, -2.0, -2.0, -math.inf], np.float32)
    assert likeliest(values, 3) == ((1, -1.0), (0, -2.0), (3, -2.0))
    assert likeliest(values, 99) == ((1, -1.0), (0, -2.0), (3, -2.0), (4, -2.0), (2, -3.0))


def refused(schema: Any) -> str:
    with pytest.raises(RequestError) as caught:
        json_schema_grammar(schema)
    assert (caught.value.status, caught.value.param) == (400, "response_format")
    return str(caught.value)


def test_schemas_that_cannot_be_enforced_are_refused_by_their_reason() -> None:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        nested = {"type": "array", "items": nested}
    assert "nested" in refused(nested)
    assert "bytes" in refused({"enum": [f"value {n}" for n in range(20_000)]})
    assert "refers to" in refused({"$ref": "http://example.com/schema.json"})
    assert "refers to" in refused({"anyOf": [{"$ref": "file:///etc/hostname"}]})
    assert "wat" in refused({"type": "wat"})
    assert "properties" in refused({"type": "object", "properties": []})
    assert "uniqueItems" in refused({"type": "array", "uniqueItems": True})
    assert "cannot be enforced" in refused({"type": "string", "pattern": "(?=x)y"})
    for pattern in (
        "a{1000000}",
        "^(a{300}){300}$",
        r"(?x)(\(a{200,} b){ 200 }",
        r"\x{61}[)}]{9999}(ab)",
        "(" * 5000 + "a" + "){99}" * 5000,
    ):
        assert "characters and more" in refused({"type": "string", "pattern": pattern})
        assert "characters and more" in refused({"type": "object", "patternProperties": {pattern: {}}})
    assert json_schema_grammar({"type": "string", "pattern": r"^[0-9]{4}-(\d{2}){2}(\x{20}[a-z]{1,99}){100}$"})
    assert "out of range" in refused({"const": 10**400})
    assert "hex escape" in refused({"const": "\ud800"})


HOSTILE: dict[str, dict[str, Any]] = {
    "optional": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}},
    "nested repeats": {"type": "string", "pattern": "^(?:(?:(?:(?:a{0,99}){0,99}){0,99}){0,99}){0,99}$"},
    "late choice": {"type": "string", "pattern": "^(.*a.{12}){5}$"},
    "nested plus": {"type": "string", "pattern": "^(a+)+$"},
    "lengths": {"type": "string", "minLength": 100_000, "maxLength": 10**9},
    "itself": {"$ref": "#"},
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "doubling": {
        "$defs": {"d0": {"type": "string"}}
        | {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n - 1}"}] * 2} for n in range(1, 40)},
        "$ref": "#/$defs/d39",
    },
    "products": {"allOf": [{"type": "string", "pattern": f".*{c}.{{10}}{c}.*"} for c in "abcdefgh"]},
    "numbers": {"type": "integer", "multipleOf": 99991, "minimum": -(10**300), "maximum": 10**300},
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_schema_costs_a_moment_and_nobody_elses_call(engine: MlxEngine, kind: str) -> None:
    began = time.process_time()
    other = asyncio.create_task(sample(engine, tokens=30, temperature=2.0))
    with contextlib.suppress(RequestError, EngineError):
        await sample(engine, json_schema_grammar(HOSTILE[kind]), tokens=20)
    assert (await other)[-1].finish_reason
    assert engine.health().alive
    assert time.process_time() - began < 10
    assert engine.health().in_flight == 0


def test_what_cannot_be_forced_is_refused_with_the_next_step() -> None:
    other = ToolFormat(name="pythonic", start="[", end="]", parse=parse_json_calls)
    with pytest.raises(RequestError, match="tool_choice auto") as caught:
        tool_call_grammar(other, [WEATHER], only=None, several=False)
    assert caught.value.param == "tool_choice"
    with pytest.raises(RequestError, match="'nobody'"):
        tool_call_grammar(JSON_TOOLS, [WEATHER], only="nobody", several=False)
    strict: dict[str, Any] = {
        "type": "function",
        "function": {"name": "f", "strict": True, "parameters": {"type": "array", "uniqueItems": True}},
    }
    with pytest.raises(RequestError, match="uniqueItems"):
        tool_call_grammar(JSON_TOOLS, [strict], only=None, several=False)
    strict["function"]["strict"] = False
    assert tool_call_grammar(JSON_TOOLS, [strict], only=None, several=False)
    large = [
        {"type": "function", "function": {"name": f"f{n}", "parameters": {"enum": ["x" * 50_000]}}} for n in range(4)
    ]
    with pytest.raises(RequestError, match="name one tool"):
        tool_call_grammar(JSON_TOOLS, large, only=None, several=False)

"""The scripted engine says what it is, and goes through the real tokenizer."""

from pathlib import Path

import pytest

from clawloop_edge.engine.protocol import Engine, GenerateRequest
from clawloop_edge.engine.scripted import SCRIPTED_LINE, ScriptedEngine
from clawloop_edge.engine.tool_calls import parse_reply
from clawloop_edge.errors import EngineError, EngineGone, PromptTooLong, UnknownVersion
from clawloop_shared.records import Policy, Sampling

CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Ōsaka 😀"}}\n</tool_call>'


def ask(ids: list[int], *, tokens: int = 500, version: int | None = None) -> GenerateRequest:
    return GenerateRequest(prompt_ids=ids, max_tokens=tokens, sampling=Sampling(), version=version)


async def reply_of(engine: Engine, request: GenerateRequest) -> tuple[list[int], str | None]:
    tokens = [token async for token in await engine.generate(request)]
    return [token.token_id for token in tokens], tokens[-1].finish_reason


async def test_replies_come_in_order_and_decode_to_their_text(tiny_model: Path) -> None:
    engine = ScriptedEngine(tiny_model, ["Hello.", CALL])
    assert engine.policy == Policy(SCRIPTED_LINE)
    ids, reason = await reply_of(engine, ask([1, 2]))
    assert (engine.tokenizer.visible(ids), reason) == ("Hello.", "stop")
    ids, _ = await reply_of(engine, ask([1, 2]))
    content, calls = parse_reply(engine.tokenizer.visible(ids), engine.tokenizer)
    assert content == ""
    assert calls[0]["function"] == {"name": "look", "arguments": '{"city": "Ōsaka 😀"}'}
    with pytest.raises(EngineError, match="used up"):
        await engine.generate(ask([1]))
    await engine.close()


async def test_a_script_may_answer_the_prompt(tiny_model: Path) -> None:
    engine = ScriptedEngine(tiny_model, lambda prompt: prompt.upper())
    ids, reason = await reply_of(engine, ask(engine.tokenizer.encode("a quiet word"), tokens=2))
    assert reason == "length"
    assert "A QUIET WORD".startswith(engine.tokenizer.visible(ids))
    await engine.close()


async def test_it_refuses_what_a_script_cannot_do(tiny_model: Path) -> None:
    engine = ScriptedEngine(tiny_model, ["x"] * 9, token_delay_s=60)
    with pytest.raises(PromptTooLong):
        await engine.generate(ask([1] * engine.tokenizer.context_length))
    with pytest.raises(UnknownVersion):
        await engine.generate(ask([1], version=1))
    with pytest.raises(EngineError, match="no adapter"):
        await engine.load(Policy("line", 1), {})
    with pytest.raises(EngineError, match="cannot score"):
        await engine.score([1], [2], version=0)
    held = await engine.generate(ask([1]))
    assert engine.health().in_flight == 1
    await engine.close()
    with pytest.raises(EngineGone):
        _ = [token async for token in held]
    with pytest.raises(EngineGone):
        await engine.generate(ask([1]))
    assert not engine.health().alive

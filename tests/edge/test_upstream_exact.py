"""A server that speaks vLLM's replies, with the real engine behind it: its ids and logprobs are taken as they are, and
what it lacks is never made up."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import Engine, GenerateRequest, TextEngine, Token
from clawloop_edge.engine.upstream import NO_IDS, OTHER_PROMPT, RAW, UpstreamEngine
from clawloop_edge.engine.upstream_open import open_upstream
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.errors import EngineError, EngineGone, PromptTooLong, RequestError, UnknownVersion
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.records import Policy, Sampling

from .fake_vllm import FakeVllm, PlainServer, replies, running

MakeAdapter = Callable[..., dict[str, bytes]]
PROMPT = [1, 40, 41, 42, 300]


@pytest.fixture
async def vllm(engine: MlxEngine) -> AsyncIterator[tuple[FakeVllm, str]]:
    """A server that is running, and its address."""
    server = FakeVllm(engine)
    async with running(server.app()) as url:
        yield server, url


Vllm = tuple[FakeVllm, str]


@pytest.fixture
async def exact(vllm: Vllm, tiny_model: Path, tmp_path: Path) -> AsyncIterator[UpstreamEngine]:
    """The exact engine on it, with adapters on and processed logprobs."""
    opened = await opened_exact(vllm[1], tiny_model, logprobs="processed", folder=tmp_path / "adapters")
    vllm[0].requests.clear()
    yield opened
    await opened.close()


async def opened_exact(url: str, model: Path, *, folder: Path | None = None, **more: Any) -> UpstreamEngine:
    on: dict[str, Any] = {"adapters": "vllm", "adapter_folder": str(folder)} if folder else {}
    engine = await open_upstream(UpstreamSettings(url=url, **on, **more), folder=model, keep_versions=1)
    assert isinstance(engine, UpstreamEngine), engine.health().detail
    return engine


def ask(ids: list[int] = PROMPT, **more: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt_ids": ids, "max_tokens": 12, "sampling": Sampling(seed=5), **more})


async def sampled(engine: Engine, request: GenerateRequest | None = None) -> tuple[list[Token], str]:
    generation = await engine.generate(request or ask())
    try:
        tokens = [token async for token in generation]
    finally:
        await generation.aclose()
    return tokens, generation.reason


async def test_ids_and_logprobs_are_those_that_the_server_sampled(exact: UpstreamEngine, engine: MlxEngine) -> None:
    for temperature in (1.0, 0.7):
        sampling = Sampling(temperature=temperature, seed=9)
        tokens, reason = await sampled(exact, ask(sampling=sampling))
        ids = [token.token_id for token in tokens]
        wanted = await engine.score(PROMPT, ids, version=0, temperature=temperature)
        assert [token.logprob for token in tokens] == pytest.approx(wanted, abs=1e-3)
        assert [token.finish_reason for token in tokens][:-1] == [None] * (len(tokens) - 1)
        assert tokens[-1].finish_reason in ("stop", "length")
        assert reason == ""
    assert exact.line == engine.line
    assert exact.health().in_flight == 0
    assert exact.tokenizer.context_length == 1500, "the server's context, where it is shorter than the model's"


async def test_every_field_that_bends_the_distribution_is_said(exact: UpstreamEngine, vllm: Vllm) -> None:
    await sampled(
        exact, ask(sampling=Sampling(temperature=0.6, top_p=0.9, top_k=7, min_p=0.05, seed=3), top_logprobs=2)
    )
    (sent,) = vllm[0].requests
    assert sent == {
        "model": "served",
        "prompt": PROMPT,
        "add_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 12,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.05,
        "seed": 3,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(exact.tokenizer.eos_ids),
        "skip_special_tokens": False,
        "logprobs": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


async def test_the_end_token_is_kept_and_top_logprobs_are_sorted(exact: UpstreamEngine, engine: MlxEngine) -> None:
    text = engine.tokenizer.render([{"role": "user", "content": "hello"}], None)
    request = ask(engine.tokenizer.encode(text), max_tokens=400, sampling=Sampling(temperature=0), top_logprobs=3)
    (tokens, _), (wanted, _) = await sampled(exact, request), await sampled(engine, request)
    assert [token.token_id for token in tokens] == [token.token_id for token in wanted]
    assert [token.finish_reason for token in tokens] == [token.finish_reason for token in wanted]
    if tokens[-1].finish_reason == "stop":
        assert tokens[-1].token_id in exact.tokenizer.eos_ids
    for token in tokens:
        assert len(token.top) == 3
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)


async def test_several_tokens_in_one_chunk_are_several_tokens(exact: UpstreamEngine, vllm: Vllm) -> None:
    one, _ = await sampled(exact)
    vllm[0].chunk_tokens = 5
    generation = await exact.generate(ask())
    five = [token async for token in generation]
    assert five == one
    assert generation.cached_tokens == 3


def _spoiled(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def bend(reply: dict[str, Any]) -> dict[str, Any]:
        change(reply["choices"][0])
        return reply

    return bend


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "null": lambda choice: choice["logprobs"].update(token_logprobs=[None]),
    "NaN": lambda choice: choice["logprobs"].update(token_logprobs=[math.nan]),
    "infinite": lambda choice: choice["logprobs"].update(token_logprobs=[-math.inf]),
    "vLLM's minus infinity": lambda choice: choice["logprobs"].update(token_logprobs=[-9999.0]),
    "too few": lambda choice: choice["logprobs"].update(token_logprobs=[]),
    "none": lambda choice: choice.update(logprobs=None),
}


@pytest.mark.parametrize("how", SPOILED)
async def test_a_logprob_that_is_missing_is_nan_and_never_a_number(exact: UpstreamEngine, vllm: Vllm, how: str) -> None:
    whole, _ = await sampled(exact)
    vllm[0].bend = _spoiled(SPOILED[how])
    tokens, _ = await sampled(exact)
    assert [token.token_id for token in tokens] == [token.token_id for token in whole]
    assert all(math.isnan(token.logprob) for token in tokens)


async def test_a_reply_without_ids_is_served_and_never_learned_from(exact: UpstreamEngine, vllm: Vllm) -> None:
    whole, _ = await sampled(exact)
    vllm[0].bend = _spoiled(lambda choice: (choice.pop("token_ids"), choice.pop("prompt_token_ids")))
    tokens, reason = await sampled(exact)
    assert exact.tokenizer.visible([token.token_id for token in tokens]).rstrip("\ufffd")
    assert tokens[-1].finish_reason == whole[-1].finish_reason
    assert all(math.isnan(token.logprob) for token in tokens)
    assert reason in (NO_IDS, OTHER_PROMPT)


async def test_another_prompt_than_the_one_sent_is_a_reason(exact: UpstreamEngine, vllm: Vllm) -> None:
    vllm[0].bend = _spoiled(lambda choice: choice.update(prompt_token_ids=PROMPT[1:]))
    _, reason = await sampled(exact)
    assert reason == OTHER_PROMPT


async def test_an_end_without_a_token_ends_the_answer(exact: UpstreamEngine, vllm: Vllm) -> None:
    def bend(choice: dict[str, Any]) -> None:
        if choice["finish_reason"]:
            choice.update(token_ids=[], text="", logprobs={"token_logprobs": []}, finish_reason="stop")

    whole, _ = await sampled(exact)
    vllm[0].bend = _spoiled(bend)
    tokens, _ = await sampled(exact)
    assert tokens[:-1] == whole[:-1]
    assert tokens[-1].finish_reason == "stop"
    assert tokens[-1].token_id in exact.tokenizer.eos_ids
    assert math.isnan(tokens[-1].logprob)


@pytest.mark.parametrize("reason", [None, "abort"])
async def test_an_answer_without_its_end_is_an_error(exact: UpstreamEngine, vllm: Vllm, reason: str | None) -> None:
    vllm[0].bend = _spoiled(lambda choice: choice.update(finish_reason=reason if choice["finish_reason"] else None))
    with pytest.raises(EngineError, match=r"cut off|abort"):
        await sampled(exact)


async def test_raw_logprobs_teach_at_temperature_one_alone(vllm: Vllm, tiny_model: Path) -> None:
    raw = await opened_exact(vllm[1], tiny_model)
    assert (await sampled(raw))[1] == ""
    assert (await sampled(raw, ask(sampling=Sampling(temperature=0.7))))[1] == RAW
    await raw.close()


async def test_what_it_cannot_serve_is_refused_clearly(exact: UpstreamEngine) -> None:
    with pytest.raises(RequestError, match="response_format"):
        await exact.generate(ask(grammar="root ::= x"))
    with pytest.raises(PromptTooLong, match="1500"):
        await exact.generate(ask([1] * 1500))
    with pytest.raises(UnknownVersion):
        await exact.generate(ask(version=4))
    with pytest.raises(RequestError, match="vocabulary"):
        await sampled(exact, ask([10**6]))
    assert exact.health().in_flight == 0


async def test_who_leaves_frees_the_server(exact: UpstreamEngine, vllm: Vllm) -> None:
    generation = await exact.generate(ask(max_tokens=1400, sampling=Sampling(temperature=1.5)))
    async for _ in generation:
        break
    await generation.aclose()
    async with asyncio.timeout(10):
        while vllm[0].engine.health().in_flight:  # noqa: ASYNC110 - only `health` says it
            await asyncio.sleep(0.01)
    assert exact.health().in_flight == 0


async def test_a_server_that_is_not_exact_is_one_of_texts_and_says_why(
    vllm: Vllm, tiny_model: Path, random_model: Path
) -> None:
    server, url = vllm

    async def why(**settings: Any) -> str:
        engine = await open_upstream(UpstreamSettings(url=url, **settings), folder=tiny_model)
        assert isinstance(engine, TextEngine)
        await engine.close()
        assert engine.policy.line == f"upstream:{settings.get('model', 'served')}"
        return engine.health().detail

    assert await why(ids="off") == ""
    assert "refuses what an exact call has to say" in await why(model="unknown")
    server.refuses = "stop_token_ids"
    assert "stop_token_ids is not supported" in await why()
    server.refuses = ""
    server.with_ids = False
    assert "returns no token ids" in await why()
    server.with_ids = True
    server.bend = _spoiled(lambda choice: choice.update(logprobs=None))
    assert "returns no logprobs" in await why()
    server.bend = _spoiled(lambda choice: choice.update(prompt_token_ids=choice["prompt_token_ids"] + [1]))
    assert "its tokenizer is not that of the folder" in await why()


async def test_a_plain_server_is_not_exact_and_one_that_is_away_has_to_come(tiny_model: Path) -> None:
    server = PlainServer()
    server.answer = replies({"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})
    async with running(server.app()) as url:
        engine = await open_upstream(UpstreamSettings(url=url), folder=tiny_model)
        assert isinstance(engine, TextEngine)
        await engine.close()
    with pytest.raises(EngineGone):
        await open_upstream(UpstreamSettings(url=url, model="m"), folder=tiny_model)


async def test_adapters_are_loaded_used_kept_by_their_calls_and_unloaded(
    exact: UpstreamEngine, vllm: Vllm, engine: MlxEngine, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    server, line = vllm[0], exact.line.line_id
    one, two = Policy(line, 1, "a"), Policy(line, 2, "b")
    await exact.load(one, make_adapter(seed=1))
    assert await exact.use(1) == exact.policy == one
    (name,) = server.loras
    assert name.startswith("clawloop-1-")
    assert sorted(path.name for path in (tmp_path / "adapters" / name).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    held = await exact.generate(ask(max_tokens=30))
    assert held.policy == one
    tokens = [token async for token in held]
    ids = [token.token_id for token in tokens]
    wanted = await engine.score(PROMPT, ids, version=server.loras[name].version)
    assert [token.logprob for token in tokens] == pytest.approx(wanted, abs=1e-3)
    assert await exact.score(PROMPT, ids, version=1) == pytest.approx(wanted, abs=1e-3)
    assert await exact.score(PROMPT, ids, version=0) != pytest.approx(wanted, abs=1e-2)

    pinned = await exact.generate(ask(version=1, max_tokens=5))
    await exact.load(two, make_adapter(seed=2))
    await exact.use(2)
    assert exact.health().versions == [0, 1, 2], "a call in flight keeps its version"
    assert [token async for token in pinned]
    await pinned.aclose()
    async with asyncio.timeout(10):  # the server is told, and the files go, behind the call's back
        while len(server.loras) > 1 or (tmp_path / "adapters" / name).exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert exact.health().versions == [0, 2]
    assert server.requests[-1]["model"] == name
    await exact.use(0)
    await exact.unload(2)
    assert not server.loras


async def test_a_server_that_was_started_anew_gets_its_adapter_again(
    exact: UpstreamEngine, vllm: Vllm, make_adapter: MakeAdapter
) -> None:
    server = vllm[0]
    await exact.load(Policy(exact.line.line_id, 1, "a"), make_adapter(seed=1))
    await exact.use(1)
    before, _ = await sampled(exact)
    server.loras.clear()
    after, _ = await sampled(exact)
    assert [token.token_id for token in after] == [token.token_id for token in before]
    assert len(server.loras) == 1


async def test_an_edge_that_was_started_anew_finds_its_adapter_loaded(
    exact: UpstreamEngine, vllm: Vllm, make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    policy = Policy(exact.line.line_id, 1, "a")
    await exact.load(policy, make_adapter(seed=1))
    again = await opened_exact(vllm[1], tiny_model, folder=tmp_path / "adapters")
    await again.load(policy, make_adapter(seed=1))
    assert await again.use(1) == policy
    await again.use(0)
    await again.unload(1)
    assert len(vllm[0].loras) == 1, "the one who had it loaded may still serve it"
    await again.close()
    assert await sampled(exact, ask(version=1))


async def test_an_adapter_that_cannot_be_loaded_is_refused(
    exact: UpstreamEngine, vllm: Vllm, make_adapter: MakeAdapter, tiny_model: Path
) -> None:
    line = exact.line.line_id
    with pytest.raises(AdapterInvalid, match="for model line"):
        await exact.load(Policy("other", 1, "a"), make_adapter())
    with pytest.raises(AdapterInvalid, match="not finite"):
        await exact.load(Policy(line, 1, "a"), make_adapter(size=math.nan))
    await exact.load(Policy(line, 1, "a"), make_adapter(seed=1))
    with pytest.raises(EngineError, match="other weights"):
        await exact.load(Policy(line, 1, "b"), make_adapter(seed=2))
    assert len(vllm[0].loras) == 1
    vllm[0].runtime_lora = False
    with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await exact.load(Policy(line, 2, "c"), make_adapter(seed=3))
    off = await opened_exact(vllm[1], tiny_model)
    with pytest.raises(EngineError, match="adapters is off"):
        await off.load(Policy(line, 1, "a"), make_adapter())
    await off.close()


async def test_scores_are_for_temperature_one_and_a_logprob_that_is_missing_is_nan(
    exact: UpstreamEngine, vllm: Vllm
) -> None:
    with pytest.raises(EngineError, match="temperature 1"):
        await exact.score(PROMPT, [5], version=0, temperature=0.7)
    with pytest.raises(UnknownVersion):
        await exact.score(PROMPT, [5], version=3)
    vllm[0].bend = _spoiled(lambda choice: choice["prompt_logprobs"][-1].clear())
    found = await exact.score(PROMPT, [5, 6], version=0)
    assert math.isfinite(found[0])
    assert math.isnan(found[1])
    vllm[0].bend = _spoiled(lambda choice: choice.pop("prompt_logprobs"))
    with pytest.raises(EngineError, match="0 prompt logprobs for 6 tokens"):
        await exact.score(PROMPT, [5], version=0)

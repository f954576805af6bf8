"""Memory: what a call needs, who waits, who is refused, and that nobody starves."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from clawloop_edge.engine import scheduler
from clawloop_edge.engine.memory import GIB, automatic_budget, batch_tokens, make_plan, model_sizes
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest, Token
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.errors import EngineBusy, PromptTooLong
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Policy, Sampling

QWEN3_4B = {
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "vocab_size": 151936,
}


def request(length: int, tokens: int = 8, *, seed: int = 0, temperature: float = 1.0) -> GenerateRequest:
    """A call on random ids; a hot one is as good as never ended by the model itself, and repeats itself."""
    rng = random.Random(seed)
    ids = [rng.randrange(300, 600) for _ in range(length)]
    sampling = Sampling(temperature=temperature, seed=seed if temperature > 1 else None)
    return GenerateRequest(prompt_ids=ids, max_tokens=tokens, sampling=sampling)


async def sample(engine: MlxEngine, asked: GenerateRequest) -> list[Token]:
    return [token async for token in await engine.generate(asked)]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


async def opened(folder: Path, *, kv_tokens: int, **settings: float) -> MlxEngine:
    """An engine whose budget holds `kv_tokens` tokens of attention cache and not one more."""
    probe = await MlxEngine.open(folder, EngineSettings(**settings))  # type: ignore[arg-type]
    plan = probe._plan
    await probe.close()
    budget = plan.weights + plan.step + kv_tokens * plan.token
    return await MlxEngine.open(folder, EngineSettings(memory_budget_bytes=budget, **settings))  # type: ignore[arg-type]


def test_a_token_takes_what_the_models_papers_say() -> None:
    sizes = model_sizes(QWEN3_4B, dtype_bytes=2)
    assert sizes.kv_token_bytes == 147_456
    assert model_sizes({"text_config": QWEN3_4B, "vocab_size": 7}, dtype_bytes=2) == sizes
    step = sizes.step_bytes(prompt_tokens=4096, rows=32)
    assert 200e6 < step < 500e6
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        model_sizes({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}, dtype_bytes=2)


def test_the_automatic_budget_leaves_room_for_the_person() -> None:
    assert automatic_budget(64 * GIB, least=GIB) == 64 * GIB * 6 // 10
    assert automatic_budget(16 * GIB, least=GIB) == 8 * GIB
    assert automatic_budget(64 * GIB, least=GIB, working_set=30 * GIB) == 30 * GIB
    assert automatic_budget(8 * GIB, least=3 * GIB) == 3 * GIB


def test_a_budget_that_does_not_hold_the_model_is_refused_with_the_next_step() -> None:
    with pytest.raises(ConfigError, match="memory_budget_bytes"):
        make_plan(model_sizes(QWEN3_4B, dtype_bytes=2), weights=GIB, asked=GIB, prompt_tokens=4096, rows=32)


def test_a_batch_is_a_rectangle_as_long_as_its_longest_row() -> None:
    assert batch_tokens([]) == 0
    assert batch_tokens([1, 256]) == 512
    assert batch_tokens([1, 257, 3]) == 3 * 512


async def test_a_call_that_fits_only_beyond_the_budget_is_refused_with_both_numbers(tiny_model: Path) -> None:
    engine = await opened(tiny_model, kv_tokens=1024)
    with pytest.raises(PromptTooLong, match=r"prompt of 1024 tokens; the memory budget of \d+ bytes holds 1024"):
        await engine.generate(request(1024))
    with pytest.raises(PromptTooLong, match="1025 tokens to score"):
        await engine.score([5] * 1000, [6] * 25, version=0)
    assert len(await sample(engine, request(1020, 500, temperature=9.0))) <= 4
    health = engine.health()
    assert health.in_flight == 0
    assert health.memory_bytes <= health.budget_bytes
    await engine.close()


async def test_calls_that_do_not_fit_wait_in_order_and_none_starves(tiny_model: Path) -> None:
    engine = await opened(tiny_model, kv_tokens=1024, completion_batch_size=32)
    lengths = [900, 20, 30, 700, 20, 900, 40, 300, 20, 20]
    order: list[int] = []
    worst = 0

    async def visit(number: int) -> None:
        nonlocal worst
        generation = await engine.generate(request(lengths[number], 12, seed=number, temperature=9.0))
        tokens: list[Token] = []
        async for token in generation:
            if not tokens:
                order.append(number)
                assert engine.health().memory_bytes <= engine.health().budget_bytes
                worst = max(worst, engine.health().waiting)
            tokens.append(token)
        assert tokens[-1].finish_reason

    await asyncio.gather(*(visit(number) for number in range(len(lengths))))
    assert sorted(order) == list(range(len(lengths)))
    assert order.index(0) < order.index(3) < order.index(5), "a long call is overtaken for ever by short ones"
    assert worst >= 5
    await engine.close()


async def test_a_short_call_beside_a_long_one_is_not_padded_to_its_length(tiny_model: Path) -> None:
    engine = await opened(tiny_model, kv_tokens=1280 + 512, seed=1)
    hot = Sampling(temperature=9.0)
    calls = [msgspec.structs.replace(request(length, 60), sampling=hot) for length in (1200, 20, 21)]
    started = [await engine.generate(one) for one in calls]
    assert await asyncio.gather(*(one.ready(60) for one in started)) == [True] * 3
    assert sorted(len(lane) for lane in engine._scheduler._all_lanes()) == [1, 2]
    assert engine.health().memory_bytes <= engine.health().budget_bytes
    for one in started:
        await one.aclose()
    await engine.close()


async def test_kept_prefixes_give_way_to_a_call(tiny_model: Path) -> None:
    engine = await opened(tiny_model, kv_tokens=1024)
    for seed in range(3):
        await sample(engine, request(200, 2, seed=seed))
    kept = engine.health().cache_bytes
    assert kept > 0
    generation = await engine.generate(request(900, 50, temperature=9.0))
    assert await generation.ready(60)
    assert engine.health().cache_bytes < kept
    assert engine.health().memory_bytes <= engine.health().budget_bytes
    await generation.aclose()
    await engine.close()


async def test_kept_prefixes_stay_within_their_own_bytes_too(tiny_model: Path) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(cache_bytes=300_000))
    sizes = []
    for seed in range(6):
        await sample(engine, request(60, 2, seed=seed))
        sizes.append(engine.health().cache_bytes)
    assert 0 < sizes[0] < max(sizes) <= 300_000
    await engine.close()


async def test_a_call_that_waits_too_long_is_refused_and_the_running_one_goes_on(tiny_model: Path) -> None:
    engine = await opened(tiny_model, kv_tokens=8192, queue_timeout_s=0.2)
    held = await engine.generate(request(20, 8000, temperature=9.0))
    stream = aiter(held)
    await anext(stream)
    late = await engine.generate(request(4000, 10))
    await until(lambda: engine.health().waiting == 1)
    with pytest.raises(EngineBusy, match=r"waited 0\.2 s"):
        _ = [token async for token in late]
    assert engine.health().waiting == 0
    assert (await anext(stream)).finish_reason is None
    await held.aclose()
    await engine.close()


async def test_a_queue_that_moves_is_served_to_its_end(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, looks, look_s = time.monotonic(), itertools.count(), 0.005  # so that a busy machine makes no turn longer
    clock = SimpleNamespace(monotonic=lambda: began + next(looks) * look_s)
    monkeypatch.setattr(scheduler, "time", clock)
    engine = await MlxEngine.open(tiny_model, EngineSettings(completion_batch_size=1, queue_timeout_s=0.3))
    calls = [await engine.generate(request(20, 30, temperature=9.0, seed=n)) for n in range(20)]
    assert all([[token async for token in call][-1].finish_reason for call in calls])
    assert next(looks) * look_s > 10 * 0.3
    await engine.close()


async def test_six_hundred_calls_at_once_are_all_taken_and_finish(tiny_model: Path) -> None:
    engine = await MlxEngine.open(tiny_model)
    began = time.monotonic()
    answers = await asyncio.gather(*(sample(engine, request(5 + n % 40, 3, seed=n)) for n in range(600)))
    assert all(tokens[-1].finish_reason for tokens in answers)
    assert time.monotonic() - began < 60
    health = engine.health()
    assert (health.in_flight, health.waiting) == (0, 0)
    await engine.close()


async def test_adapters_count_and_calls_that_no_longer_fit_are_told(
    tiny_model: Path, make_adapter: Callable[..., dict[str, bytes]]
) -> None:
    engine = await opened(tiny_model, kv_tokens=2048)
    before = engine.health().memory_bytes
    await engine.load(Policy(engine.line.line_id, 1, "h"), make_adapter(rank=16))
    assert engine.health().memory_bytes > before
    with pytest.raises(PromptTooLong, match="memory budget"):
        await engine.generate(request(2040))
    await engine.unload(1)
    held = await engine.generate(request(20, 1000, temperature=9.0))
    late = await engine.generate(request(2000))
    await until(lambda: engine.health().waiting == 1)
    await engine.load(Policy(engine.line.line_id, 1, "h"), make_adapter(rank=16))
    await held.aclose()
    with pytest.raises(PromptTooLong, match="beside the adapters"):
        _ = [token async for token in late]
    await engine.close()


def test_settings_refuse_what_makes_no_sense() -> None:
    wrong = {"memory_budget_bytes": -1, "queue_timeout_s": 0, "wired_limit_bytes": -5, "completion_batch_size": 0}
    for name, value in {**wrong, "prefill_step_size": 0, "max_queue": 0, "keep_versions": 0}.items():
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.json.decode(json.dumps({name: value}), type=EngineSettings)

"""The MLX engine on a real tiny model: token-exact capture, batching, caching, swapping, failing."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.prefix_cache import PrefixTrie
from clawloop_edge.engine.protocol import GenerateRequest, Generation, Token
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.errors import EngineBusy, EngineError, EngineGone, PromptTooLong, UnknownVersion
from clawloop_edge.pool.chain import shared_length
from clawloop_shared.errors import AdapterInvalid, ConfigError
from clawloop_shared.records import Policy, Sampling

TOLERANCE = 1e-3
Files = dict[str, bytes]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300, 600) for _ in range(length)]


def request(ids: list[int], tokens: int = 8, **sampling: float) -> GenerateRequest:
    return GenerateRequest(prompt_ids=ids, max_tokens=tokens, sampling=Sampling(**sampling))  # type: ignore[arg-type]


async def collect(generation: Generation) -> list[Token]:
    return [token async for token in generation]


async def sample(engine: MlxEngine, asked: GenerateRequest) -> tuple[Generation, list[Token]]:
    generation = await engine.generate(asked)
    return generation, await collect(generation)


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


async def gap(
    engine: MlxEngine, ids: list[int], tokens: list[Token], *, version: int, temperature: float = 1.0
) -> float:
    """How far the captured logprobs are from teacher-forced ones, at worst."""
    scored = await engine.score(ids, ids_of(tokens), version=version, temperature=temperature)
    return max(abs(token.logprob - wanted) for token, wanted in zip(tokens, scored, strict=True))


def policy(engine: MlxEngine, version: int) -> Policy:
    return Policy(engine.line.line_id, version, f"hash{version}")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_captured_logprobs_are_those_of_a_teacher_forced_pass(engine: MlxEngine, temperature: float) -> None:
    ids = prompt(40)
    _, tokens = await sample(engine, request(ids, 24, temperature=temperature))
    assert await gap(engine, ids, tokens, version=0, temperature=temperature) < TOLERANCE
    assert len(tokens) == 1 or await gap(engine, ids, tokens, version=0, temperature=temperature + 1) > 0.01


async def test_a_batch_of_different_lengths_and_temperatures_captures_each_row_exactly(engine: MlxEngine) -> None:
    asked = [request(prompt(5 + 37 * n, n), 4 + 3 * n, temperature=(1.0, 0.7)[n % 2]) for n in range(8)]
    results = await asyncio.gather(*(sample(engine, one) for one in asked))
    for one, (_, tokens) in zip(asked, results, strict=True):
        assert tokens[-1].finish_reason == ("length" if len(tokens) == one.max_tokens else "stop")
        assert all(token.finish_reason is None for token in tokens[:-1])
        temperature = one.sampling.temperature
        assert await gap(engine, one.prompt_ids, tokens, version=0, temperature=temperature) < TOLERANCE


async def test_greedy_takes_the_likeliest_token_and_repeats_itself(engine: MlxEngine) -> None:
    asked = request(prompt(30), 10, temperature=0.0)
    first, again = [ids_of((await sample(engine, asked))[1]) for _ in range(2)]
    assert first == again


async def test_a_seed_repeats_a_sampled_answer_even_beside_other_calls(engine: MlxEngine) -> None:
    def seeded(seed: int) -> GenerateRequest:
        return GenerateRequest(prompt_ids=prompt(20), max_tokens=12, sampling=Sampling(seed=seed, temperature=1.5))

    alone = ids_of((await sample(engine, seeded(5)))[1])
    others = [sample(engine, one) for one in (request(prompt(9)), seeded(5), seeded(6))]
    crowd = await asyncio.gather(*others)
    assert ids_of(crowd[1][1]) == alone
    assert ids_of(crowd[2][1]) != alone


async def test_cutting_samplers_choose_only_what_they_leave(engine: MlxEngine) -> None:
    greedy = ids_of((await sample(engine, request(prompt(30), 6, temperature=0.0)))[1])
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        asked = GenerateRequest(prompt_ids=prompt(30), max_tokens=6, sampling=Sampling(**cut))
        assert ids_of((await sample(engine, asked))[1]) == greedy


async def test_the_same_prompt_twice_hits_the_cache_and_stays_exact(engine: MlxEngine) -> None:
    ids = prompt(60)
    cold, tokens = await sample(engine, request(ids))
    assert cold.cached_tokens == 0
    for grown in (ids, ids, ids + ids_of(tokens), ids + ids_of(tokens) + prompt(7, 3)):
        warm, more = await sample(engine, request(grown))
        assert 59 <= warm.cached_tokens < len(grown)
        assert await gap(engine, grown, more, version=0) < TOLERANCE
    assert warm.cached_tokens == len(ids) + len(tokens)


async def test_a_cancelled_call_frees_its_row(tiny_model: Path) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(completion_batch_size=1, prefill_batch_size=1))
    long = [await engine.generate(request(prompt(10, n), 1500)) for n in range(3)]
    async for _ in long[0]:
        break
    await long[1].aclose()
    del long[2]
    _, tokens = await asyncio.wait_for(sample(engine, request(prompt(10, 9), 3)), 20)
    assert tokens[-1].finish_reason
    await long[0].aclose()
    assert await settled(engine)
    await engine.close()


async def settled(engine: MlxEngine) -> bool:
    """Whether no call is left in flight, soon."""
    for _ in range(200):
        if engine.health().in_flight == 0:
            return True
        await engine.score([1], [2], version=0)  # goes through the same queue
    return False


async def test_an_adapter_is_swapped_in_under_load_and_every_call_keeps_its_version(
    engine: MlxEngine, make_adapter: Callable[..., Files]
) -> None:
    asked = [request(prompt(20 + n, n), 24) for n in range(16)]
    started = [await engine.generate(one) for one in asked]
    running = [asyncio.create_task(collect(generation)) for generation in started]
    await engine.load(policy(engine, 1), make_adapter(size=2.0))
    assert (await engine.use(1)).version == 1
    late = [await engine.generate(one) for one in asked]
    results = await asyncio.gather(*running, *(collect(generation) for generation in late))
    for generation, one, tokens in zip(started + late, asked + asked, results, strict=True):
        version = generation.policy.version
        assert await gap(engine, one.prompt_ids, tokens, version=version) < TOLERANCE
        assert await gap(engine, one.prompt_ids, tokens, version=1 - version) > 0.01
    assert [g.policy.version for g in started + late] == [0] * 16 + [1] * 16


async def test_a_cache_made_under_one_adapter_is_never_used_under_another(
    engine: MlxEngine, make_adapter: Callable[..., Files]
) -> None:
    ids = prompt(80)
    await sample(engine, request(ids))
    await engine.load(policy(engine, 1), make_adapter())
    await engine.use(1)
    generation, tokens = await sample(engine, request(ids))
    assert generation.cached_tokens == 0
    assert await gap(engine, ids, tokens, version=1) < TOLERANCE
    again, tokens = await sample(engine, request(ids))
    assert again.cached_tokens == 79
    assert await gap(engine, ids, tokens, version=1) < TOLERANCE


async def test_old_versions_go_when_their_calls_are_done(tiny_model: Path, make_adapter: Callable[..., Files]) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(keep_versions=2))
    held = await engine.generate(request(prompt(10), 1200, temperature=5.0))
    for version in (1, 2):
        await engine.load(policy(engine, version), make_adapter(seed=version))
        await engine.use(version)
    pinned = await engine.generate(
        GenerateRequest(prompt_ids=prompt(10), max_tokens=1500, sampling=Sampling(temperature=5.0), version=1)
    )
    for version in (3, 4):
        await engine.load(policy(engine, version), make_adapter(seed=version))
        await engine.use(version)
    assert engine.health().versions in ([0, 1, 3, 4], [0, 3, 4])
    await pinned.aclose()
    await held.aclose()
    assert await settled(engine)
    assert engine.health().versions == [0, 3, 4]
    with pytest.raises(UnknownVersion, match="loaded are"):
        await engine.use(1)
    await engine.unload(3)
    assert engine.health().versions == [0, 4]
    with pytest.raises(EngineError, match="serves"):
        await engine.unload(4)
    await engine.close()


async def test_the_base_is_untouched_by_adapters(engine: MlxEngine, make_adapter: Callable[..., Files]) -> None:
    ids = prompt(30)
    before = await engine.score(ids[:10], ids[10:], version=0)
    await engine.load(policy(engine, 1), make_adapter())
    await engine.use(1)
    assert await engine.score(ids[:10], ids[10:], version=0) == before
    assert await engine.score(ids[:10], ids[10:], version=1) != before


@pytest.mark.parametrize("spoil", ["nan", "shape", "rank", "line"])
async def test_a_bad_adapter_is_refused_and_the_old_one_serves(
    engine: MlxEngine, make_adapter: Callable[..., Files], spoil: str
) -> None:
    files, claimed = make_adapter(), policy(engine, 1)
    if spoil == "nan":
        files = make_adapter(size=float("nan"))
    elif spoil == "shape":
        files["adapter_model.safetensors"] = make_adapter(rank=5)["adapter_model.safetensors"]
    elif spoil == "rank":
        files = make_adapter(rank=65)
    else:
        claimed = Policy("other", 1)
    with pytest.raises(AdapterInvalid):
        await engine.load(claimed, files)
    assert engine.health().versions == [0]
    assert (await sample(engine, request(prompt(5))))[1]


async def test_an_error_in_the_model_ends_its_calls_and_not_the_thread(
    engine: MlxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clawloop_edge.engine import sampling

    def broken(logprobs: object, how: Sampling) -> object:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(sampling, "_cut", broken)
    bad = GenerateRequest(prompt_ids=prompt(9), max_tokens=9, sampling=Sampling(top_k=3))
    good = asyncio.create_task(sample(engine, request(prompt(20), 30)))
    with pytest.raises(EngineError, match="the model failed on this call"):
        await sample(engine, bad)
    assert (await good)[1]
    health = engine.health()
    assert health.alive
    assert health.in_flight == 0
    assert health.detail == "RuntimeError"


async def test_an_answer_is_whole_even_if_its_cache_cannot_be_kept(
    engine: MlxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._scheduler._cache, "put", broken)
    for _ in range(2):
        _, tokens = await sample(engine, request(prompt(20), 5))
        assert tokens[-1].finish_reason
    assert await settled(engine)
    assert engine.health().detail == "RuntimeError"


async def test_what_cannot_be_served_is_refused_by_name(engine: MlxEngine) -> None:
    context = engine.tokenizer.context_length
    with pytest.raises(PromptTooLong, match=str(context)):
        await engine.generate(request([5] * context))
    with pytest.raises(EngineError, match="empty"):
        await engine.generate(request([]))
    with pytest.raises(EngineError, match="vocabulary"):
        await engine.generate(request([10**6]))
    with pytest.raises(EngineError, match="temperature"):
        await engine.generate(request([5], temperature=-1.0))
    with pytest.raises(EngineError, match="max_tokens"):
        await engine.generate(request([5], 0))
    with pytest.raises(UnknownVersion):
        await engine.generate(GenerateRequest(prompt_ids=[5], max_tokens=1, sampling=Sampling(), version=7))
    assert engine.health().in_flight == 0


async def test_max_tokens_are_cut_to_what_fits_the_context(random_model: Path) -> None:
    engine = await MlxEngine.open(random_model)
    room = 3
    ids = prompt(engine.tokenizer.context_length - room)
    _, tokens = await sample(engine, request(ids, 50, temperature=9.0))
    assert len(tokens) == room or tokens[-1].finish_reason == "stop"
    await engine.close()


async def test_more_calls_than_the_queue_holds_are_refused(tiny_model: Path) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(max_queue=2))
    held = [await engine.generate(request(prompt(8), 1500)) for _ in range(2)]
    with pytest.raises(EngineBusy):
        await engine.generate(request(prompt(8)))
    for generation in held:
        await generation.aclose()
    assert await settled(engine)
    assert (await sample(engine, request(prompt(8))))[1]
    await engine.close()


async def test_close_ends_calls_in_flight_and_later_ones(tiny_model: Path) -> None:
    engine = await MlxEngine.open(tiny_model)
    held = await engine.generate(request(prompt(8), 1500, temperature=9.0))
    task = asyncio.create_task(collect(held))
    await engine.score([1], [2], version=0)
    await engine.close()
    with pytest.raises(EngineGone):
        await task
    with pytest.raises(EngineGone):
        await engine.generate(request(prompt(8)))
    assert not engine.health().alive


async def test_calls_that_come_and_go_at_random_leave_nothing_behind(
    tiny_model: Path, make_adapter: Callable[..., Files]
) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(completion_batch_size=6, prefill_batch_size=3))
    rng = random.Random(0)

    async def visit(number: int) -> None:
        ids, temperature = prompt(rng.randrange(1, 90), rng.randrange(6)), rng.choice([1.0, 0.7])
        generation = await engine.generate(request(ids, rng.randrange(1, 20), temperature=temperature))
        leaves_after = rng.choice([0, 1, 5, 99])
        tokens = []
        async for token in generation:
            tokens.append(token)
            if len(tokens) > leaves_after:
                break
        version = generation.policy.version
        assert await gap(engine, ids, tokens, version=version, temperature=temperature) < TOLERANCE
        if number in (20, 40):
            await engine.load(policy(engine, number), make_adapter(seed=number))
            await engine.use(number)

    await asyncio.gather(*(visit(number) for number in range(60)))
    assert await settled(engine)
    assert not engine._scheduler.busy
    assert engine.health().versions == [0, 20, 40]
    assert engine.health().detail == ""
    await engine.close()


async def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        await MlxEngine.open(tmp_path)


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=6)


@given(sequences, st.lists(st.integers(0, 2), min_size=1, max_size=7))
def test_a_prompts_longest_kept_start_is_found(kept: list[list[int]], asked: list[int]) -> None:
    trie = PrefixTrie()
    for ids in kept:
        trie.add("model", ids, tuple(ids))
    found = trie.search("model", asked)
    if asked in kept:
        assert found.exact == asked
        return
    starts = [len(ids) for ids in kept if asked[: len(ids)] == ids]
    shared = max((shared_length(ids, asked) for ids in kept), default=0)
    assert (found.exact, found.common_prefix, len(found.shorter or [])) == (None, shared, max(starts, default=0))
    assert (found.longer is None) is (shared == 0)
    if found.longer is not None:
        assert trie.get("model", found.longer) == tuple(found.longer)
        assert found.longer[:shared] == asked[:shared]


def test_a_long_kept_conversation_is_passed_by_in_no_time() -> None:
    trie = PrefixTrie()
    trie.add("model", list(range(60_000)), "kept")  # mlx-lm's own search takes seconds
    began = time.process_time()
    assert trie.search("model", [0, 1, 99_999]).common_prefix == 2
    assert time.process_time() - began < 0.5


async def test_old_caches_give_way_within_their_bounds(tiny_model: Path, make_adapter: Callable[..., Files]) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(cache_entries=3))
    cache = engine._scheduler._cache
    for n in range(5):
        await sample(engine, request(prompt(30, n), 2))
    assert len(cache) == 3
    await engine.load(policy(engine, 1), make_adapter())
    await engine.use(1)
    for n in range(2):
        await sample(engine, request(prompt(30, n), 2))
    assert len(cache) == 3
    await engine.close()

"""What must hold under load and after failures: nobody is held up, the thread goes on, health tells the truth."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from shutil import copy

import pytest

from clawloop_edge.engine.chores import Chores, Pace
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest, Generation, Token
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.engine.worker import Worker, _Thread
from clawloop_edge.errors import EngineError, EngineGone
from clawloop_shared.model_line import read_line
from clawloop_shared.records import Policy, Sampling

ROOT = Path(__file__).parents[2]
Files = dict[str, bytes]


def request(tokens: int, *, ids: int = 20, temperature: float = 9.0, seed: int | None = None) -> GenerateRequest:
    sampling = Sampling(temperature=temperature, seed=seed)
    return GenerateRequest(prompt_ids=[300 + n % 200 for n in range(ids)], max_tokens=tokens, sampling=sampling)


async def sample(engine: MlxEngine, asked: GenerateRequest) -> list[Token]:
    return [token async for token in await engine.generate(asked)]


class Idle:
    """Work that there is none of."""

    busy = False

    def turn(self) -> None: ...
    def fail_all(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


async def gaps(generation: Generation) -> list[float]:
    """Seconds between a call's tokens."""
    times = []
    async for _ in generation:
        times.append(time.monotonic())
    return [later - sooner for sooner, later in pairwise(times)]


async def test_scoring_and_loading_hold_up_no_stream(engine: MlxEngine, make_adapter: Callable[..., Files]) -> None:
    calls = [await engine.generate(request(300)) for _ in range(4)]
    assert await asyncio.gather(*(call.ready(20) for call in calls)) == [True] * 4
    streams = [asyncio.create_task(gaps(call)) for call in calls]
    for version in (1, 2):
        await engine.load(Policy(engine.line.line_id, version, f"h{version}"), make_adapter(seed=version, rank=64))
        scored = await engine.score([300] * 600, [301] * 200, version=version)
        assert len(scored) == 200
        await engine.use(version)
    every = sorted(gap for found in await asyncio.gather(*streams) for gap in found)
    median = every[len(every) // 2]
    assert every[-4 - len(every) // 200] <= median + 0.3, "but for a pause of the machine itself"


async def test_pieces_give_what_one_pass_gives(engine: MlxEngine, make_adapter: Callable[..., Files]) -> None:
    ids = [300 + n % 150 for n in range(700)]
    whole = await engine.score(ids[:600], ids[600:], version=0)
    assert len(whole) == 100
    tails = [(await engine.score(ids[:at], ids[at : at + 1], version=0))[0] for at in (600, 650, 699)]
    assert [whole[0], whole[50], whole[99]] == pytest.approx(tails, abs=1e-3)
    both = await asyncio.gather(*(engine.score(ids[:50], ids[50:60], version=0) for _ in range(5)))
    assert all(one == both[0] for one in both)


def test_pieces_grow_until_they_take_their_time() -> None:
    pace = Pace(512)
    for _ in range(20):
        pace.took(0.001)
    assert pace.tokens == 512
    for _ in range(20):
        pace.took(1.0)
    assert pace.tokens == 8


async def test_a_cancelled_score_is_not_computed(engine: MlxEngine) -> None:
    first = asyncio.create_task(engine.score([300] * 500, [301] * 9, version=0))
    second = asyncio.create_task(engine.score([300] * 500, [301] * 9, version=0))
    await asyncio.sleep(0)
    second.cancel()
    assert len(await first) == 9
    with pytest.raises(asyncio.CancelledError):
        await second
    computed = engine.score([1], [2], version=0)  # in order: the cancelled one is gone before it
    assert len(await computed) == 1
    assert len(engine._scheduler.chores._chores) <= 1


async def test_a_failing_command_or_turn_ends_what_it_belongs_to_and_not_the_thread(
    engine: MlxEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("no luck")

    engine._worker.post(broken)
    assert await sample(engine, request(3))
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_admit", broken)
        with pytest.raises(EngineError, match="the engine failed"):
            await asyncio.wait_for(sample(engine, request(3)), 20)
    assert await sample(engine, request(3))
    assert engine.health().alive
    assert caplog.text.count("no luck") >= 2


async def test_health_tells_when_a_turn_takes_long(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    began, release = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        release.wait(20)

    monkeypatch.setattr("clawloop_edge.engine.mlx._BUSY_S", 0.0)
    engine._worker.post(hang)
    assert await asyncio.to_thread(began.wait, 20)
    health = engine.health()
    release.set()
    assert (health.alive, health.detail) == (True, "busy for 0 s")


async def test_a_seed_repeats_an_answer_while_adapters_and_others_come_and_go(
    engine: MlxEngine, make_adapter: Callable[..., Files]
) -> None:
    asked = request(60, temperature=1.5, seed=11)
    alone = [token.token_id for token in await sample(engine, asked)]
    crowd = [asyncio.create_task(sample(engine, request(80, ids=n + 5))) for n in range(6)]
    again = asyncio.create_task(sample(engine, asked))
    await engine.load(Policy(engine.line.line_id, 1, "h"), make_adapter())
    await engine.use(1)
    assert [token.token_id for token in await again] == alone
    await asyncio.gather(*crowd)


async def test_a_quantised_model_serves_an_adapter_exactly(
    random_model: Path, tmp_path: Path, make_adapter: Callable[..., Files]
) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copy(random_model / name, tmp_path / name)
    model, config = load_model(random_model)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    engine = await MlxEngine.open(tmp_path)
    assert read_line(tmp_path).quantization
    await engine.load(Policy(engine.line.line_id, 1, "h"), make_adapter(folder=random_model))
    for version in (0, 1):
        await engine.use(version)
        asked = request(40, ids=70, temperature=0.7)
        tokens = await sample(engine, asked)
        ids = [token.token_id for token in tokens]
        scored = await engine.score(asked.prompt_ids, ids, version=version, temperature=0.7)
        assert max(abs(t.logprob - s) for t, s in zip(tokens, scored, strict=True)) < 1e-3
        other = await engine.score(asked.prompt_ids, ids, version=1 - version, temperature=0.7)
        assert max(abs(t.logprob - s) for t, s in zip(tokens, other, strict=True)) > 0.01
    await engine.close()


async def test_the_next_turn_starts_much_sooner_than_a_cold_prompt(engine: MlxEngine) -> None:
    async def first_token(asked: GenerateRequest) -> float:
        began = time.process_time()
        generation = await engine.generate(asked)
        async for _ in generation:
            return time.process_time() - began
        return 0.0

    await sample(engine, request(2, ids=30))  # warm
    ids = [300 + n * 7 % 290 for n in range(1500)]
    cold_s = await first_token(GenerateRequest(prompt_ids=ids, max_tokens=1, sampling=Sampling()))
    tokens = await sample(engine, GenerateRequest(prompt_ids=ids, max_tokens=8, sampling=Sampling(temperature=9.0)))
    grown = ids + [token.token_id for token in tokens] + ids[:20]
    warm_s = await first_token(GenerateRequest(prompt_ids=grown, max_tokens=1, sampling=Sampling()))
    assert warm_s <= 0.15 * cold_s


async def test_everything_is_let_go_in_the_thread_that_made_it(tiny_model: Path) -> None:
    engine = await MlxEngine.open(tiny_model, EngineSettings(completion_batch_size=2, prefill_batch_size=2))
    held = [await engine.generate(request(1000)) for _ in range(4)]
    scoring = asyncio.create_task(engine.score([300] * 1000, [301], version=0))
    assert await held[0].ready(20)
    await engine.close()
    with pytest.raises(EngineGone):
        await scoring
    for one in held:
        with pytest.raises(EngineGone):
            _ = [token async for token in one]
    assert not list(engine._scheduler._all_lanes())
    assert engine._versions.model_of(0) is None
    assert engine.health().memory_bytes > 0


def test_a_forked_process_takes_none_of_its_parents_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Thread(target=str)
    gone.start()
    gone.join()
    monkeypatch.setattr(_Thread, "parked", [gone])
    worker = Worker(Idle)
    worker.ready.result(10)
    worker.stop()


async def test_the_next_engine_takes_the_thread_of_the_one_before(tiny_model: Path) -> None:
    def threads() -> int:
        return sum(thread.name == "clawloop-engine" for thread in threading.enumerate())

    before = threads()
    for _ in range(3):
        engine = await MlxEngine.open(tiny_model)
        assert await sample(engine, request(3))
        await engine.close()
        assert not engine.health().alive
    assert threads() <= before + 1


def test_a_process_that_leaves_the_engine_running_ends_cleanly(tiny_model: Path) -> None:
    program = """
import asyncio, sys
from pathlib import Path
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest
from clawloop_shared.records import Sampling

async def main():
    engine = await MlxEngine.open(Path(sys.argv[1]))
    asked = GenerateRequest(prompt_ids=[300] * 20, max_tokens=5000, sampling=Sampling(temperature=9.0))
    calls = [await engine.generate(asked) for _ in range(3)]
    await calls[0].ready(20)
    await engine.score([300] * 50, [301], version=0)
    print("served")

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tiny_model)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_chores_that_fail_tell_the_one_who_asked() -> None:
    def broken() -> Generator[None, None, None]:
        yield
        raise ValueError("not so")

    chores, answer = Chores(), Future[None]()
    chores.add(broken, answer, kv_bytes=5)
    chores.turn(fits=lambda size: False)
    assert chores.kv_bytes == 0
    chores.turn(fits=lambda size: size == 5)
    with pytest.raises(ValueError, match="not so"):
        answer.result(0)
    assert not chores

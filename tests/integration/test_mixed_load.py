"""A thousand calls of all APIs at once, adapters swapped in meanwhile: every kept step is what was sampled and said."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, TCPConnector, web
from safetensors.numpy import save

from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.tool_calls import parse_reply
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_shared.lora import LINEARS, LoraConfig, expected_tensors
from clawloop_shared.model_line import read_shape
from clawloop_shared.records import Policy

from .talks import ChatTalk, CompletionTalk, Given, MessagesTalk, ResponsesTalk, Talk

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
TALKS = 250
TURNS = 4
AT_ONCE = 24
TOKEN = "mixed-load-token"
KINDS: list[type[Talk]] = [ChatTalk, ResponsesTalk, MessagesTalk, CompletionTalk]


class Load:
    """Plays conversations, notes what was given, and swaps adapters in as it goes."""

    def __init__(self, engine: MlxEngine, base_url: str, adapters: list[tuple[Policy, dict[str, bytes]]]) -> None:
        self._engine, self._url, self._adapters = engine, base_url, adapters
        self._free = asyncio.Semaphore(AT_ONCE)
        self.given: list[tuple[Given, float]] = []
        self.done = 0

    async def run(self) -> None:
        async with ClientSession(connector=TCPConnector(limit=0)) as http, asyncio.TaskGroup() as group:
            for seed in range(TALKS):
                group.create_task(self._talk(http, random.Random(seed)))

    async def _talk(self, http: ClientSession, rng: random.Random) -> None:
        kind, temperature = rng.choice(KINDS), rng.choice([1.0, 0.7])
        talk = kind(http, self._url, TOKEN, tools=rng.random() < 0.7, temperature=temperature)
        for number in range(TURNS):
            async with self._free:
                cut = rng.randint(1, 6) if rng.random() < 0.1 else None
                stream = cut is not None or rng.random() < 0.5
                text = rng.choice(["Who handles repairs in Oslo?", "And in Rome?", "Thank you.", f"Number {number}?"])
                self.given.append((await talk.turn(text, stream=stream, cut_after=cut), temperature))
                self.done += 1
                await self._swap()

    async def _swap(self) -> None:
        """The first adapter serves from a quarter of the load on, the next from half of it, and so on."""
        total = TALKS * TURNS
        while self._adapters and self.done >= total * (4 - len(self._adapters)) // 4:
            policy, files = self._adapters.pop(0)
            await self._engine.load(policy, files)
            await self._engine.use(policy.version)


def _adapter(seed: int) -> dict[str, bytes]:
    """A random adapter in PEFT's form, large enough to change what is said."""
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules=list(LINEARS))
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.1 / shape[1] ** 0.5, shape).astype(np.float32)
        for name, shape in expected_tensors(config, read_shape(MODEL)).items()
    }
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": list(LINEARS), "bias": "none"}
    return {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": save(tensors)}


async def _serve(engine: MlxEngine, pool: Pool) -> tuple[web.AppRunner, str]:
    app = make_app(engine, pool, settings=GatewaySettings(), token=TOKEN)
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.mark.slow
async def test_every_step_of_a_mixed_load_is_what_was_sampled_and_said(tmp_path: Path) -> None:
    engine = await MlxEngine.open(MODEL)
    adapters = [(Policy(engine.line.line_id, version, f"{version:064x}"), _adapter(version)) for version in (1, 2, 3)]
    loaded = list(adapters)
    with Pool.open(tmp_path / "pool", KnownKey.of(os.urandom(32)), writer=True) as pool:
        runner, url = await _serve(engine, pool)
        load = Load(engine, url, adapters)
        await load.run()
        await runner.cleanup()
        pool.submit(lambda database: None).result(30)
        kept = {given.step_id: pool.get_step(given.step_id) for given, _ in load.given}
    assert load.done == TALKS * TURNS
    assert not adapters, "all adapters were swapped in"
    await _check(engine, load, kept, loaded)
    await engine.close()


async def _check(
    engine: MlxEngine, load: Load, kept: dict[str, KeptStep | None], adapters: list[tuple[Policy, dict[str, bytes]]]
) -> None:
    versions: Counter[int] = Counter()
    parents = cancelled = worst = 0.0
    for policy, files in adapters:
        if policy.version not in engine.health().versions:
            await engine.load(policy, files)
    for given, temperature in load.given:
        found = kept[given.step_id]
        if found is None:
            assert given.cut, f"{given.step_id} was answered whole and is not kept"
            continue
        step = found.step
        versions[step.policy.version] += 1
        parents += bool(step.parent_id)
        cancelled += step.finish_reason == "cancelled"
        _check_text(engine, found, given)
        assert step.sampling.temperature == temperature
        assert (step.response_ids[-1] in engine.tokenizer.eos_ids) == (step.finish_reason == "stop")
        scored = await engine.score(
            step.prompt_ids, step.response_ids, version=step.policy.version, temperature=temperature
        )
        worst = max(worst, float(np.abs(np.array(scored) - np.array(step.response_logprobs)).max()))
        assert step.trainable == (step.finish_reason in ("stop", "length")), step.untrainable
    assert worst < 1e-3
    assert set(versions) == {0, 1, 2, 3}
    assert cancelled > 20
    assert parents > len(load.given) // 3
    print(f"\n{len(load.given)} calls, versions {dict(versions)}, {cancelled:.0f} cancelled, largest |Δ| {worst:.1e}")


def _check_text(engine: MlxEngine, kept: KeptStep, given: Given) -> None:
    """What the ids decode to is what the client got; one that went away got the beginning of it."""
    tools: Any = kept.tools
    text = engine.tokenizer.visible(kept.step.response_ids)
    content, calls = parse_reply(text, engine.tokenizer, tools=tools) if tools else (text, [])
    names = [(call["id"], call["function"]["name"]) for call in kept.reply.get("tool_calls", [])]
    if given.cut:
        assert content.startswith(given.text)
        return
    assert content == given.text
    assert names == [(call_id, name) for call_id, name, _ in given.calls]
    assert len(calls) == len(given.calls)

"""Swaps under load, for the engine's bench: signed adapters go through verification, probe and publishing into a
running engine once a second, while eight streams are answered."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save

from clawloop_edge.adapters.activate import Activator
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest
from clawloop_shared import signing
from clawloop_shared.files import sha256
from clawloop_shared.lora import LINEARS, LoraConfig, expected_tensors
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, sign_manifest
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.model_line import read_shape
from clawloop_shared.records import Policy, Sampling

STREAMS, RANK, PROBE_TOKENS = 8, 8, 64
NEAR_S = 0.25
"""a gap that overlaps a swap, or this long after it, is near it"""


class Swaps(msgspec.Struct, frozen=True):
    """Gaps between two tokens of one stream (s): the median, the longest near a swap, the longest elsewhere."""

    swaps: int
    requests: int
    lost: int
    median_s: float
    longest_s: float
    elsewhere_s: float


async def measure_swaps(model: Path, folder: Path, *, swaps: int) -> Swaps:
    """Serve eight streams and swap once a second, `swaps` times."""
    engine, key = await MlxEngine.open(model), signing.new_key()
    try:
        offers = [await _offer(engine, model, key=key, version=version) for version in range(1, swaps + 1)]
        store = AdapterStore(folder)
        activator = Activator(engine, store, release_key=signing.public_key(key), shape=read_shape(model))
        load = _Load(engine)
        clients = [asyncio.create_task(load.client(number)) for number in range(STREAMS)]
        times = []
        await asyncio.sleep(1)
        for offer in offers:
            began = time.perf_counter()
            reply = await activator.install(offer)
            if not reply.installed:
                raise RuntimeError(f"the bench's own adapter was refused: {reply.reason}")
            times.append((began, time.perf_counter() + NEAR_S))
            await asyncio.sleep(max(began + 1 - time.perf_counter(), 0))
        load.over = True
        await asyncio.gather(*clients)
    finally:
        await engine.close()
    return load.result(times)


class _Load:
    """Eight clients that ask again and again until it is over."""

    def __init__(self, engine: MlxEngine) -> None:
        self._engine, self.over = engine, False
        self._gaps: list[tuple[float, float]] = []
        self._requests = self._lost = 0

    async def client(self, number: int) -> None:
        rng = np.random.default_rng(number)
        while not self.over:
            ids = [int(i) for i in rng.integers(300, 1000, 20)]
            asked = GenerateRequest(prompt_ids=ids, max_tokens=150, sampling=Sampling())
            self._requests += 1
            before, reason = 0.0, None
            async for token in await self._engine.generate(asked):
                now, reason = time.perf_counter(), token.finish_reason
                if before:
                    self._gaps.append((before, now))
                before = now
            self._lost += reason is None

    def result(self, times: list[tuple[float, float]]) -> Swaps:
        near: list[float] = []
        far: list[float] = []
        for sooner, later in self._gaps:
            touched = any(sooner < end and later > began for began, end in times)
            (near if touched else far).append(later - sooner)
        every = sorted(near + far)
        return Swaps(len(times), self._requests, self._lost, every[len(every) // 2], max(near), max(far, default=0.0))


async def _offer(engine: MlxEngine, model: Path, *, key: bytes, version: int) -> AdapterOffer:
    """A random adapter, signed, with the probe that the model really gives."""
    files = _adapter(model, seed=version)
    rng = np.random.default_rng(version)
    ids = [int(i) for i in rng.integers(300, 1000, PROBE_TOKENS)]
    await engine.load(Policy(engine.line.line_id, 10_000 + version, "probe"), files)
    logprobs = await engine.score(ids[:1], ids[1:], version=10_000 + version)
    await engine.unload(10_000 + version)
    manifest = Manifest(
        line=engine.line,
        version=version,
        previous_sha256="",
        files=[FileEntry(name, len(data), sha256(data)) for name, data in files.items()],
        rank=RANK,
        alpha=16.0,
        target_modules=list(LINEARS),
        probe=Probe(ids, logprobs),
        evaluation=Evaluation("none", 0, 0.0, 0.0, 0.0),
        round_id="bench",
        lineage_root="",
        created_ms=time.time_ns() // 1_000_000,
        expires_ms=time.time_ns() // 1_000_000 + 3_600_000,
    )
    return AdapterOffer(sign_manifest(manifest, key), files)


def _adapter(model: Path, *, seed: int) -> dict[str, bytes]:
    config = LoraConfig(r=RANK, lora_alpha=16.0, target_modules=list(LINEARS), use_rslora=False)
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.1 / shape[1] ** 0.5, shape).astype(np.float32)
        for name, shape in expected_tensors(config, read_shape(model)).items()
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16.0,
        "target_modules": list(LINEARS),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }
    return {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": save(tensors)}

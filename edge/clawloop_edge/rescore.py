"""Checking kept steps against the model: teacher-forced logprobs of their responses under the policies they name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from clawloop_edge.adapters.store import kept_files
from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.errors import UnknownVersion
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_engine
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Policy


def rescore_steps(home: EdgeHome, kept: Sequence[KeptStep]) -> list[float]:
    """For each step the largest absolute difference (nats) between kept and teacher-forced logprobs. The model is
    loaded once, and each adapter once.

    Raises:
        UnknownVersion: the model line changed since.
        StorageError: an adapter is kept here no more.
        ConfigError: the engine is a server that only gives text.
    """
    return asyncio.run(_rescore(home, kept))


async def _rescore(home: EdgeHome, kept: Sequence[KeptStep]) -> list[float]:
    engine = await open_engine(home.load_config())
    try:
        if isinstance(engine, TextEngine):
            raise ConfigError('a server that only gives text cannot score; set [model] kind = "mlx" to rescore')
        found: dict[int, float] = {}
        for policy in dict.fromkeys(one.step.policy for one in kept):
            await _load(engine, policy, home)
            for at, one in enumerate(kept):
                if one.step.policy == policy:
                    found[at] = await _difference(engine, one)
            if policy.version:
                await engine.unload(policy.version)
    finally:
        await engine.close()
    return [found[at] for at in range(len(kept))]


async def _load(engine: Engine, policy: Policy, home: EdgeHome) -> None:
    if policy.line != engine.line.line_id:
        raise UnknownVersion(f"a step was sampled by model line {policy.line}, not by this one, {engine.line.line_id}")
    if policy.version:
        await engine.load(policy, kept_files(home.adapters, policy))


async def _difference(engine: Engine, kept: KeptStep) -> float:
    step = kept.step
    scored = await engine.score(
        step.prompt_ids, step.response_ids, version=step.policy.version, temperature=step.sampling.temperature
    )
    return max((abs(a - b) for a, b in zip(scored, step.logprobs, strict=True)), default=0.0)

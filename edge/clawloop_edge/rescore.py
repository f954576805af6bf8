"""Checking a kept step against the model: the teacher-forced logprobs of its response under the policy it names."""

from __future__ import annotations

import asyncio

from clawloop_edge.adapters.store import kept_files
from clawloop_edge.errors import UnknownVersion
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_engine
from clawloop_edge.pool.records import KeptStep


def rescore_step(home: EdgeHome, kept: KeptStep) -> float:
    """The largest absolute difference (nats) between kept and teacher-forced logprobs.

    Raises:
        UnknownVersion: the model line changed since.
        StorageError: the adapter is kept here no more.
    """
    return asyncio.run(_rescore(home, kept))


async def _rescore(home: EdgeHome, kept: KeptStep) -> float:
    step = kept.step
    engine = await open_engine(home.load_config())
    try:
        if step.policy.line != engine.line.line_id:
            raise UnknownVersion(f"step {step.step_id} was sampled by model line {step.policy.line}, not by this one")
        if step.policy.version:
            await engine.load(step.policy, kept_files(home.adapters, step.policy))
        scored = await engine.score(
            step.prompt_ids,
            step.response_ids,
            version=step.policy.version,
            temperature=step.sampling.temperature,
        )
    finally:
        await engine.close()
    return max(abs(a - b) for a, b in zip(scored, step.response_logprobs, strict=True))

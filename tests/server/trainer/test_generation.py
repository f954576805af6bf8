"""Sampled replies carry the logprobs of the very distribution that they were drawn from."""

import random
from pathlib import Path

import pytest

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Sampling
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.rows import Sample


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_reply_has_the_logprobs_that_the_engine_scores(tiny_folder: Path, dtype: str, temperature: float) -> None:
    engine = TrainEngine.open(tiny_folder, TrainSettings(rank=4, dtype=dtype))
    rng = random.Random(3)
    prompts = [[2, 3, 4, *(rng.randrange(2, 320) for _ in range(size))] for size in (5, 2, 9)]
    sampling = Sampling(max_tokens=6, eos_ids=frozenset(range(40)), temperature=temperature, seed=4)
    replies = engine.generate(prompts, sampling=sampling)
    assert len({len(reply.ids) for reply in replies}) > 1, "one reply must end early for this to say anything"
    samples = [
        Sample(
            step_id=str(n),
            trajectory=n,
            token_ids=prompt + reply.ids,
            trained=range(len(prompt), len(prompt) + len(reply.ids)),
            logprobs=reply.logprobs,
            advantages=[0.0] * len(reply.ids),
            temperature=temperature,
        )
        for n, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]
    for reply, scored in zip(replies, engine.logprobs(samples), strict=True):
        # The layers of a bfloat16 base round: with a cache or without one, to other last bits.
        assert reply.logprobs == pytest.approx(scored, abs=1e-5 if dtype == "float32" else 0.05)


def test_what_was_not_drawn_has_certainty(engine: TrainEngine) -> None:
    (reply,) = engine.generate([[2, 3, 4]], sampling=Sampling(max_tokens=3, eos_ids=frozenset({1}), temperature=0.0))
    assert reply.logprobs == [0.0] * len(reply.ids)

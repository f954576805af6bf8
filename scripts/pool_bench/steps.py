"""Steps to keep, made from a seed: words as a language has them, ids, and logprobs as a model gives them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import accumulate

from clawloop_edge.pool.records import KeptStep
from clawloop_shared.ids import new_step_id
from clawloop_shared.records import Policy, Sampling, Step

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_WORDS = 20_000
_ASKED_WORDS, _SAID_WORDS = 280, 110
_A_SESSION = 10
_BODIES = 1024
"""of these a long run puts its steps together: making each word anew would take longer than keeping it"""
_POLICY, _SAMPLING = Policy(line="9f2c" * 16), Sampling(temperature=0.7)


class Words:
    """A made-up language: few words are frequent, most are rare (Zipf), as in text that people and models write."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        letters = list(accumulate(1 / (rank + 2) for rank in range(len(_LETTERS))))
        lengths = self.chance.choices(range(2, 11), k=_WORDS)
        self._words = ["".join(self.chance.choices(_LETTERS, cum_weights=letters, k=length)) for length in lengths]
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(_WORDS)))

    def ids(self, count: int) -> list[int]:
        """Numbers of `count` words."""
        return self.chance.choices(range(_WORDS), cum_weights=self._weights, k=count)

    def text(self, ids: list[int]) -> str:
        """The words with these numbers."""
        return " ".join([self._words[number] for number in ids])

    def logprobs(self, count: int) -> list[float]:
        """What a model that is sure of most of its words gives, in 32 bits."""
        raw = [-(self.chance.expovariate(1.0) ** 3) * 0.1 for _ in range(count)]
        return list(struct.unpack(f"{count}f", struct.pack(f"{count}f", *raw)))


def small_steps(words: Words, count: int) -> Iterator[KeptStep]:
    """`count` steps of 8 KB of JSON each, ten in a session, that have nothing in common but the words."""
    asked = [words.ids(_ASKED_WORDS) for _ in range(min(count, _BODIES))]
    said = [(words.ids(_SAID_WORDS), words.logprobs(_SAID_WORDS)) for _ in range(min(count, _BODIES))]
    session = ""
    for number in range(count):
        if number % _A_SESSION == 0:
            session = f"{words.chance.randrange(1 << 128):032x}"
        response, logprobs = said[number % _BODIES]
        prompt = asked[(number + number // _BODIES) % len(asked)]
        yield _step(words, session, number, prompt=prompt, response=response, logprobs=logprobs)


def _step(
    words: Words, session: str, number: int, *, prompt: list[int], response: list[int], logprobs: list[float]
) -> KeptStep:
    at_ms = 1_700_000_000_000 + number
    said = words.text(response)
    step = Step(
        step_id=new_step_id(),
        session_id=session,
        run_id=f"{session[:28]}{number % _A_SESSION // 3:04x}",
        prompt_ids=prompt,
        response_ids=response,
        response_logprobs=logprobs,
        policy=_POLICY,
        sampling=_SAMPLING,
        finish_reason="stop",
        created_ms=at_ms,
    )
    return KeptStep(
        step=step,
        messages=[{"role": "user", "content": words.text(prompt)}],
        reply={"role": "assistant", "content": said},
        text=said + "<|im_end|>",
        app="bench",
        started_ms=at_ms,
        first_token_ms=at_ms + 20,
        finished_ms=at_ms + 900,
    )

"""What is measured on: models by their sizes, sessions by the lengths of their parts. All random, from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from clawloop_shared.rows import Sample

FIRST_WORD = 2
"""ids below it are the padding and the end"""


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 by its sizes; the head is the embedding where they are tied."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool = True

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear maps of a layer: q, k, v, o, gate, up, down."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]


SMALL = ModelShape(8192, hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=768, tied=False)
QUICK = ModelShape(512, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96)
WIDE_HEAD = ModelShape(151_936, hidden=512, layers=1, heads=8, kv_heads=4, head_dim=64, intermediate=512)
QWEN3_4B = ModelShape(151_936, hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728)


@dataclass(frozen=True)
class Part:
    """A turn of a session: what is new before a call, what the policy answers, and what the request ends with that
    the next one has not (`passing`)."""

    new: int
    sampled: int
    passing: int = 0


@dataclass(frozen=True)
class SessionShape:
    """A session by the tokens of its parts; `system` are those that every call begins with."""

    name: str
    system: int
    parts: tuple[Part, ...]


def append_only(name: str, *, system: int, user: int, turns: int, sampled: int, tool: int) -> SessionShape:
    """Each call goes on from the one before: the user's words first, then what tools said."""
    return SessionShape(name, system, tuple(Part(user if not turn else tool, sampled) for turn in range(turns)))


APPEND_ONLY = append_only("8 turns, append-only", system=256, user=32, turns=8, sampled=64, tool=96)
LONG = append_only("8 turns, long", system=2848, user=357, turns=8, sampled=712, tool=1069)

CHARS_A_TOKEN = 4
PREFIX_SCALE = 8
"""so much shorter than with OpenClaw is here what never changes: a CPU could not do it otherwise. Sharing is worth
the less for it: unscaled, nearly all of a prompt is shared"""


@dataclass(frozen=True)
class Requests:
    """Lengths in characters of OpenClaw 2026.9 requests: system text and tools that every request begins with, the
    user's messages (the first has a block about the session), an assistant message with a call, and the message of
    internal context that each request ends with and the next one has not (longer where something happened).

    What it was measured with answered by echo; so results and answers have the lengths of bench-pool's session."""

    system: int = 49_495
    tools: int = 10_289
    first_user: int = 305
    user: int = 94
    call: int = 164
    results: tuple[int, ...] = (40, 120, 300, 900)
    answer: int = 500
    context: int = 262
    context_with_events: int = 418

    def shape(self) -> SessionShape:
        """Four turns of a user, each a tool call and an answer."""

        def tokens(characters: int) -> int:
            return -(-characters // CHARS_A_TOKEN)

        parts: list[Part] = []
        for turn, result in enumerate(self.results):
            context = self.context_with_events if turn == len(self.results) // 2 else self.context
            user = self.user if turn else self.first_user
            parts.append(Part(tokens(user), tokens(self.call), tokens(context)))
            parts.append(Part(tokens(result), tokens(self.answer), tokens(self.context)))
        return SessionShape("OpenClaw's shape", tokens(self.system + self.tools) // PREFIX_SCALE, tuple(parts))


OPENCLAW = Requests().shape()


def shorter(shape: SessionShape, factor: int) -> SessionShape:
    """The same session with each part `factor` times shorter, though never empty."""

    def less(tokens: int) -> int:
        return tokens and max(1, tokens // factor)

    parts = tuple(Part(less(p.new), less(p.sampled), less(p.passing)) for p in shape.parts)
    return SessionShape(shape.name, less(shape.system), parts)


def session(shape: SessionShape, *, vocab: int, seed: int = 0, trajectory: int = 0) -> list[Sample]:
    """The calls of a session, one trajectory, as a uniform policy would have sampled them."""
    words = _words(vocab, seed)
    history = list(islice(words, shape.system))
    samples = []
    for number, part in enumerate(shape.parts):
        history += islice(words, part.new)
        prompt = [*history, *islice(words, part.passing)]
        response = list(islice(words, part.sampled))
        advantage = 1.0 if (trajectory + number) % 2 else -0.5
        trained = range(len(prompt), len(prompt) + len(response))
        samples.append(_sample(prompt + response, trained, vocab=vocab, advantage=advantage, trajectory=trajectory))
        history += response
    return samples


def multi_turn_batch(*, vocab: int, trajectories: int = 8, scale: int = 1, seed: int = 0) -> list[Sample]:
    """Unrelated trajectories of one sequence each: a prompt of 32 to 255 tokens, one to four rounds of an answer (16 to
    63) and a tool's result (16 to 95, not trained), a last answer of 16. All `scale` times shorter."""
    chance, words = random.Random(seed), _words(vocab, seed + 1)
    samples = []
    for trajectory in range(trajectories):
        ids, trained = list(islice(words, chance.randrange(32, 256) // scale)), list[int]()
        for _ in range(chance.randrange(1, 5)):
            sampled, tool = chance.randrange(16, 64) // scale, chance.randrange(16, 96) // scale
            trained += range(len(ids), len(ids) + sampled)
            ids += islice(words, sampled + tool)
        trained += range(len(ids), len(ids) + 16 // scale)
        ids += islice(words, 16 // scale)
        advantage = 1.0 if trajectory % 2 else -1.0
        samples.append(_sample(ids, trained, vocab=vocab, advantage=advantage, trajectory=trajectory))
    return samples


def _words(vocab: int, seed: int) -> Iterator[int]:
    chance = random.Random(seed)
    while True:
        yield chance.randrange(FIRST_WORD, vocab)


def _sample(ids: list[int], trained: Sequence[int], *, vocab: int, advantage: float, trajectory: int) -> Sample:
    return Sample(
        step_id=f"{trajectory}",
        trajectory=trajectory,
        token_ids=ids,
        trained=trained,
        logprobs=[-math.log(vocab)] * len(trained),
        advantages=[advantage] * len(trained),
    )


@dataclass(frozen=True)
class Work:
    """What must be computed at least: `tokens` through the body, `pairs` of a token and one that it sees, `trained`
    through the head."""

    tokens: int
    pairs: int
    trained: int

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.trained + other.trained)


def shared_work(samples: Sequence[Sample]) -> Work:
    """With everything shared that can be: the nodes of the trie of all calls."""
    ordered = sorted(list(sample.token_ids) for sample in samples)
    tokens = pairs = 0
    for before, ids in pairwise([[], *ordered]):
        common = next(
            (at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        tokens += len(ids) - common
        pairs += _triangle(len(ids)) - _triangle(common)
    return Work(tokens, pairs, sum(len(sample.trained) for sample in samples))


def call_work(samples: Sequence[Sample]) -> Work:
    """With each call by itself."""
    sizes = [len(sample.token_ids) for sample in samples]
    return Work(sum(sizes), sum(map(_triangle, sizes)), sum(len(sample.trained) for sample in samples))


def _triangle(size: int) -> int:
    return size * (size + 1) // 2

"""What candidates are judged with: the tasks of the gate, played by a model under an adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from clawloop_server.config import ServerConfig
from clawloop_server.home import Home
from clawloop_server.release.gate import GateSettings
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Reply, Sampling
from clawloop_server.trainer.memory import is_out_of_memory, release
from clawloop_server.trainer.tasks import Scores, Task, TemplateRenderer, load_tasks, play
from clawloop_server.vault.store import lineage_root
from clawloop_shared.files import sha256_file

_log = logging.getLogger("clawloop.trainer")
CACHE_TOKENS = 1 << 15
"""positions that the key-value cache of one batch may have; 4.5 GiB for the shape of Qwen3-4B in bfloat16"""


@dataclass
class Batches:
    """Generates for many prompts, as many at once as `cache_tokens` have room for, each with its whole reply.

    What is one batch follows from the lengths of the prompts. Each batch has a seed of its own, by the place of its
    first prompt. Where the memory does not suffice, batches are half as large from then on.
    """

    cache_tokens: int = CACHE_TOKENS

    def generate(self, engine: TrainEngine, prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> list[Reply]:
        """One reply for each prompt."""
        found: list[Reply] = []
        while len(found) < len(prompts):
            size = self._fitting(prompts[len(found) :], sampling.max_tokens)
            batch = prompts[len(found) : len(found) + size]
            seeded = replace(sampling, seed=sampling.seed + (len(found) << 32))
            try:
                found += engine.generate(batch, sampling=seeded)
                continue
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self.cache_tokens = _positions(batch[: size // 2], sampling.max_tokens)
            _log.warning("no memory for %d episodes of the gate at once: %d from now on", size, size // 2)
            release()
        return found

    def _fitting(self, prompts: Sequence[Sequence[int]], reply: int) -> int:
        """How many of the first prompts make a batch, at least one."""
        longest = 0
        for count, prompt in enumerate(prompts):
            longest = max(longest, len(prompt))
            if count and (count + 1) * (longest + reply) > self.cache_tokens:
                return count
        return len(prompts)


def _positions(prompts: Sequence[Sequence[int]], reply: int) -> int:
    """Of the cache of a batch: prompts are padded to the longest, what they share is there for each."""
    return len(prompts) * (max(map(len, prompts)) + reply)


@dataclass(frozen=True)
class Gate:
    """The tasks, and how they are played; `suite` names them with their hash."""

    settings: GateSettings
    tasks: list[Task]
    suite: str
    renderer: TemplateRenderer
    eos_ids: frozenset[int]
    batches: Batches = field(default_factory=Batches)

    @classmethod
    def open(cls, config: ServerConfig, home: Home, *, engine: TrainEngine, tokenizer: Any) -> Gate:
        """The gate of a server.

        Raises:
            ConfigError: its tasks cannot be read.
        """
        settings = msgspec.convert(msgspec.structs.asdict(config.gate), GateSettings)
        path = home.folder / settings.tasks
        return cls(
            settings=settings,
            tasks=load_tasks(path) if settings.tasks else [],
            suite=f"{path.name}@{sha256_file(path)[:12]}" if settings.tasks else "",
            renderer=TemplateRenderer(tokenizer),
            eos_ids=_eos_ids(engine, tokenizer),
        )

    def play(self, engine: TrainEngine, seed: int) -> Scores:
        """How the engine as it is does at the tasks."""

        def sample(prompts: Sequence[Sequence[int]], turn: int) -> list[Reply]:
            sampling = Sampling(
                max_tokens=self.settings.max_tokens,
                eos_ids=self.eos_ids,
                temperature=self.settings.temperature,
                seed=seed + turn,
            )
            return self.batches.generate(engine, prompts, sampling=sampling)

        return play(self.tasks, sample, renderer=self.renderer, samples=self.settings.samples)

    def seed(self, trajectory_ids: Sequence[str]) -> int:
        """Another seed for each round's data, a refused round's too: with one seed for all, a lucky draw of the current
        adapter would refuse one candidate after the other. The same data gives the same seed, so a round can be
        redone."""
        digest = lineage_root([*trajectory_ids, f"gate seed {self.settings.seed}"])
        return int(digest[:8], 16)


def _eos_ids(engine: TrainEngine, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply, by the model's generation settings and its tokenizer."""
    found = engine.model.generation_config.eos_token_id
    named = found if isinstance(found, list) else [found]
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if token is not None)

"""What candidates are judged with: the tasks of the gate, played by a model under an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from clawloop_server.config import ServerConfig
from clawloop_server.home import Home
from clawloop_server.release.gate import GateSettings
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Reply, Sampling
from clawloop_server.trainer.tasks import Scores, Task, TemplateRenderer, load_tasks, play
from clawloop_server.vault.store import lineage_root
from clawloop_shared.files import sha256_file


@dataclass(frozen=True)
class Gate:
    """The tasks, and how they are played; `suite` names them with their hash."""

    settings: GateSettings
    tasks: list[Task]
    suite: str
    renderer: TemplateRenderer
    eos_ids: frozenset[int]

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
            return engine.generate(prompts, sampling=sampling)

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

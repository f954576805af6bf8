"""Where training goes on from: the checkpoint of the round that made the newest adapter that nobody took back or
rejected.

The database names it; a round that was refused or failed left nothing behind. Knows no trajectory and no gate.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import msgspec

from clawloop_server.release.records import AdapterRecord, AdapterState
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.checkpoint import remove_drafts
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.loop import TrainState
from clawloop_server.trainer.running import RUNNING_FILE
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import WEIGHTS_FILE

_log = logging.getLogger("clawloop.trainer")

KEPT_CHECKPOINTS = 8
START = "start"

Named = tuple[str, int]
"""a checkpoint, by its round (or `START`), and the version of its adapter"""


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a checkpoint: what training remembers, and what the adapter's numbers mean."""

    state: TrainState
    line_id: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]


class Saves:
    """The checkpoints of one line, in `folder`."""

    def __init__(self, folder: Path, *, engine: TrainEngine, registry: Registry, line_id: str) -> None:
        self._folder, self._engine, self._registry, self._line_id = folder, engine, registry, line_id

    def begin(self) -> None:
        """Remove what a crash left, and keep the beginning if nothing was made yet."""
        remove_drafts(self._folder)
        self._registry.remove_drafts()
        self.prune()
        if self.newest() is None:
            self.save(START, TrainState())

    def newest(self, cohort: str = "") -> AdapterRecord | None:
        """The adapter that training of a cohort goes on from: its own newest, or that of all others as long as it has
        none; not one that the operator took back or rejected, and not a mere copy."""
        records = self._registry.adapters(line_id=self._line_id)
        live = [r for r in records if not r.state.is_gone and not r.facts.copy_of]
        return next((r for name in (cohort, "") for r in live if r.cohort == name), None)

    def named(self, cohort: str = "") -> Named:
        """The checkpoint that the database names."""
        newest = self.newest(cohort)
        return (newest.facts.round_id, newest.version) if newest else (START, 0)

    def unwanted(self, went_on_from: Named, cohort: str = "") -> str:
        """Why a round is refused, if the operator took back or rejected, while it ran, the adapter that it went on
        from: else it would bring back what nobody wants. Its data are not at fault."""
        round_id, version = went_on_from
        if self.named(cohort)[0] == round_id:
            return ""
        rejected = version and self._registry.adapter(version).state is AdapterState.REJECTED
        what = "rejected" if rejected else "rolled back"
        return f"adapter {version}, which it went on from, was {what} meanwhile; its data wait for another"

    def restore(self, cohort: str = "") -> tuple[TrainState, Named]:
        """Make the engine the one that the database names; its state, and which that is.

        Raises:
            ConfigError: it is of other settings than the engine's.
        """
        newest, named = self.newest(cohort), self.named(cohort)
        checkpoint = self.path(named[0])
        if newest is None or checkpoint.exists():
            saved = msgspec.json.decode(self._engine.load_state(checkpoint), type=Saved)
        else:
            saved = self._start_from(newest)
        mine = self._saved(saved.state)
        if saved != mine:
            raise ConfigError(
                f"training goes on from rank {saved.rank}, alpha {saved.alpha:g}, {len(saved.target_modules)} targets"
                f" of line {saved.line_id}, but [train] says rank {mine.rank}, alpha {mine.alpha:g},"
                f" {len(mine.target_modules)} targets of line {mine.line_id}; change the settings back"
            )
        return msgspec.structs.replace(saved.state, version=named[1]), named

    def _start_from(self, adapter: AdapterRecord) -> Saved:
        """Go on from an adapter whose checkpoint was pruned (the operator went back further than they reach): its
        weights are among its files; optimizer, learning rate and baseline begin anew."""
        facts = adapter.facts
        _log.warning("round %s has no checkpoint any more; going on from the files of its adapter", facts.round_id)
        self._engine.start_from(self._registry.files(adapter.version)[WEIGHTS_FILE])
        return Saved(
            state=TrainState(),
            line_id=adapter.line_id,
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=tuple(sorted(facts.target_modules)),
        )

    def _saved(self, state: TrainState) -> Saved:
        settings = self._engine.settings
        return Saved(
            state=state,
            line_id=self._line_id,
            rank=settings.rank,
            alpha=settings.alpha,
            target_modules=tuple(sorted(settings.target_modules)),
        )

    def path(self, name: str) -> Path:
        """The file of a checkpoint."""
        return self._folder / f"{name}.safetensors"

    def save(self, name: str, state: TrainState) -> None:
        """Publish the engine and `state` as the checkpoint of that name."""
        self._engine.save_state(self.path(name), text=msgspec.json.encode(self._saved(state)).decode())

    def prune(self) -> None:
        """Remove checkpoints that nothing goes back to: all but those of the newest adapters of each cohort. One of a
        round that did not pass may have learned from what was forgotten since."""
        rejected = AdapterState.REJECTED
        records = [r for r in self._registry.adapters() if not r.facts.copy_of and r.state is not rejected]
        kept, seen = list[AdapterRecord](), Counter[str]()
        for record in records:
            seen[record.cohort] += record.line_id == self._line_id
            if record.line_id != self._line_id or seen[record.cohort] <= KEPT_CHECKPOINTS:
                kept.append(record)
        names = {START, *(record.facts.round_id for record in kept)}
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in names and path.name != RUNNING_FILE:
                path.unlink()

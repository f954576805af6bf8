"""Opening what `[signals]` names: the scorers, the worker that asks them, and the one of `/compute_reward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from clawloop_edge.gateway.trajectory_facts import read_completed, read_metadata
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_edge.signals.registry import SCORERS, Deps
from clawloop_edge.signals.worker import SignalWorker
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from clawloop_edge.pool.reading import Reading
    from clawloop_edge.pool.records import Json
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.signals.protocol import Scorer
    from clawloop_edge.signals.settings import SignalsSettings

REWARDING = ("rule", "exact", "regex", "reward-model")
"""scorers that can judge a response by itself, in no order"""


def open_worker(pool: Pool, deps: Deps, *, busy: Callable[[], int]) -> SignalWorker:
    """The worker with all scorers that are configured, not started yet.

    Raises:
        ConfigError: a scorer that there is not, or one that cannot work as it is configured.
    """
    return SignalWorker(
        pool,
        deps.settings,
        scorers=[open_scorer(name, deps) for name in dict.fromkeys(deps.settings.scorers)],
        metadata_of=metadata_of,
        completed=read_completed_of,
        clock_ms=wall_clock_ms,
        busy=busy,
    )


def open_scorer(name: str, deps: Deps) -> Scorer:
    """One scorer, by its name. Raises ConfigError."""
    if name not in SCORERS:
        raise ConfigError(f"[signals] names the scorer {name!r}; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name](deps)


def check_scorers(settings: SignalsSettings, *, folder: Path, port: int) -> dict[str, str]:
    """What is wrong with each scorer that is configured, as far as it can be told without a model; empty: nothing is.

    A factory connects to nothing and asks nobody, so that what it is to work with may stand for what there will be.
    """
    later: Any = object()
    deps = Deps(settings=settings, engine=later, folder=folder, border=later, port=port)
    names = dict.fromkeys([*settings.scorers, *filter(None, [settings.compute_reward])])
    return {name: _problem(name, deps) for name in names}


def _problem(name: str, deps: Deps) -> str:
    try:
        open_scorer(name, deps)
    except ConfigError as error:
        return str(error)
    return ""


def open_reward(deps: Deps) -> Scorer | None:
    """The scorer of `/compute_reward`, one of its own so that nobody waits for the worker's; None: there is none.

    Raises:
        ConfigError: there is no such scorer, or it cannot work as it is configured.
    """
    settings = deps.settings
    name = settings.compute_reward or next((name for name in settings.scorers if name in REWARDING), "")
    return open_scorer(name, deps) if name else None


def metadata_of(reading: Reading, trajectory_id: str) -> Json:
    """What a caller said of a trajectory."""
    return read_metadata(reading.database, reading.keyring, trajectory_id=trajectory_id)


def read_completed_of(pool: Pool, trajectory_ids: Sequence[str]) -> dict[str, bool]:
    """Those that were completed, and whether all of their steps are on disk."""
    with pool.read() as database:
        return read_completed(database, trajectory_ids)

"""Where cohorts begin that part: with the last adapter beside which their devices still agreed, as new versions.

What was made after it is a compromise that serves nobody, and a policy that is sure of the wrong thing tries no other
(docs/log.md). So the cohort that was split goes back, too, unless those that part are few: they may lie, and take
nobody else's adapter away. Signs nothing: the hub releases what is recorded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clawloop_server.release.lineage import ancestry
from clawloop_server.release.records import AdapterState, Candidate
from clawloop_server.release.registry import Registry


def begin_apart(
    registry: Registry,
    *,
    line_id: str,
    cohort: str,
    parted: Sequence[str],
    since: int,
    back: bool,
    bare: Callable[[str], Candidate],
) -> None:
    """Have those that `parted` from `cohort` go on from adapter `since`; with `back` the cohort does, too, and what it
    made after it is taken back. Part of the transaction that records the split. Where `since` was rejected, the newest
    before it that was not takes its place.

    `bare`: the candidate, for a cohort, that leaves the model as it is, which is what there was before the first
    adapter (`since` 0).
    """
    since = _wanted(registry, since) if since else 0
    made = [a for a in registry.adapters(line_id=line_id) if a.cohort == cohort and a.version > since]
    later = made if back else []
    for adapter in later:
        if adapter.state is AdapterState.RELEASED:
            registry.mark_rolled_back(adapter.version)
        elif adapter.state is AdapterState.CANDIDATE:
            registry.hold(adapter.version)
    names = [cohort, *parted] if later else parted
    for name in names:
        if since:
            registry.copy_adapter(since, cohort=name)
        else:
            registry.record_candidate(bare(name))


def _wanted(registry: Registry, since: int) -> int:
    """The adapter itself, or the newest that it came from and that was not rejected; 0 if there is none."""
    versions = (version for _, version, _ in ancestry(registry, registry.adapter(since)))
    return next((v for v in versions if registry.adapter(v).state is not AdapterState.REJECTED), 0)

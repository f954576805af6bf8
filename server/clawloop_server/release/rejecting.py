"""Rejecting: an adapter that was made and shall never be released, with whatever was learned on from it.

Its row and files stay, so that it can be explained; training goes on from the newest that is left.
"""

from __future__ import annotations

from clawloop_server.errors import ReleaseError
from clawloop_server.release.lineage import ancestry
from clawloop_server.release.records import AdapterRecord, AdapterState
from clawloop_server.release.registry import Registry

MAX_WHY_CHARS = 500
_WAITING = (AdapterState.CANDIDATE, AdapterState.HELD)


def reject(
    registry: Registry, *, version: int, who: str, why: str = "", with_later: bool = False, now_ms: int | None = None
) -> list[int]:
    """Rule that a candidate (or held) adapter is never released; the versions that are rejected, rising. `with_later`:
    also those that wait and go on from it, or are copies of it.

    Raises:
        ReleaseError: it is neither a candidate nor held, a released one goes on from it, or one that waits does and
            `with_later` was not said.
    """
    if len(why) > MAX_WHY_CHARS:
        raise ReleaseError(f"the reason has {len(why)} characters; say it in {MAX_WHY_CHARS}")
    with registry.within():
        record = registry.adapter(version)
        if record.state not in _WAITING:
            back = "; `clawloop-server adapters rollback --to N` goes back" if record.manifest else ""
            raise ReleaseError(f"adapter {version} is {record.state}; only a candidate or held one is rejected{back}")
        later = _later(registry, record)
        _check_later(record, later, with_later=with_later)
        rejected = sorted([version, *(one.version for one in later)])
        for one in rejected:
            because = why if one == version else f"it goes on from {version}{f': {why}' if why else ''}"
            registry.mark_rejected(one, who=who, why=because, now_ms=now_ms)
    return rejected


def _check_later(record: AdapterRecord, later: list[AdapterRecord], *, with_later: bool) -> None:
    if released := [one.version for one in later if one.state is AdapterState.RELEASED]:
        raise ReleaseError(
            f"adapter {released[0]}, which was released, goes on from {record.version}; go back before it first:"
            " `clawloop-server adapters rollback --to N`"
        )
    if later and not with_later:
        named = ", ".join(str(one.version) for one in later)
        raise ReleaseError(
            f"what adapter {record.version} learned is in {named} too, made after it; --with-later rejects them as well"
        )


def _later(registry: Registry, record: AdapterRecord) -> list[AdapterRecord]:
    """The adapters that have what it learned, and were not taken back or rejected; it is not among them."""
    live = [a for a in registry.adapters(line_id=record.line_id) if not a.state.is_gone and a.version != record.version]
    return [a for a in reversed(live) if _comes_from(registry, a, record)]


def _comes_from(registry: Registry, later: AdapterRecord, record: AdapterRecord) -> bool:
    """Whether a round made both, or made one on the other. Those that no round made are told apart by their version."""
    return any(
        version == record.version or (made is not None and round_id == record.facts.round_id)
        for round_id, version, made in ancestry(registry, later)
    )

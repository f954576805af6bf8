"""Releasing: from an adapter that passed the gate to one that devices may use, signed and chained to the one before.

Versions only grow, so going back is going forward to a new version with the files of an old one.
"""

from __future__ import annotations

import logging
import time

from clawloop_server.errors import ReleaseError
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import AdapterRecord, AdapterState
from clawloop_server.release.registry import Registry
from clawloop_shared.errors import StorageError
from clawloop_shared.manifest import Manifest, SignedManifest, open_manifest, sign_manifest

_log = logging.getLogger(__name__)

DEFAULT_EXPIRES_DAYS = 14.0
_DAY_MS = 86_400_000


def release_candidate(
    registry: Registry,
    keys: ServerKeys,
    *,
    version: int,
    expires_days: float = DEFAULT_EXPIRES_DAYS,
    now_ms: int | None = None,
) -> SignedManifest:
    """Sign a candidate (or held) adapter and make it the current one of its cohort.

    If what was released after it is only an older adapter renewed, or one for all where it is for a cohort, it is
    released as a copy under a new version, since versions only grow, and is held itself.

    Raises:
        ReleaseError: it was released before, or a newer version was.
        StorageError: one of its files is missing or was changed.
    """
    created_ms = now_ms or time.time_ns() // 1_000_000
    registry.files(version)
    with registry.within():
        if _is_passed_by(registry, registry.adapter(version)):
            if registry.adapter(version).state is AdapterState.CANDIDATE:
                registry.hold(version)
            version = registry.copy_adapter(version, copy_of=version, now_ms=now_ms)
        return _sign_and_release(registry, keys, version, expires_days=expires_days, created_ms=created_ms)


def _is_passed_by(registry: Registry, record: AdapterRecord) -> bool:
    """Whether it may still be released, had its version not been passed by a renewal, or by one of all others."""
    waits = record.state in (AdapterState.CANDIDATE, AdapterState.HELD)
    mine, shared = registry.current(record.line_id, cohort=record.cohort), registry.current(record.line_id)
    if not waits or mine is None or shared is None:
        return False
    if record.cohort and record.origin < shared.version:
        return mine.cohort != record.cohort or mine.origin < record.origin
    return mine.origin < record.origin < mine.version


def _sign_and_release(
    registry: Registry, keys: ServerKeys, version: int, *, expires_days: float, created_ms: int
) -> SignedManifest:

    def sign(record: AdapterRecord, previous_sha256: str) -> SignedManifest:
        facts = record.facts
        manifest = Manifest(
            line=facts.line,
            version=record.version,
            previous_sha256=previous_sha256,
            files=facts.files,
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=facts.target_modules,
            probe=facts.probe,
            evaluation=facts.evaluation,
            round_id=facts.round_id,
            lineage_root=facts.lineage_root,
            created_ms=created_ms,
            expires_ms=created_ms + int(expires_days * _DAY_MS),
            cohort=record.cohort,
        )
        return sign_manifest(manifest, keys.release)

    with registry.within():
        signed = registry.mark_released(version, sign, now_ms=created_ms)
        registry.log.sign_head(registry.adapter(version).line_id, keys.release, now_ms=created_ms)
    return signed


def roll_back(
    registry: Registry,
    keys: ServerKeys,
    *,
    to_version: int,
    cohort: str | None = None,
    expires_days: float = DEFAULT_EXPIRES_DAYS,
    now_ms: int | None = None,
) -> int:
    """Release the files of an older adapter as a new version, and mark those released after it; the new version. It is
    for those devices that the older one was for, or for a `cohort`.

    Raises:
        ReleaseError: `to_version` was never released, or is the current one.
    """
    old = registry.adapter(to_version)
    cohort = old.cohort if cohort is None else cohort
    current = registry.current(old.line_id, cohort=cohort)
    if old.manifest is None or current is None:
        raise ReleaseError(f"adapter {to_version} was never released, so there is no going back to it")
    if current.version == to_version:
        raise ReleaseError(f"adapter {to_version} is the current one; name an older one to go back to")
    with registry.within():
        later = [a for a in registry.adapters(line_id=old.line_id) if a.cohort == cohort]
        for adapter in later:
            if adapter.version > to_version and adapter.state is AdapterState.RELEASED:
                registry.mark_rolled_back(adapter.version)
            if adapter.version > to_version and adapter.state is AdapterState.CANDIDATE:
                registry.hold(adapter.version)
        copy = registry.copy_adapter(to_version, cohort=cohort, now_ms=now_ms)
        release_candidate(registry, keys, version=copy, expires_days=expires_days, now_ms=now_ms)
    return copy


def descendants(registry: Registry, *, to_version: int, cohort: str | None = None) -> list[str]:
    """The cohorts, beside the one that would be rolled back, that go on from what would be taken back.

    Raises:
        ReleaseError: no such version.
    """
    old = registry.adapter(to_version)
    cohort = old.cohort if cohort is None else cohort
    live = [a for a in registry.adapters(line_id=old.line_id) if not a.state.is_gone]
    gone = {a.facts.round_id for a in live if a.cohort == cohort and a.version > to_version}
    gone -= _rounds_of(registry, old)
    newest = {name: next((a for a in live if a.cohort == name), None) for name in registry.cohorts(old.line_id)}
    return [name for name, a in newest.items() if a and name != cohort and gone & _rounds_of(registry, a)]


def _rounds_of(registry: Registry, record: AdapterRecord) -> set[str]:
    """The rounds that an adapter came from."""
    found = set[str]()
    while True:
        found.add(record.facts.round_id)
        try:
            record = registry.adapter(registry.round(record.facts.round_id).base_version)
        except ReleaseError:  # the first of its line, or one that no round made
            return found


def give_again(
    registry: Registry,
    keys: ServerKeys,
    *,
    line_id: str,
    cohort: str,
    above: int,
    expires_days: float = DEFAULT_EXPIRES_DAYS,
    now_ms: int | None = None,
) -> int | None:
    """Release the current adapter of a cohort again under a new version, if it is not newer than `above`, which a
    device has that comes to it: devices take no lower version. The new one, or None. What training goes on from stays
    what it is."""
    now_ms = now_ms or time.time_ns() // 1_000_000
    current = registry.current(line_id, cohort=cohort)
    if current is None or current.version >= above:
        return None
    return _again(registry, keys, current, expires_days=expires_days, now_ms=now_ms)


def _again(registry: Registry, keys: ServerKeys, current: AdapterRecord, *, expires_days: float, now_ms: int) -> int:
    with registry.within():
        copy = registry.copy_adapter(current.version, copy_of=current.origin, now_ms=now_ms)
        _sign_and_release(registry, keys, copy, expires_days=expires_days, created_ms=now_ms)
    return copy


def release_waiting(
    registry: Registry, keys: ServerKeys, *, expires_days: float = DEFAULT_EXPIRES_DAYS, now_ms: int | None = None
) -> list[int]:
    """Release every candidate that waits, oldest first; their versions. One that a newer release overtook is held, and
    one of which a file is missing or was changed.

    Raises:
        StorageError: the database cannot be written.
    """
    released = []
    for record in registry.candidates():
        current = registry.current(record.line_id, cohort=record.cohort)
        same = current is not None and current.cohort == record.cohort
        if same and current is not None and current.origin > record.version:
            registry.hold(record.version)
            continue
        try:
            registry.files(record.version)
        except StorageError as error:
            registry.hold(record.version)
            _log.error("adapter %d cannot be released and is held: %s", record.version, error)
            continue
        signed = release_candidate(registry, keys, version=record.version, expires_days=expires_days, now_ms=now_ms)
        released.append(open_manifest(signed, keys.release_public).version)
    return released


def renew_expiring(
    registry: Registry,
    keys: ServerKeys,
    *,
    line_id: str,
    cohort: str = "",
    expires_days: float = DEFAULT_EXPIRES_DAYS,
    now_ms: int | None = None,
) -> int | None:
    """Release the current adapter of a cohort again as a new version once a quarter of its time is left, so that
    devices which join late, or were away, may still take it; the new version, or None if it is not time yet. What
    training goes on from stays what it is."""
    now_ms = now_ms or time.time_ns() // 1_000_000
    current = registry.current(line_id, cohort=cohort)
    if current is None or current.manifest is None or current.cohort != cohort:
        return None
    manifest = open_manifest(current.manifest, keys.release_public)
    if manifest.expires_ms - now_ms > (manifest.expires_ms - manifest.created_ms) / 4:
        return None
    return _again(registry, keys, current, expires_days=expires_days, now_ms=now_ms)

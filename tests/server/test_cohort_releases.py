"""Adapters of cohorts: each device has the newest that is meant for it, and versions only grow for everybody."""

from pathlib import Path

import msgspec
import pytest

from clawloop_server.bases import Base
from clawloop_server.errors import ReleaseError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import AdapterState, Candidate
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_candidate, release_waiting, renew_expiring, roll_back
from clawloop_server.vault.store import Vault
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe, open_manifest


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


def add(registry: Registry, base: Base, weights: bytes, *, cohort: str = "") -> int:
    made = Candidate(
        round_id="round",
        line=base.line,
        files={CONFIG_FILE: b"{}", WEIGHTS_FILE: weights},
        rank=8,
        alpha=16.0,
        target_modules=["q_proj"],
        probe=Probe(ids=[1, 2], logprobs=[-0.5]),
        evaluation=Evaluation(suite="tools", episodes=8, reward=0.5, reward_before=0.25, standard_error=0.1),
        lineage_root="root",
        cohort=cohort,
    )
    return registry.record_candidate(made)


def version_for(registry: Registry, cohort: str = "") -> int:
    current = registry.current(cohort=cohort)
    return current.version if current else 0


def test_a_cohort_has_the_shared_adapter_until_it_has_its_own(registry: Registry, keys: ServerKeys, base: Base) -> None:
    add(registry, base, b"shared")
    release_waiting(registry, keys)
    assert version_for(registry, "a") == version_for(registry) == 1
    add(registry, base, b"of a", cohort="a")
    assert version_for(registry, "a") == 1, "a candidate is not released"
    release_waiting(registry, keys)
    assert (version_for(registry, "a"), version_for(registry, "b"), version_for(registry)) == (2, 1, 1)
    add(registry, base, b"shared again")
    release_waiting(registry, keys)
    assert (version_for(registry, "a"), version_for(registry)) == (2, 3)
    assert registry.cohorts(base.line_id) == ["", "a"]
    signed = registry.adapter(2).manifest
    assert signed is not None
    assert open_manifest(signed, keys.release_public).cohort == "a"


def test_a_cohorts_adapter_that_the_shared_one_passed_is_released_under_a_higher_version(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    """A device of the cohort may have the newer shared one, and takes no version below it."""
    first = add(registry, base, b"of a", cohort="a")
    shared = add(registry, base, b"shared")
    release_candidate(registry, keys, version=shared)
    signed = release_candidate(registry, keys, version=first)
    manifest = open_manifest(signed, keys.release_public)
    assert (manifest.version, manifest.cohort) == (3, "a")
    assert version_for(registry, "a") == 3
    assert registry.files(3)[WEIGHTS_FILE] == b"of a"
    assert registry.adapter(first).state is AdapterState.HELD


def test_an_older_adapter_of_a_cohort_is_overtaken_by_its_own_alone(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    old, new = add(registry, base, b"old", cohort="a"), add(registry, base, b"new", cohort="a")
    release_candidate(registry, keys, version=new)
    assert release_waiting(registry, keys) == []
    assert registry.adapter(old).state is AdapterState.HELD


def test_a_cohort_is_rolled_back_by_itself_and_to_the_shared_adapter(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    add(registry, base, b"shared")
    add(registry, base, b"of a", cohort="a")
    add(registry, base, b"worse", cohort="a")
    release_waiting(registry, keys)
    assert version_for(registry, "a") == 3
    assert roll_back(registry, keys, to_version=2) == 4
    assert (version_for(registry, "a"), version_for(registry)) == (4, 1)
    assert registry.adapter(3).state is AdapterState.ROLLED_BACK
    assert roll_back(registry, keys, to_version=1, cohort="a") == 5
    assert registry.files(version_for(registry, "a"))[WEIGHTS_FILE] == b"shared"
    assert version_for(registry) == 1, "the others keep theirs"
    with pytest.raises(ReleaseError, match="the current one"):
        roll_back(registry, keys, to_version=5)


def test_each_cohort_is_renewed_by_itself(registry: Registry, keys: ServerKeys, base: Base) -> None:
    day = 86_400_000
    shared, mine = add(registry, base, b"shared"), add(registry, base, b"of a", cohort="a")
    release_candidate(registry, keys, version=shared, expires_days=4, now_ms=1)
    release_candidate(registry, keys, version=mine, expires_days=40, now_ms=1)
    late = 3 * day + 2
    assert renew_expiring(registry, keys, line_id=base.line_id, cohort="a", now_ms=late) is None
    assert renew_expiring(registry, keys, line_id=base.line_id, cohort="b", now_ms=late) is None, "has none of its own"
    assert renew_expiring(registry, keys, line_id=base.line_id, now_ms=late) == 3
    assert (version_for(registry), version_for(registry, "a")) == (3, 2)


def test_a_round_knows_its_cohort(registry: Registry, base: Base) -> None:
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=1, steps=1, cohort="a")
    assert registry.round(round_id).cohort == "a"
    under_way = registry.under_way(base.line_id)
    assert under_way is not None
    assert under_way.cohort == "a"
    registry.keep(msgspec.structs.replace(under_way, attempts=2))
    assert registry.round(round_id).cohort == "a"


def test_the_files_stay_where_they_were(registry: Registry, home: Home, base: Base) -> None:
    add(registry, base, b"of a", cohort="a")
    assert Path(home.adapters / "1" / WEIGHTS_FILE).read_bytes() == b"of a"

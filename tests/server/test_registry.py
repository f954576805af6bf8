from pathlib import Path

import msgspec
import pytest

from clawloop_server.bases import Base
from clawloop_server.errors import ReleaseError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import AdapterState, Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_waiting
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import AdapterInvalid, StorageError
from clawloop_shared.files import sha256_file
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe
from clawloop_shared.records import Trajectory


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


def candidate(base: Base, *, weights: bytes = b"weights", round_id: str = "round") -> Candidate:
    return Candidate(
        round_id=round_id,
        line=base.line,
        files={CONFIG_FILE: b"{}", WEIGHTS_FILE: weights},
        rank=8,
        alpha=16.0,
        target_modules=["q_proj"],
        probe=Probe(ids=[1, 2], logprobs=[-0.5]),
        evaluation=Evaluation(suite="tools", episodes=8, reward=0.5, reward_before=0.25, standard_error=0.1),
        lineage_root="root",
    )


def test_a_round_is_running_until_it_is_finished_once(registry: Registry, base: Base) -> None:
    round_id = registry.start_round(base.line_id, base_version=3, trajectories=64, steps=200, now_ms=5)
    assert registry.round(round_id).state is RoundState.RUNNING
    registry.finish_round(round_id, RoundState.REFUSED, metrics={"reward": 0.25}, reason="worse", now_ms=9)
    found = registry.round(round_id)
    assert (found.state, found.metrics, found.reason) == (RoundState.REFUSED, {"reward": 0.25}, "worse")
    assert (found.base_version, found.trajectories, found.steps, found.started_ms, found.finished_ms) == (
        3,
        64,
        200,
        5,
        9,
    )
    with pytest.raises(ReleaseError, match="not running"):
        registry.finish_round(round_id, RoundState.PASSED)
    with pytest.raises(ReleaseError, match="rounds list"):
        registry.round("nothing")
    assert registry.rounds() == [found]


def test_a_candidate_gets_the_next_version_and_its_files_are_published(
    registry: Registry, home: Home, base: Base
) -> None:
    assert registry.current() is None
    assert [registry.record_candidate(candidate(base)) for _ in range(2)] == [1, 2]
    assert (home.adapters / "2" / WEIGHTS_FILE).read_bytes() == b"weights"
    assert [a.version for a in registry.candidates()] == [1, 2]
    assert [a.version for a in registry.adapters(line_id=base.line_id)] == [2, 1]
    assert registry.adapters(line_id="other") == []
    assert registry.current() is None, "a candidate is not released"


def test_a_candidate_with_other_files_is_refused(registry: Registry, base: Base) -> None:
    odd = msgspec.structs.replace(candidate(base), files={WEIGHTS_FILE: b"", "run.py": b""})
    with pytest.raises(AdapterInvalid, match=r"run\.py"):
        registry.record_candidate(odd)


def test_what_a_crash_left_behind_is_replaced(registry: Registry, home: Home, base: Base) -> None:
    (home.adapters / "1").mkdir()
    (home.adapters / "1" / "half").write_bytes(b"")
    assert registry.record_candidate(candidate(base)) == 1
    assert sorted(path.name for path in (home.adapters / "1").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_round_candidate_and_consumption_are_one_transaction(registry: Registry, vault: Vault, base: Base) -> None:
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=1, steps=1)

    def finish(trajectories: list[Trajectory]) -> None:
        with registry.within() as database:
            version = registry.record_candidate(candidate(base, round_id=round_id))
            registry.finish_round(round_id, RoundState.PASSED, version=version)
            vault.consume(round_id, trajectories, database)

    with pytest.raises(Exception, match="not ready any more"):
        finish([Trajectory(trajectory_id="not there", steps=[], signals=[], reward=0.0, weight=1.0)])
    assert registry.round(round_id).state is RoundState.RUNNING
    assert registry.adapters() == []
    finish([])
    assert (registry.round(round_id).state, registry.round(round_id).version) == (RoundState.PASSED, 1)


def test_holding_keeps_a_candidate_from_being_released_by_itself(registry: Registry, base: Base) -> None:
    version = registry.record_candidate(candidate(base))
    registry.hold(version)
    assert registry.adapter(version).state is AdapterState.HELD
    assert registry.candidates() == []
    with pytest.raises(ReleaseError, match="is held, not candidate"):
        registry.hold(version)


def test_a_file_is_found_by_its_hash_once_its_adapter_is_released(
    registry: Registry, home: Home, base: Base, keys: ServerKeys
) -> None:
    version = registry.record_candidate(candidate(base))
    entry = registry.adapter(version).facts.files[-1]
    assert registry.file_of(entry.sha256) is None
    release_waiting(registry, keys, expires_days=1.0)
    found = registry.file_of(entry.sha256)
    assert found == home.adapters / str(version) / entry.name
    assert sha256_file(found) == entry.sha256
    assert registry.file_of("0" * 64) is None


def test_only_a_released_adapter_is_offered_and_only_with_the_files_that_were_published(
    registry: Registry, home: Home, base: Base
) -> None:
    version = registry.record_candidate(candidate(base))
    with pytest.raises(ReleaseError, match="release it first"):
        registry.offer(version)
    with pytest.raises(ReleaseError, match="adapters list"):
        registry.offer(9)
    weights: Path = home.adapters / "1" / WEIGHTS_FILE
    weights.write_bytes(b"changed")
    with pytest.raises(StorageError, match="was changed"):
        registry.files(version)
    weights.unlink()
    with pytest.raises(StorageError, match="cannot read"):
        registry.files(version)

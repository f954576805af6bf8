from pathlib import Path

import pytest

from clawloop_server import home as homes
from clawloop_server.bases import Base, find_base, import_base, list_bases
from clawloop_server.errors import HomeError, ReleaseError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys, create_keys, load_keys
from clawloop_server.release.records import AdapterState, Candidate
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_candidate, release_waiting, renew_expiring, roll_back
from clawloop_server.vault.store import Vault
from clawloop_shared import signing, wire
from clawloop_shared.errors import ConfigError, KeyMissing, SignatureInvalid, StorageError
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe, SignedManifest, check_files, open_manifest
from clawloop_shared.messages import AdapterOffer


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


def add(registry: Registry, base: Base, weights: bytes) -> int:
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
    )
    return registry.record_candidate(made)


def test_a_released_adapter_verifies_as_a_device_would(
    registry: Registry, home: Home, keys: ServerKeys, base: Base
) -> None:
    version = add(registry, base, b"one")
    signed = release_candidate(registry, keys, version=version, expires_days=2, now_ms=1000)

    offer = wire.decode(wire.encode(registry.offer(version)), AdapterOffer)
    manifest = open_manifest(offer.manifest, keys.release_public)
    check_files(manifest, offer.files)
    assert (manifest.version, manifest.line, manifest.previous_sha256) == (1, base.line, "")
    assert (manifest.created_ms, manifest.expires_ms) == (1000, 1000 + 2 * 86_400_000)
    assert (manifest.rank, manifest.evaluation.reward, manifest.lineage_root) == (8, 0.5, "root")
    copy = wire.decode((home.adapters / "1" / "manifest.bin").read_bytes(), SignedManifest)
    assert offer.manifest == signed == copy
    current = registry.current(base.line_id)
    assert current is not None
    assert (current.version, current.state) == (1, AdapterState.RELEASED)
    with pytest.raises(SignatureInvalid):
        open_manifest(signed, signing.public_key(signing.new_key()))


def test_each_manifest_names_the_one_before_it(registry: Registry, keys: ServerKeys, base: Base) -> None:
    for weights in (b"one", b"two", b"three"):
        add(registry, base, weights)
    registry.hold(2)
    assert release_waiting(registry, keys) == [1, 3]
    assert release_waiting(registry, keys) == []
    first, third = registry.adapter(1).manifest, registry.adapter(3).manifest
    assert first
    assert third
    assert open_manifest(third, keys.release_public).previous_sha256 == first.sha256


def test_a_candidate_with_a_broken_file_is_held_and_named_and_the_next_is_released(
    registry: Registry, home: Home, keys: ServerKeys, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    for weights in (b"one", b"two"):
        add(registry, base, weights)
    (home.adapters / "1" / WEIGHTS_FILE).chmod(0o600)
    (home.adapters / "1" / WEIGHTS_FILE).write_bytes(b"bad")
    assert release_waiting(registry, keys) == [2]
    assert registry.adapter(1).state is AdapterState.HELD
    assert "adapter 1 cannot be released and is held: " in caplog.text


def test_an_adapter_is_released_once_and_never_after_a_newer_one(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    add(registry, base, b"one")
    add(registry, base, b"two")
    release_candidate(registry, keys, version=2)
    with pytest.raises(ReleaseError, match="is released"):
        release_candidate(registry, keys, version=2)
    with pytest.raises(ReleaseError, match="versions only grow"):
        release_candidate(registry, keys, version=1)


def test_going_back_is_a_new_version_with_the_old_files(registry: Registry, keys: ServerKeys, base: Base) -> None:
    for weights in (b"one", b"two", b"three"):
        release_candidate(registry, keys, version=add(registry, base, weights))
    assert roll_back(registry, keys, to_version=1) == 4
    assert registry.offer(4).files[WEIGHTS_FILE] == b"one"
    states = [a.state for a in reversed(registry.adapters())]
    assert states == [AdapterState.RELEASED, *[AdapterState.ROLLED_BACK] * 2, AdapterState.RELEASED]
    current, third = registry.current(), registry.adapter(3).manifest
    assert current
    assert current.manifest
    assert third
    manifest = open_manifest(current.manifest, keys.release_public)
    assert (manifest.version, manifest.previous_sha256) == (4, third.sha256)
    check_files(manifest, registry.offer(4).files)


def test_what_waited_when_the_operator_went_back_is_held(registry: Registry, keys: ServerKeys, base: Base) -> None:
    for weights in (b"one", b"two"):
        release_candidate(registry, keys, version=add(registry, base, weights))
    waiting = add(registry, base, b"three")
    assert roll_back(registry, keys, to_version=1) == 4
    assert registry.adapter(waiting).state is AdapterState.HELD
    assert release_waiting(registry, keys) == []


def test_a_candidate_that_was_overtaken_is_held_instead_of_failing_for_ever(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    slow, fast = add(registry, base, b"slow"), add(registry, base, b"fast")
    release_candidate(registry, keys, version=fast)
    assert release_waiting(registry, keys) == []
    assert registry.adapter(slow).state is AdapterState.HELD


def test_an_adapter_is_renewed_in_the_last_quarter_of_its_time(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    def renew(now_ms: int) -> int | None:
        return renew_expiring(registry, keys, line_id=base.line_id, expires_days=4, now_ms=now_ms)

    day_ms = 86_400_000
    assert renew(1) is None, "nothing is released"
    release_candidate(registry, keys, version=add(registry, base, b"one"), expires_days=4, now_ms=1)
    assert renew(2 * day_ms) is None
    assert renew(3 * day_ms + 2) == 2
    assert renew(3 * day_ms + 3) is None
    assert registry.offer(2).files[WEIGHTS_FILE] == b"one"
    assert open_manifest(registry.offer(2).manifest, keys.release_public).expires_ms == 7 * day_ms + 2


def test_what_a_renewal_passed_can_still_be_released(registry: Registry, keys: ServerKeys, base: Base) -> None:
    release_candidate(registry, keys, version=add(registry, base, b"one"), expires_days=4, now_ms=1)
    for weights in (b"two", b"three"):
        registry.hold(add(registry, base, weights))
    waiting = add(registry, base, b"four")
    late_ms = 4 * 86_400_000
    assert renew_expiring(registry, keys, line_id=base.line_id, now_ms=late_ms) == 5
    assert renew_expiring(registry, keys, line_id=base.line_id, now_ms=5 * late_ms) == 6
    assert [(a.version, a.origin) for a in registry.adapters()][:3] == [(6, 1), (5, 1), (4, 4)]

    signed = release_candidate(registry, keys, version=3)
    assert open_manifest(signed, keys.release_public).version == 7
    assert registry.offer(7).files[WEIGHTS_FILE] == b"three"
    with pytest.raises(ReleaseError, match="versions only grow"):
        release_candidate(registry, keys, version=2)
    with pytest.raises(ReleaseError, match="versions only grow"):
        release_candidate(registry, keys, version=3)
    assert release_waiting(registry, keys) == [8]
    assert registry.adapter(waiting).state is AdapterState.HELD
    assert registry.offer(8).files[WEIGHTS_FILE] == b"four"
    assert roll_back(registry, keys, to_version=5) == 9
    assert registry.adapter(9).origin == 9, "who goes back has training go back"


def test_files_that_cannot_be_published_say_so_and_leave_nothing(
    registry: Registry, home: Home, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clawloop_server.release.registry.publish", full)
    with pytest.raises(StorageError, match=r"No space left on device; make room"):
        add(registry, base, b"one")
    assert list(home.adapters.iterdir()) == []
    (home.adapters / ".draft-left").mkdir()
    (home.adapters / ".draft-left" / WEIGHTS_FILE).write_bytes(b"half")
    registry.remove_drafts()
    assert list(home.adapters.iterdir()) == []


def test_there_is_no_going_back_to_what_is_current_or_never_was(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    add(registry, base, b"one")
    with pytest.raises(ReleaseError, match="never released"):
        roll_back(registry, keys, to_version=1)
    release_candidate(registry, keys, version=1)
    with pytest.raises(ReleaseError, match="is the current one"):
        roll_back(registry, keys, to_version=1)


def test_keys_are_private_made_once_and_shown_by_nothing(home: Home) -> None:
    keys = create_keys(home)
    assert create_keys(home) == load_keys(home) == keys
    assert {path.stat().st_mode & 0o777 for path in home.keys.iterdir() if path.is_file()} == {0o600}
    assert home.device_keys.stat().st_mode & 0o777 == 0o700
    assert keys.master.hex()[:8] not in repr(keys)
    (home.keys / "release.key").chmod(0o644)
    with pytest.raises(HomeError, match="chmod 600"):
        load_keys(home)


def test_a_lost_or_damaged_key_is_never_replaced(home: Home, vault: Vault) -> None:
    master = home.keys / "master.key"
    master.rename(home.folder / "elsewhere")
    with pytest.raises(KeyMissing, match="restore the key"):
        create_keys(home)
    with pytest.raises(HomeError, match="is missing"):
        load_keys(home)
    master.symlink_to(home.folder / "elsewhere")
    with pytest.raises(HomeError, match="cannot read"):
        load_keys(home)
    master.unlink()
    master.touch(0o600)
    with pytest.raises(KeyMissing, match="0 bytes"):
        load_keys(home)


def test_a_model_folder_is_imported_without_its_code_and_found_by_its_line(home: Home, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="known: none"):
        find_base(home)
    base = import_base(home, model_folder)
    assert import_base(home, model_folder) == base == find_base(home) == find_base(home, base.line_id)
    names = sorted(path.name for path in (home.bases / base.line_id).iterdir())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    (model_folder / "chat_template.jinja").write_text("another")
    other = import_base(home, model_folder, link=True)
    assert (home.bases / other.line_id).is_symlink()
    assert {found.line_id for found in list_bases(home)} == {base.line_id, other.line_id}
    with pytest.raises(ConfigError, match="several model lines"):
        find_base(home)


def test_a_folder_that_is_no_model_is_refused(home: Home, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        import_base(home, tmp_path)
    assert list(home.bases.iterdir()) == []


def test_a_home_belongs_to_folders_not_to_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match="cannot make"):
        homes.create(tmp_path / "file")

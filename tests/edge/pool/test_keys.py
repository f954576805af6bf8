"""Where the key lives: made once, refused when others can read it, never replaced."""

from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.keys import FileKeyStore, KeychainKeyStore, open_key
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import KeyMissing


class DictKeyring(KeyringBackend):
    """A keychain that lives as long as the test."""

    priority = 1.0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


@pytest.fixture
def keychain(monkeypatch: pytest.MonkeyPatch) -> DictKeyring:
    """A working keychain in place of this machine's."""
    backend = DictKeyring()
    monkeypatch.setattr(keyring.core, "_keyring_backend", backend)
    return backend


def test_a_key_file_is_made_once_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    key = open_key(store, tmp_path)
    assert len(key) == 32
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert open_key(store, tmp_path) == key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.lock", "pool.key"]


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    open_key(store, tmp_path)
    store.path.chmod(0o644)
    with pytest.raises(PoolError, match=r"mode 0644.*chmod 600"):
        open_key(store, tmp_path)


def test_a_key_file_in_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    store = FileKeyStore(folder / "pool.key")
    store.create()
    folder.chmod(0o777)
    with pytest.raises(PoolError, match="others can write"):
        store.load()


def test_a_link_in_place_of_a_key_file_is_refused(tmp_path: Path) -> None:
    real = FileKeyStore(tmp_path / "elsewhere")
    real.create()
    link = tmp_path / "pool.key"
    link.symlink_to(real.path)
    with pytest.raises(PoolError, match="plain file"):
        FileKeyStore(link).load()


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, "ab" * 31, "ab" * 33, "\0" * 64])
def test_a_damaged_key_file_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pool.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(PoolError, match="damaged"):
        open_key(FileKeyStore(path), tmp_path)
    assert path.read_text() == text


def test_an_existing_key_is_never_replaced(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    key = store.create()
    with pytest.raises(PoolError, match="exists already"):
        store.create()
    assert store.load() == key


def test_a_pool_without_its_key_stops_everything_and_nothing_is_made(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    Pool.open(tmp_path, open_key(store, tmp_path)).close()
    before = (tmp_path / "pool.db").read_bytes()
    store.path.unlink()
    with pytest.raises(KeyMissing, match=r"is there, but its key is not"):
        open_key(store, tmp_path)
    assert not store.path.exists()
    assert (tmp_path / "pool.db").read_bytes() == before


def test_another_key_opens_nothing_and_changes_nothing(tmp_path: Path, key: bytes) -> None:
    Pool.open(tmp_path, key).close()
    before = (tmp_path / "pool.db").read_bytes()
    with pytest.raises(KeyMissing, match="does not open with this key"):
        Pool.open(tmp_path, bytes(32))
    assert (tmp_path / "pool.db").read_bytes() == before


def test_the_keychain_keeps_a_key(tmp_path: Path, keychain: DictKeyring) -> None:
    store = KeychainKeyStore("clawloop-test", "me")
    with pytest.raises(KeyMissing, match="clawloop-test/me"):
        store.load()
    key = open_key(store, tmp_path)
    assert open_key(store, tmp_path) == key
    assert list(keychain.kept) == [("clawloop-test", "me")]
    with pytest.raises(PoolError, match="not replaced"):
        store.create()


def test_a_machine_without_a_keychain_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyring.backends import fail

    monkeypatch.setattr(keyring.core, "_keyring_backend", fail.Keyring())  # type: ignore[no-untyped-call]
    with pytest.raises(PoolError, match="--key-file"):
        open_key(KeychainKeyStore("clawloop-test", "me"), tmp_path)

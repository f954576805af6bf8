"""Where the keys live: made once, refused when others can read them, never lost while they are replaced."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import PasswordDeleteError

from clawloop_edge.errors import AnchorError, PoolError
from clawloop_edge.pool.keys import FileKeyStore, KeyBundle, KeychainKeyStore, KnownKey, open_keys
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.rotate import rotate
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import KeyMissing

NEXT = KeyBundle(bytes(32), {1: bytes(range(32)), 2: b"k" * 32})


class DictKeyring(KeyringBackend):
    """A keychain that lives as long as the test. It sets as macOS does: delete, then add; `dies_in` steps it stops."""

    priority = 1.0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}
        self.dies_in = -1

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self._step()
        self.kept.pop((service, username), None)
        self._step()
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        self._step()
        if self.kept.pop((service, username), None) is None:
            raise PasswordDeleteError("no such item")

    def _step(self) -> None:
        if self.dies_in == 0:
            raise KeyboardInterrupt
        self.dies_in -= 1


@pytest.fixture
def keychain(monkeypatch: pytest.MonkeyPatch) -> DictKeyring:
    """A working keychain in place of this machine's."""
    backend = DictKeyring()
    monkeypatch.setattr(keyring.core, "_keyring_backend", backend)
    return backend


def test_a_key_file_is_made_once_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    keys = open_keys(store, tmp_path)
    assert (len(keys.file_key), list(keys.keks), len(keys.keks[1])) == (32, [1], 32)
    assert keys.file_key != keys.keks[1]
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert open_keys(store, tmp_path) == keys
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.lock", "pool.key"]


def test_no_key_is_shown_where_keys_are_printed() -> None:
    shown = f"{NEXT} {NEXT!r}"
    assert repr(bytes(32)) not in shown
    assert "k" * 32 not in shown


def test_keys_that_were_one_key_open_what_they_opened(tmp_path: Path, key: bytes) -> None:
    path = tmp_path / "pool.key"
    path.write_text(key.hex() + "\n")
    path.chmod(0o600)
    assert open_keys(FileKeyStore(path), tmp_path) == KeyBundle.of(key)
    assert KeyBundle.of(key).keks == {1: key}


def test_two_versions_of_a_key_come_back_as_they_were_put(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    store.create()
    store.replace(NEXT)
    assert store.load() == NEXT
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    open_keys(store, tmp_path)
    store.path.chmod(0o644)
    before = store.path.read_bytes()
    for use in (lambda: open_keys(store, tmp_path), lambda: store.replace(NEXT)):
        with pytest.raises(PoolError, match=r"mode 0644.*chmod 600"):
            use()
    assert store.path.read_bytes() == before


def test_a_key_file_in_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    store = FileKeyStore(folder / "pool.key")
    store.create()
    folder.chmod(0o777)
    with pytest.raises(PoolError, match="others can write"):
        store.load()


def test_a_link_in_place_of_a_key_file_is_refused_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    real = FileKeyStore(tmp_path / "elsewhere")
    keys = real.create()
    link = FileKeyStore(tmp_path / "pool.key")
    link.path.symlink_to(real.path)
    for use in (link.load, link.create, lambda: link.replace(NEXT)):
        with pytest.raises(PoolError, match=r"plain file|exists already"):
            use()
    assert real.load() == keys


def test_a_pipe_in_place_of_a_key_file_is_refused_and_nobody_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pool.key", 0o600)
    with pytest.raises(PoolError, match="no plain file"):
        FileKeyStore(tmp_path / "pool.key").load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    store.create()
    os.chown(store.path, 12345, -1)
    with pytest.raises(PoolError, match="belongs to user 12345, not to you"):
        store.load()


@pytest.mark.parametrize(
    "text",
    ["", "abc", "zz" * 32, "ab" * 31, "ab" * 33, "\0" * 64, "{}", '{"is": "clawloop-pool-keys.v2"}']
    + [NEXT.encode().decode().replace(*change) for change in (("00", "0"), ('"2"', '"0"'), ('"keks"', '"x"'))],
)
def test_a_damaged_key_file_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pool.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(PoolError, match="damaged") as refused:
        open_keys(FileKeyStore(path), tmp_path)
    assert path.read_text() == text
    assert "00000000" not in str(refused.value)


def test_an_existing_key_is_never_made_anew(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    keys = store.create()
    with pytest.raises(PoolError, match="exists already"):
        store.create()
    assert store.load() == keys


def test_a_pool_without_its_key_stops_everything_and_nothing_is_made(tmp_path: Path) -> None:
    store = FileKeyStore(tmp_path / "pool.key")
    Pool.open(tmp_path, store).close()
    before = (tmp_path / "pool.db").read_bytes()
    store.path.unlink()
    with pytest.raises(KeyMissing, match=r"is there, but its key is not"):
        Pool.open(tmp_path, store)
    assert not store.path.exists()
    assert (tmp_path / "pool.db").read_bytes() == before


def test_another_key_opens_nothing_and_changes_nothing(tmp_path: Path, key: bytes) -> None:
    Pool.open(tmp_path, KnownKey.of(key)).close()
    before = (tmp_path / "pool.db").read_bytes()
    with pytest.raises(KeyMissing, match="does not open with this key"):
        Pool.open(tmp_path, KnownKey.of(bytes(32)))
    assert (tmp_path / "pool.db").read_bytes() == before


def test_the_keychain_keeps_keys(tmp_path: Path, keychain: DictKeyring) -> None:
    store = KeychainKeyStore("clawloop-test", "me")
    with pytest.raises(KeyMissing, match="clawloop-test/me"):
        store.load()
    keys = open_keys(store, tmp_path)
    assert open_keys(store, tmp_path) == keys
    assert list(keychain.kept) == [("clawloop-test", "me")]
    with pytest.raises(PoolError, match="not replaced"):
        store.create()
    store.replace(NEXT)
    assert store.load() == NEXT
    assert list(keychain.kept) == [("clawloop-test", "me")]


def test_a_pool_whose_key_is_in_the_keychain_has_its_anchor_there(
    tmp_path: Path, keychain: DictKeyring, make_kept: Callable[..., KeptStep]
) -> None:
    store = KeychainKeyStore("clawloop-test", "me")
    with Pool.open(tmp_path, store, writer=True):
        pass
    early = (tmp_path / "pool.db").read_bytes()
    with Pool.open(tmp_path, store, writer=True) as pool:
        pool.keep_step(make_kept()).result()
        rotate(pool)
    assert sorted(keychain.kept) == [("clawloop-test", "me"), ("clawloop-test", "me (anchor)")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.lock", "pool.db", "pool.lock"]
    (tmp_path / "pool.db").write_bytes(early)
    with pytest.raises(AnchorError, match=r"older than it was.*\(anchor clawloop-test/me \(anchor\) in the keychain\)"):
        Pool.open(tmp_path, store)


@pytest.mark.parametrize("dies_in", range(6))
def test_a_replacement_in_the_keychain_that_dies_leaves_the_old_keys_or_the_new(
    keychain: DictKeyring, dies_in: int
) -> None:
    store = KeychainKeyStore("clawloop-test", "me")
    old = store.create()
    keychain.dies_in = dies_in
    try:
        store.replace(NEXT)
        died = False
    except KeyboardInterrupt:
        died = True
    keychain.dies_in = -1
    assert died == (dies_in < 5)
    assert store.load() in (old, NEXT)
    again = KeyBundle(secrets.token_bytes(32), {3: bytes(32)})
    store.replace(again)
    assert store.load() == again
    assert list(keychain.kept) == [("clawloop-test", "me")]


@pytest.mark.parametrize("use", [KeychainKeyStore.load, KeychainKeyStore.create, lambda store: store.replace(NEXT)])
def test_a_machine_without_a_keychain_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[KeychainKeyStore], object]
) -> None:
    from keyring.backends import fail

    monkeypatch.setattr(keyring.core, "_keyring_backend", fail.Keyring())  # type: ignore[no-untyped-call]
    with pytest.raises(PoolError, match="--key-file"):
        use(KeychainKeyStore("clawloop-test", "me"))

"""Keys behind a passphrase: asked for once, opened by no other, and never made twice."""

import unicodedata
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.keys import FileKeyStore, KeyBundle, open_keys
from clawloop_edge.pool.passphrase import Cost, PassphraseKeyStore, Sealed, open_keys_of, seal_keys
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import KeyMissing

CHEAP = Cost(memory_kib=64, passes=1, lanes=1)
WORDS = "correct horse battery staple"


class Person:
    """Answers with one passphrase, and counts how often."""

    def __init__(self, passphrase: str = WORDS) -> None:
        self.passphrase, self.asked = passphrase, list[bool]()

    def __call__(self, *, new: bool) -> str:
        self.asked.append(new)
        return self.passphrase


def store_of(folder: Path, person: Person) -> PassphraseKeyStore:
    return PassphraseKeyStore(folder / "pool.key", person, cost=CHEAP)


def test_a_new_passphrase_costs_a_guesser_64_mib_and_opens_again(tmp_path: Path) -> None:
    store = PassphraseKeyStore(tmp_path / "pool.key", Person())
    keys = store.create()
    assert store.path.stat().st_mode & 0o777 == 0o600
    written = msgspec.json.decode(store.path.read_bytes(), type=Sealed)
    assert (written.cost.memory_kib, written.cost.passes, written.cost.lanes) == (64 * 1024, 3, 4)
    assert keys.file_key.hex() not in store.path.read_text()
    assert PassphraseKeyStore(store.path, Person()).load() == keys


def test_a_person_is_asked_once_however_often_the_keys_are_read_and_replaced(tmp_path: Path) -> None:
    person = Person()
    store = store_of(tmp_path, person)
    keys = store.create()
    store.replace(KeyBundle(keys.file_key, {1: keys.keks[1], 2: bytes(32)}))
    assert store.load().keks[2] == bytes(32)
    assert person.asked == [True]
    other = Person()
    again = store_of(tmp_path, other)
    assert again.load() == store.load()
    again.replace(keys)
    assert store.load() == again.load() == keys
    assert (person.asked, other.asked) == ([True], [False])


def test_a_wrong_passphrase_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    with Pool.open(tmp_path, store_of(tmp_path, Person())):
        pass
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wrong = store_of(tmp_path, Person("correct horse battery stable"))
    for _ in range(2):
        with pytest.raises(PoolError, match=r"^the passphrase does not open sealed key file .*; try it again.*$"):
            Pool.open(tmp_path, wrong)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nobody_is_asked_where_there_is_a_pool_and_no_key(tmp_path: Path) -> None:
    with Pool.open(tmp_path, store_of(tmp_path, Person())):
        pass
    (tmp_path / "pool.key").unlink()
    person = Person()
    with pytest.raises(KeyMissing, match="is there, but its key is not"):
        open_keys(store_of(tmp_path, person), tmp_path)
    assert person.asked == []
    assert not (tmp_path / "pool.key").exists()


def test_a_short_passphrase_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="has 7 characters; choose one of at least 8"):
        store_of(tmp_path, Person("1234567")).create()
    assert list(tmp_path.iterdir()) == []


def test_letters_that_look_the_same_are_the_same(tmp_path: Path) -> None:
    composed = "naïve café crème"
    sealed = seal_keys(KeyBundle.of(bytes(32)), unicodedata.normalize("NFD", composed), cost=CHEAP)
    assert open_keys_of(sealed, unicodedata.normalize("NFC", composed), where="it") == KeyBundle.of(bytes(32))


@pytest.mark.parametrize("change", ['"passes":99', '"memory_kib":99999999', '"lanes":0', '"salt":"AA=="', '"keys":""'])
def test_a_changed_file_is_refused_before_it_costs_anything(tmp_path: Path, change: str) -> None:
    store = store_of(tmp_path, Person())
    store.create()
    name = change.split(":")[0]
    fields = store.path.read_text()
    start = fields.index(name)
    end = min(i for i in (fields.find(",", start), fields.find("}", start)) if i > 0)
    changed = fields[:start] + change + fields[end:]
    store.path.write_text(changed)
    with pytest.raises(PoolError):
        store_of(tmp_path, Person()).load()
    assert store.path.read_text() == changed


def test_keys_of_the_other_kind_say_which_setting_is_wrong(tmp_path: Path) -> None:
    FileKeyStore(tmp_path / "pool.key").create()
    with pytest.raises(PoolError, match="no keys that a passphrase sealed"):
        store_of(tmp_path, Person()).load()
    (tmp_path / "pool.key").unlink()
    store_of(tmp_path, Person()).create()
    with pytest.raises(PoolError, match='set `key = "passphrase"`'):
        FileKeyStore(tmp_path / "pool.key").load()

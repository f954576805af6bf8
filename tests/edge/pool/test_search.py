"""The search index: what is found in which order, and that it can always be made again from the pool."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawloop_edge.errors import QueryError
from clawloop_edge.pool import search
from clawloop_edge.pool.hits import Hit
from clawloop_edge.pool.keys import DATABASE_NAME, KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.said import Speaker
from clawloop_edge.pool.search import INDEX_NAME, SEARCH_SCOPE, SearchIndex
from clawloop_edge.pool.store import Pool
from clawloop_shared.database import open_database
from clawloop_shared.errors import KeyMissing, StorageError
from clawloop_shared.ids import new_id

if TYPE_CHECKING:
    from sqlite_utils import Database

MakeKept = Callable[..., KeptStep]


def keep(pool: Pool, *steps: KeptStep) -> None:
    for future in [pool.keep_step(kept) for kept in steps]:
        future.result()


def found(pool: Pool, words: str, **filters: Any) -> list[Hit]:
    index = SearchIndex(pool)
    while index.catch_up():
        pass
    return index.search(words, **filters)


def snippets(pool: Pool, words: str, **filters: Any) -> list[str]:
    return [hit.snippet for hit in found(pool, words, **filters)]


def dialogue(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


def test_what_people_tools_and_the_model_said_is_found_with_who_said_it(pool: Pool, make_kept: MakeKept) -> None:
    call = {"function": {"name": "read_file", "arguments": '{"path": "src/main.rs", "lines": [1, {"deep": "café"}]}'}}
    messages = [
        {"role": "system", "content": "instructions of zebra"},
        {"role": "user", "content": [{"type": "text", "text": "what does loadConfig do?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "fn load_config() -> Config"},
    ]
    reply = {"role": "assistant", "content": "It reads 設定ファイル.", "reasoning_content": "zebra thoughts"}
    kept = make_kept(messages=messages, reply=reply)
    keep(pool, kept)
    who = {words: [hit.who for hit in found(pool, words)] for words in ("loadConfig", "load_config", "main.rs", "設定")}
    assert who == {
        "loadConfig": [Speaker.USER],
        "load_config": [Speaker.TOOL, Speaker.USER],
        "main.rs": [Speaker.ASSISTANT],
        "設定": [Speaker.ASSISTANT],
    }
    (hit,) = found(pool, "cafe read_file")
    assert (hit.session_id, hit.step_id, hit.app, hit.at_ms) == ("session-1", kept.step.step_id, "agent", 1000)
    assert hit.title == "what does loadConfig do?"
    assert [hit.snippet[start:end] for start, end in hit.marks] == ["read_file", "café"]
    assert found(pool, "zebra") == []


def test_a_history_that_is_sent_again_is_found_once(pool: Pool, make_kept: MakeKept) -> None:
    first = make_kept(messages=dialogue("apples"), reply={"role": "assistant", "content": "pears"})
    second = make_kept(messages=dialogue("apples", "pears", "plums"), parent=first.step.step_id)
    moved = make_kept(messages=[{"role": "user", "content": "today"}, *dialogue("apples", "pears", "plums")])
    retold = make_kept(messages=dialogue("apples pears plums"), kind="compaction")
    elsewhere = make_kept(session="session-2", messages=dialogue("apples"))
    keep(pool, first, second, moved, retold, elsewhere)
    steps = {word: [hit.step_id for hit in found(pool, word)] for word in ("apples", "pears", "plums")}
    assert steps == {
        "apples": [elsewhere.step.step_id, first.step.step_id],
        "pears": [first.step.step_id],
        "plums": [second.step.step_id],
    }


def test_the_newest_come_first_page_by_page_or_the_best_first(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, *(make_kept(session=f"s{n}", messages=dialogue(f"wheel {n} " + "filler " * n * 3)) for n in range(7)))
    pages: list[int] = []
    before = None
    while page := found(pool, "wheel filler", limit=2, before=before):
        pages += [int(hit.session_id[1:]) for hit in page]
        before = page[-1].place
    assert pages == [6, 5, 4, 3, 2, 1]
    best = found(pool, "wheel", limit=3, best=True)
    assert [hit.session_id for hit in best] == ["s0", "s1", "s2"]
    assert [hit.rank for hit in best] == sorted((hit.rank for hit in best), reverse=True)


def test_words_are_looked_for_in_an_app_and_a_time(pool: Pool, make_kept: MakeKept) -> None:
    for app, at_ms in (("cat", 100), ("dog", 200), ("cat", 300)):
        keep(pool, make_kept(session=f"{app}{at_ms}", words="wheel", app=app, started_ms=at_ms))
    hits = {hit.session_id for hit in found(pool, "wheel", app="cat")}
    assert hits == {"cat300", "cat100"}
    assert {hit.session_id for hit in found(pool, "wheel", since_ms=200, until_ms=300)} == {"dog200"}
    assert {hit.session_id for hit in found(pool, "wheel", since_ms=200)} == {"dog200", "cat300"}


def test_phrases_beginnings_and_exclusions(pool: Pool, make_kept: MakeKept) -> None:
    texts = ("docker compose up", "compose a docker letter", "dockers union")
    keep(pool, *(make_kept(session=text, messages=dialogue(text)) for text in texts))
    asked = {
        '"docker compose"': texts[:1],
        "docker compose": (texts[1], texts[0]),
        "docker -letter": texts[:1],
        "docker*": tuple(reversed(texts)),
        "docker* -compose": texts[2:],
    }
    for words, expected in asked.items():
        hits = [hit for hit in found(pool, words) if hit.who is Speaker.USER]
        assert tuple(hit.session_id for hit in hits) == expected, words


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.sampled_from("aB1_ éß日ко\u0301İﬁ\n-\x00"), max_size=30),
    st.text(st.sampled_from('aB1éßs日ко* -"fi'), max_size=6),
)
def test_the_index_finds_what_a_walk_through_all_steps_finds(
    pool: Pool, make_kept: MakeKept, text: str, words: str
) -> None:
    app = new_id()
    keep(pool, make_kept(app=app, session=app, words="a", reply={"role": "assistant", "content": f"x {text} y"}))
    try:
        by_index = found(pool, words, app=app)
    except QueryError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "encrypts", lambda: False)
        by_walk = found(pool, words, app=app)
    assert [(hit.who, hit.snippet, hit.marks) for hit in by_index] == [
        (hit.who, hit.snippet, hit.marks) for hit in by_walk
    ]


def test_without_an_index_all_steps_are_walked_newest_first(
    pool: Pool, make_kept: MakeKept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "encrypts", lambda: False)
    monkeypatch.setattr("clawloop_edge.pool.hits._WALK_STEPS", 2)
    keep(pool, *(make_kept(session=f"s{n}", messages=dialogue(f"wheel {n}"), app=f"app{n % 2}") for n in range(5)))
    hits = found(pool, "wheel")
    assert [hit.session_id for hit in hits if hit.who is Speaker.USER] == ["s4", "s3", "s2", "s1", "s0"]
    assert found(pool, "wheel", before=hits[2].place) == hits[3:]
    assert {hit.app for hit in found(pool, "wheel", app="app1")} == {"app1"}
    SearchIndex(pool).forget()
    assert not (tmp_path / INDEX_NAME).exists()


def test_texts_of_any_kind_are_taken_in(pool: Pool, make_kept: MakeKept) -> None:
    odd = [
        {"role": "user", "content": "lone \ud800 surrogate"},
        {"role": "tool", "content": "nul \x00 byte"},
        {"role": "assistant", "content": None, "tool_calls": ["no object", {"function": {"arguments": "no json {"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "deep", "arguments": "[" * 5000}}]},
        {"role": "narrator", "content": "unheard"},
        {"role": "tool", "content": "x" * 70_000 + " beyond"},
        {"content": 7},
    ]
    keep(pool, make_kept(messages=odd, words="odd"))
    counts = {word: len(found(pool, word)) for word in ("surrogate", "byte", "json", "deep", "unheard", "beyond")}
    assert counts == {"surrogate": 1, "byte": 1, "json": 1, "deep": 1, "unheard": 0, "beyond": 0}


@pytest.fixture
def looked(pool: Pool, make_kept: MakeKept) -> Path:
    """The file of an index that has taken in some steps."""
    keep(pool, *(make_kept(session=f"s{n}", messages=dialogue(f"wheel{n} " + "hub rim " * 50)) for n in range(40)))
    assert len(found(pool, "wheel39")) == 1
    return pool.folder / INDEX_NAME


def _delete(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(200, len(data), 1024):
        data[at] ^= 1
    path.write_bytes(data)


def _other(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


@pytest.mark.parametrize(("damage", "logged"), [(_delete, 0), (_empty, 0), (_cut, 1), (_flip, 1), (_other, 1)])
def test_a_lost_or_damaged_index_is_made_again_with_one_line(
    pool: Pool, looked: Path, damage: Callable[[Path], None], logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage(looked)
    with caplog.at_level(logging.WARNING):
        assert len(found(pool, "wheel7")) == 1
    assert len(caplog.records) == logged
    assert all("made again" in record.message for record in caplog.records)


def test_an_index_of_another_layout_is_made_again(
    pool: Pool, looked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(looked, search_key(pool))
    database.conn.execute("PRAGMA user_version = 77")
    database.close()
    assert len(found(pool, "wheel7")) == 1
    assert "layout 77" in caplog.text


def test_an_index_of_a_pool_that_was_since_put_back_is_made_again(
    tmp_path: Path, make_kept: MakeKept, key: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = KnownKey.of(key)
    with Pool.open(tmp_path, store) as pool:
        keep(pool, make_kept(words="before"))
        found(pool, "before")
    backup = (tmp_path / DATABASE_NAME).read_bytes()
    for word in ("wheel", "plough"):
        with Pool.open(tmp_path, store) as pool:
            keep(pool, make_kept(messages=dialogue(word)))
            counts = {each: len(found(pool, each)) for each in ("before", "wheel", "plough")}
            assert counts == {"before": 2, "wheel": 0, "plough": 0} | {word: 1}
        (tmp_path / DATABASE_NAME).write_bytes(backup)
    assert [record.message for record in caplog.records if "backup" in record.message]


def all_terms(database: "Database") -> set[str]:
    database.conn.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab('main', 'words', 'row')")
    return {row[0] for row in database.conn.execute("SELECT term FROM temp.terms")}


def decrypted(path: Path, key: bytes) -> bytes:
    """Every page of a SQLCipher 4 file, free ones too: AES-256-CBC, the IV in the page's last 80 bytes.

    Source: https://www.zetetic.net/sqlcipher/design
    """
    data, pages = path.read_bytes(), []
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096]
        opened = Cipher(algorithms.AES(key), modes.CBC(page[-80:-64])).decryptor()
        pages.append(opened.update(page[0 if start else 16 : -80]))
    return b"".join(pages)


def search_key(pool: Pool) -> bytes:
    with pool.read() as database:
        return pool.keyring.find(database, SEARCH_SCOPE).key


def test_no_word_of_a_forgotten_session_stays_in_the_index_and_its_key_is_another(
    pool: Pool, make_kept: MakeKept, tmp_path: Path
) -> None:
    words = {n: "xylophone" if n in (3, 4) else f"wheel{n}" for n in range(9)}
    keep(pool, *(make_kept(session=f"session-{n}", messages=dialogue(f"{words[n]} common")) for n in words))
    found(pool, "common")
    path, copy, old_key = tmp_path / INDEX_NAME, tmp_path / "copy.db", search_key(pool)
    copy.write_bytes(path.read_bytes())
    assert b"xylophone" in decrypted(path, old_key)

    pool.submit(lambda db: pool.forgetting.forget(db, ["session-3", "session-4"])).result()
    SearchIndex(pool).forget()
    assert search_key(pool) != old_key
    pages = decrypted(path, search_key(pool))
    assert b"wheel" in pages
    assert b"session-5" in pages
    assert b"xylophone" not in pages
    assert b"session-3" not in pages
    with pytest.raises(KeyMissing):
        open_database(copy, search_key(pool))
    assert len(found(pool, "wheel5")) == 1
    assert found(pool, "xylophone") == []
    assert sorted(path.name for path in tmp_path.glob("search.*")) == ["search.db", "search.lock"]


def test_the_key_of_an_index_that_is_not_there_goes_with_what_is_forgotten(
    pool: Pool, make_kept: MakeKept, tmp_path: Path
) -> None:
    keep(pool, make_kept(session="one"), make_kept(session="two"))
    found(pool, "hello")
    old_key = search_key(pool)
    (tmp_path / INDEX_NAME).rename(tmp_path / "copy.db")
    pool.submit(lambda db: pool.forgetting.forget(db, ["one"])).result()
    SearchIndex(pool).forget()
    with pool.read() as database:
        assert not database.conn.execute("SELECT 1 FROM keys WHERE scope = ?", (SEARCH_SCOPE,)).fetchone()
    assert {hit.session_id for hit in found(pool, "hello")} == {"two"}
    assert search_key(pool) != old_key


def test_what_was_let_go_of_is_found_no_more(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept(words="wheel"), make_kept(session="s2", words="hub"))
    found(pool, "wheel")
    key = search_key(pool)
    pool.submit(lambda db: pool.forgetting.let_go(db, ["s2"])).result()
    index = SearchIndex(pool)
    assert index.search("hub") == [], "the pool has it no more, whatever the index says"
    assert found(pool, "hub") == []
    assert len(found(pool, "wheel")) == 2
    database = open_database(pool.folder / INDEX_NAME, key)
    assert database.conn.execute("SELECT count(*), max(seq) FROM texts").fetchone() == (2, 1)
    database.close()
    index.forget()
    assert search_key(pool) != key
    database = open_database(pool.folder / INDEX_NAME, search_key(pool))
    assert "hub" not in all_terms(database)
    database.close()


def test_where_nothing_is_new_no_file_is_opened(pool: Pool, make_kept: MakeKept, tmp_path: Path) -> None:
    index = SearchIndex(pool)
    keep(pool, *(make_kept(words=f"w{n}") for n in range(5)))
    waiting = [index.catch_up(2) for _ in range(3)]
    assert waiting == [3, 1, 0]
    (tmp_path / INDEX_NAME).unlink()
    assert index.catch_up() == 0
    assert not (tmp_path / INDEX_NAME).exists()


def test_two_processes_take_turns(pool: Pool, make_kept: MakeKept, key: bytes) -> None:
    with Pool.open(pool.folder, KnownKey.of(key)) as other:
        one, two = SearchIndex(pool), SearchIndex(other)
        for n in range(6):
            keep(pool, make_kept(session=f"s{n}", words=f"wheel{n}"))
            (one, two)[n % 2].catch_up()
            if n == 3:
                pool.submit(lambda db: pool.forgetting.forget(db, ["s1"])).result()
                one.forget()
        assert one.catch_up() == two.catch_up() == 0
        sessions = {hit.session_id for hit in two.search("wheel*")}
        assert sessions == {"s0", "s2", "s3", "s4", "s5"}


def test_a_search_that_takes_too_long_is_ended(pool: Pool, looked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n) SELECT n, n, n, n FROM n WHERE n < 0"
    monkeypatch.setattr(search, "_SEARCH", endless)
    monkeypatch.setattr(search, "LIMIT_S", 0.05)
    with pytest.raises(QueryError, match="takes longer"):
        SearchIndex(pool).search("wheel")


def test_a_disk_that_is_full_is_told_and_the_index_stays(
    pool: Pool, looked: Path, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = looked.stat().st_size
    keep(pool, make_kept(messages=dialogue(" ".join(f"word{n}" for n in range(20_000)))))
    small = f"PRAGMA max_page_count = {size // 4096 + 1}"
    prepare = search._prepare
    monkeypatch.setattr(search, "_prepare", lambda database: (database.conn.execute(small), prepare(database)))
    with pytest.raises(StorageError, match="full"):
        found(pool, "word7")
    monkeypatch.undo()
    assert not caplog.records
    assert len(found(pool, "word7")) == 1

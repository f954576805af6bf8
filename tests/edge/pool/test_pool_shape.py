"""How steps are stored: what is said again is stored once, and whatever was stored comes back exactly."""

import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.pool import keeper, schema
from clawloop_edge.pool.chain import IdsTail, Link, Tail, ids_tail, rebuild, shared_length, texts_tail
from clawloop_edge.pool.crypt import INDEX_SCOPE, POOL_SCOPE, Keyring, Scope, session_scope
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.packing import (
    ids_to_seal,
    pack_floats,
    pack_ids,
    pack_ints,
    unpack_floats,
    unpack_ints,
    wide_to_seal,
)
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_shared.database import migrate, open_database, transaction

from .conftest import MakeKept

if TYPE_CHECKING:
    from sqlite_utils import Database

ids = st.lists(st.integers(0, 3), max_size=60)
SYSTEM = {"role": "system", "content": "you are an agent " * 300}
TOOLS = [
    {"type": "function", "function": {"name": f"tool{number}", "description": "does " * 30}} for number in range(9)
]


def own_ids(tail: IdsTail) -> Tail[int]:
    """The same tail as a reader sees it."""
    return Tail(tail.shared, unpack_ints(ids_to_seal(tail.own)), tail.copies)


@given(ids, ids)
def test_the_shared_length_is_that_of_the_common_start(one: list[int], other: list[int]) -> None:
    common = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    expected = min(len(one), len(other)) if common is None else common
    assert shared_length(one, other) == shared_length(bytes(one), bytes(other)) == expected


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), min_size=1, max_size=5), st.integers(0, 8))
def test_a_list_of_texts_comes_back_from_any_chain_of_bases(lists: list[list[str]], length: int) -> None:
    tails = [texts_tail(base, texts) for base, texts in zip([[], *lists], lists, strict=False)]

    def link(name: int) -> Link[int, str]:
        return Link(name - 1 if name else None, tails[name].shared, lambda: tails[name])

    for name, texts in enumerate(lists):
        assert rebuild(name, length, link=link, known={}) == texts[:length]
        assert rebuild(name, length, link=link, known={0: lists[0]}) == texts[:length]


@given(ids, ids, ids, ids)
def test_a_prompt_comes_back_from_its_tail(
    shared: list[int], told: list[int], reply: list[int], new: list[int]
) -> None:
    base = shared + told + reply
    for prompt in (shared + reply + new + told, shared + new, told + new + reply, base, new):
        tail = ids_tail(pack_ids(base), pack_ids(prompt), reply_at=len(shared) + len(told))
        found = list(base)
        own_ids(tail).grow(found)
        assert found == prompt


def test_a_context_that_moves_and_the_last_reply_are_not_stored_again() -> None:
    chance = random.Random(1)
    shared, told, reply, new = ([chance.randrange(150_000) for _ in range(size)] for size in (500, 40, 30, 100))
    base, prompt = shared + told + reply, [*shared, 7, *reply, *new, *told]
    tail = ids_tail(pack_ids(base), pack_ids(prompt), reply_at=540)
    assert own_ids(tail) == Tail(500, [7, *new], [(1, 540, 30), (101, 500, 40)])


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.floats()))
def test_numbers_come_back_bit_for_bit(numbers: list[int], floats: list[float]) -> None:
    packed = pack_ids(numbers)
    assert unpack_ints(ids_to_seal(packed)) == unpack_ints(wide_to_seal(numbers)) == numbers
    assert unpack_ints(pack_ints(numbers)) == numbers
    narrow = unpack_floats(pack_floats([-0.25, float("-inf")]))
    assert narrow == [-0.25, float("-inf")]
    assert repr(unpack_floats(pack_floats(floats))) == repr(floats)


def shared_parts(pool: Pool) -> int:
    with pool.read() as database:
        return int(database.execute("SELECT count(*) FROM shared_parts").fetchone()[0])


def forget(pool: Pool, *session_ids: str) -> None:
    pool.submit(lambda database: pool.forgetting.forget(database, session_ids)).result()


def test_what_agents_say_in_every_session_is_stored_once_and_goes_with_the_last(
    pool: Pool, make_kept: MakeKept
) -> None:
    kept = [
        make_kept(session=f"s{at}", messages=[SYSTEM, {"role": "user", "content": "x"}], tools=TOOLS) for at in "abc"
    ]
    for each in kept:
        pool.keep_step(each).result()
    assert shared_parts(pool) == 2
    assert [pool.get_step(each.step.step_id) for each in kept] == kept
    forget(pool, "sa", "sb")
    assert shared_parts(pool) == 2
    assert pool.get_step(kept[2].step.step_id) == kept[2]
    forget(pool, "sc")
    assert shared_parts(pool) == 0
    with pool.read() as database:
        left = [row[0] for row in database.execute("SELECT scope FROM keys WHERE scope LIKE 'part/%'")]
        assert left == database.execute("SELECT part_id FROM part_refs").fetchall() == []
    assert pool.verify().problems == []


def test_only_what_an_agent_says_in_every_session_leaves_its_session(pool: Pool, make_kept: MakeKept) -> None:
    said = [{"role": role, "content": "long " * 2000} for role in ("user", "assistant", "tool")]
    kept = [make_kept(session=session, messages=said) for session in ("s1", "s2")]
    for each in kept:
        pool.keep_step(each).result()
    assert shared_parts(pool) == 0
    assert [pool.get_step(each.step.step_id) for each in kept] == kept


def test_a_session_begins_with_what_other_sessions_begin_with(pool: Pool, make_kept: MakeKept) -> None:
    chance = random.Random(2)
    opening = [chance.randrange(150_000) for _ in range(3 * 2048 + 100)]
    kept, sizes = list[KeptStep](), list[int]()
    for at in range(4):
        kept.append(make_kept(session=f"s{at}", prompt=[*opening, *(chance.randrange(150_000) for _ in range(300))]))
        pool.keep_step(kept[-1]).result()
        with pool.read() as database:
            sizes.append(database.execute("SELECT size FROM steps ORDER BY seq DESC LIMIT 1").fetchone()[0])
    assert shared_parts(pool) == 3
    assert max(sizes[1:]) < sizes[0] / 5
    assert [pool.get_step(each.step.step_id) for each in kept] == kept
    assert pool.verify().problems == []
    forget(pool, "s0", "s1", "s2")
    assert pool.get_step(kept[3].step.step_id) == kept[3]
    forget(pool, "s3")
    assert shared_parts(pool) == 0


def test_a_prompt_that_nobody_else_begins_with_makes_no_part(pool: Pool, make_kept: MakeKept) -> None:
    for at in range(3):
        pool.keep_step(make_kept(session=f"s{at}", prompt=[at] * 5000)).result()
    assert shared_parts(pool) == 0


def test_no_step_is_far_from_a_whole_one(pool: Pool, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "MAX_LINKS", 4)
    prompt, said, kept = [1], [SYSTEM], list[KeptStep]()
    for turn in range(10):
        kept.append(make_kept(prompt=prompt, messages=said, parent=kept[-1].step.step_id if kept else ""))
        pool.keep_step(kept[-1])
        prompt = [*kept[-1].step.token_ids, turn]
        said = [*said, kept[-1].reply, {"role": "user", "content": f"turn {turn}"}]
    pool.set_state("all are", b"kept").result()
    with pool.read() as database:
        links = [row[0] for row in database.execute("SELECT links FROM steps ORDER BY seq")]
    assert links == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert pool.session_steps("session-1") == kept
    assert [pool.get_step(each.step.step_id) for each in kept] == kept


def test_a_transcript_tells_everything_once(pool: Pool, make_kept: MakeKept) -> None:
    said: list[dict[str, Any]] = [SYSTEM]
    told = list[dict[str, Any]]()
    for turn in range(5):
        now = {"role": "user", "content": f"state of the moment, number {turn // 3}"}
        said = [*said, {"role": "user", "content": f"turn {turn}"}]
        kept = make_kept(words=f"turn {turn}", messages=[*said, now], prompt=[1] * (turn + 1), started_ms=turn)
        told += [*([SYSTEM] if turn == 0 else []), said[-1], *([now] if turn % 3 == 0 else []), kept.reply]
        pool.keep_step(kept).result()
        said.append(kept.reply)
    with pool.reading() as reading:
        turns = list(reading.transcript("session-1"))
        page = reading.steps_page(2)
        older = reading.steps_page(9, before_seq=page[-1].seq)
    assert [message for turn in turns for message in (*turn.messages, turn.reply)] == told
    assert [line.at_ms for line in (*page, *older)] == [4, 3, 2, 1, 0]
    assert page == [turns[4].step, turns[3].step]
    assert (page[0].kind, page[0].app, page[0].prompt_tokens, page[0].response_tokens) == ("main", "agent", 5, 3)


def test_a_part_that_is_missing_or_unknown_to_its_session_is_told(pool: Pool, make_kept: MakeKept) -> None:
    kept = make_kept(messages=[SYSTEM], tools=TOOLS)
    pool.keep_step(kept).result()

    def run(statement: str) -> None:
        pool.submit(lambda database: database.execute(statement)).result()

    run("CREATE TABLE aside AS SELECT * FROM part_refs")
    run("DELETE FROM part_refs")
    problems = pool.verify().problems
    assert [problem.split(" ", 1)[1] for problem in problems[:2]] == ["is used by no session"] * 2
    assert len([problem for problem in problems if problem.endswith("which does not know it")]) == 2
    run("INSERT INTO part_refs SELECT * FROM aside")
    run("DELETE FROM shared_parts")
    assert "is missing; run `clawloop-edge pool verify`" in pool.verify().problems[0]


class OldTokens(msgspec.Struct, array_like=True):
    """The column `tokens` of the first layout."""

    step: Any
    tail: bytes
    response: bytes
    logprobs: bytes


def old_row(scope: Scope, kept: KeptStep, *, seq: int, base: KeptStep | None) -> tuple[Any, ...]:
    """A row of `steps` of the first layout: facts in `tokens`, numbers one by one, the base by its id."""
    step = kept.step
    shared = len(base.step.token_ids) if base else 0
    bare = msgspec.structs.replace(step, prompt_ids=[], response_ids=[], response_logprobs=[])
    logprobs = b"d" + struct.pack(f"<{len(step.logprobs)}d", *step.logprobs)
    numbers = (pack_ints(step.prompt_ids[shared:]), pack_ints(step.response_ids), logprobs)
    tokens = msgspec.msgpack.encode(OldTokens(bare, *numbers))
    rest = {
        name: getattr(kept, name) for name in ("text", "kind", "app", "started_ms", "first_token_ms", "finished_ms")
    }
    own = kept.messages[len(base.messages) + 1 if base else 0 :]
    texts = [("", msgspec.json.encode(message)) for message in own]
    talk = msgspec.msgpack.encode([texts, msgspec.json.encode(kept.reply), "", msgspec.json.encode(rest)])
    sealed = [
        scope.seal("steps", step.step_id, column=column, plain=plain)
        for column, plain in (("tokens", tokens), ("talk", talk))
    ]
    names = (step.step_id, seq, step.session_id, step.run_id, "", True)
    place = (base.step.step_id if base else None, shared, len(base.messages) + 1 if base else 0, 7)
    return (*names, *place, *sealed)


def old_pool(database: "Database", key: bytes, kept: list[KeptStep]) -> None:
    """A pool of the first layout that holds these steps, each on the one before it."""
    migrate(database, schema.NAME, migrations=(schema.first_tables, schema.tallies, schema.key_versions))
    keyring = Keyring(database.execute("SELECT pool_id FROM pool").fetchone()[0], {1: key})
    with transaction(database):
        for scope in (POOL_SCOPE, INDEX_SCOPE):
            keyring.ensure(database, scope)
        scope_of = keyring.ensure(database, session_scope("session-1"))
        summary = scope_of.seal(
            "sessions", "session-1", column="summary", plain=msgspec.msgpack.encode(["app", "t", 1])
        )
        database.execute(
            "INSERT INTO sessions VALUES ('session-1', ?, 5, ?, ?, ?)", (len(kept), len(kept), len(kept), summary)
        )
        for at, each in enumerate(kept):
            row = old_row(scope_of, each, seq=at + 1, base=kept[at - 1] if at else None)
            database.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            names = (at + 1, "step", each.step.step_id, "session-1")
            database.execute("INSERT INTO changes VALUES (?, ?, ?, ?)", names)
            database.execute("INSERT INTO lookups VALUES (?, ?)", (bytes(32), each.step.step_id))


def test_a_pool_of_the_first_layout_is_read_and_goes_on(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    kept, said, prompt = list[KeptStep](), [{"role": "user", "content": "first"}], [1, 2, 3]
    for turn in range(5):
        kept.append(make_kept(prompt=prompt, messages=said, parent=kept[-1].step.step_id if kept else ""))
        prompt = [*kept[-1].step.token_ids, 70_000 + turn]
        said = [*said, kept[-1].reply, {"role": "user", "content": f"turn {turn}"}]
    database = open_database(tmp_path / "pool.db", KnownKey.of(key).load().file_key)
    old_pool(database, key, kept[:3])
    database.close()
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        assert pool.session_steps("session-1") == kept[:3]
        for each in kept[3:]:
            pool.keep_step(each).result()
        assert pool.session_steps("session-1") == kept
        assert [pool.get_step(each.step.step_id) for each in kept] == kept
        assert [change.step for change in pool.changes(0, 9)] == [each.step for each in kept]
        assert pool.sessions()[0].steps == 5
        with pool.read() as reader:
            assert reader.execute("SELECT tag, seq FROM lookups").fetchall() == [(bytes(16), seq) for seq in (1, 2, 3)]
        assert pool.verify().problems == []

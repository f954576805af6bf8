"""The pool: what is kept comes back exactly, once, and beside others that read and write."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawloop_edge.errors import PoolError, UnknownTarget
from clawloop_edge.pool import writer
from clawloop_edge.pool.heads import mark_forgotten
from clawloop_edge.pool.keys import KeyBundle, KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_shared.database import open_database, transaction
from clawloop_shared.errors import RecordError, StorageError
from clawloop_shared.records import Signal, Target

if TYPE_CHECKING:
    from sqlite_utils import Database

MakeKept = Callable[..., KeptStep]
MakeSignal = Callable[..., Signal]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
messages = st.dictionaries(st.text(max_size=6), json_values | st.text("ab ", min_size=1000, max_size=1100), max_size=3)


class Turn(msgspec.Struct):
    """How one step of a generated session continues another: which, how much of it, and what is new."""

    onto: int
    keep_ids: int
    keep_messages: int
    ids: list[int]
    response: list[int]
    logprobs: list[float]
    messages: list[dict[str, Any]]
    reply: dict[str, Any]
    named: bool
    session: int


turns = st.builds(
    Turn,
    onto=st.integers(0, 5),
    keep_ids=st.integers(0, 12),
    keep_messages=st.integers(0, 4),
    ids=st.lists(st.integers(0, 2**40), max_size=6),
    response=st.lists(st.integers(0, 70_000), max_size=4),
    logprobs=st.lists(st.floats(width=32) | st.floats(), max_size=4),
    messages=st.lists(messages, max_size=2),
    reply=messages,
    named=st.booleans(),
    session=st.integers(0, 1),
)


def grow(make_kept: MakeKept, plan: list[Turn]) -> list[KeptStep]:
    """Sessions whose steps share beginnings as the plan says."""
    grown: list[KeptStep] = []
    for turn in plan:
        base = grown[turn.onto % len(grown)] if grown else None
        start_ids = base.step.token_ids[: turn.keep_ids] if base else []
        start = [*base.messages, base.reply][: turn.keep_messages] if base else []
        kept = make_kept(
            session=f"session-{turn.session}",
            parent=base.step.step_id if base and turn.named else "",
            messages=[*start, *turn.messages],
            reply=turn.reply,
            tools=[{"type": "function", "function": {"name": f"tool{turn.session}"}}],
        )
        step = msgspec.structs.replace(
            kept.step,
            prompt_ids=start_ids + turn.ids,
            response_ids=turn.response,
            response_logprobs=turn.logprobs,
            untrainable="odd",
        )
        grown.append(msgspec.structs.replace(kept, step=step, messages=[*start, *turn.messages]))
    return grown


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(turns, min_size=1, max_size=6))
def test_steps_that_share_beginnings_come_back_exactly(pool: Pool, make_kept: MakeKept, plan: list[Turn]) -> None:
    kept = grow(make_kept, plan)
    for future in [pool.keep_step(each) for each in kept]:
        future.result()
    for each in kept:
        # repr: it tells 1 from 1.0 and True, -0.0 from 0.0, NaN from nothing, and the order of keys.
        assert repr(pool.get_step(each.step.step_id)) == repr(each)
    mine = {each.step.step_id: repr(each) for each in kept}
    for session in {each.step.session_id for each in kept}:
        for each in pool.session_steps(session):
            assert mine.get(each.step.step_id, repr(each)) == repr(each)


def test_steps_come_back_exactly_from_a_pool_opened_anew(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    prompt, said, kept = list(range(200)), [{"role": "system", "content": "x" * 3000}], list[KeptStep]()
    for turn in range(8):
        said = [*said, {"role": "user", "content": f"turn {turn}"}]
        prompt = [*prompt, 1000 + turn]
        kept.append(make_kept(prompt=prompt, messages=said, parent=kept[-1].step.step_id if kept else ""))
        with Pool.open(tmp_path, KnownKey.of(key)) as pool:
            pool.keep_step(kept[-1]).result()
        prompt, said = kept[-1].step.token_ids, [*said, kept[-1].reply]
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        assert pool.session_steps("session-1") == kept
        assert pool.get_step(kept[-1].step.step_id) == kept[-1]
        assert [change.step for change in pool.changes(0, 100)] == [each.step for each in kept]
        assert pool.verify().ok


def test_a_session_costs_what_is_new_in_it(pool: Pool, make_kept: MakeKept) -> None:
    prompt = [(7919 * at) % 50_000 for at in range(8000)]
    said = [{"role": "system", "content": " ".join(str(token) for token in prompt)}]
    pool.keep_step(make_kept(prompt=prompt, messages=said)).result()
    once = pool.stats().payload_bytes
    for turn in range(50):
        said = [*said, {"role": "user", "content": f"turn {turn}"}]
        ephemeral = {"role": "user", "content": f"context that moves {turn}"}
        prompt = [*prompt, turn]
        pool.keep_step(make_kept(prompt=[*prompt, 5, 6, turn], messages=[*said, ephemeral])).result()
    assert pool.stats().payload_bytes - once < 50 * 600


def test_keeping_twice_keeps_once(pool: Pool, make_kept: MakeKept, make_signal: MakeSignal) -> None:
    kept = make_kept()
    signal = make_signal(kept.step.step_id)
    for _ in range(2):
        pool.keep_step(kept, index={"reply": b"hash"}).result()
        pool.keep_signal(signal).result()
    stats = pool.stats()
    assert (stats.steps, stats.signals, stats.last_seq) == (1, 1, 2)
    assert pool.sessions()[0].steps == 1


def test_steps_are_found_by_a_blind_index_within_their_session(pool: Pool, make_kept: MakeKept) -> None:
    first, second, other = make_kept(), make_kept(), make_kept(session="session-2")
    for kept in (first, second, other):
        pool.keep_step(kept, index={"reply": b"same words"}).result()
    assert pool.find_step_by("reply", b"same words") == other.step.step_id
    assert pool.find_step_by("reply", b"same words", session_id="session-1") == second.step.step_id
    assert pool.find_steps_by("reply", b"same words", session_id="session-1") == [
        second.step.step_id,
        first.step.step_id,
    ]
    assert pool.find_step_by("reply", b"other words") is None
    assert pool.find_step_by("prompt", b"same words") is None


def test_signals_are_found_by_what_they_judge(pool: Pool, make_kept: MakeKept, make_signal: MakeSignal) -> None:
    kept, other = make_kept(), make_kept(session="session-2")
    pool.keep_step(kept)
    pool.keep_step(other)
    signals = [
        make_signal(kept.step.step_id),
        make_signal(kept.step.run_id, target=Target.RUN, value=-0.5, comment="no"),
        make_signal("session-1", target=Target.SESSION),
    ]
    for signal in signals:
        pool.keep_signal(signal).result()
    assert pool.signals([kept.step]) == signals
    assert pool.signals([other.step]) == []
    assert [change.signal for change in pool.changes(2, 100)] == signals


def test_a_signal_for_something_unknown_is_refused(pool: Pool, make_kept: MakeKept, make_signal: MakeSignal) -> None:
    pool.keep_step(make_kept()).result()
    for target in Target:
        with pytest.raises(UnknownTarget, match="elsewhere"):
            pool.keep_signal(make_signal("elsewhere", target=target)).result()
    with pytest.raises(UnknownTarget):  # no trajectory is named, and no step that has none is meant
        pool.keep_signal(make_signal(" ", target=Target.TRAJECTORY)).result()
    with pytest.raises(RecordError, match="outside"):
        pool.keep_signal(make_signal("x", value=2.0))
    assert pool.stats().signals == 0


def test_sessions_are_listed_by_their_last_use_with_the_agents_title(pool: Pool, make_kept: MakeKept) -> None:
    for number in range(5):
        times = {"started_ms": 100 * number, "finished_ms": 100 * number + 50}
        pool.keep_step(make_kept(session=f"session-{number}", words=f"ask  {number}\n" + "x" * 200, **times))
    title = {"kind": "title", "reply": {"role": "assistant", "content": "A fine title"}}
    pool.keep_step(
        make_kept(session="session-1", untrainable="side request", started_ms=150, finished_ms=150, **title)
    ).result()
    page = pool.sessions(limit=2)
    assert [each.session_id for each in page] == ["session-4", "session-3"]
    older = pool.sessions(limit=9, before_ms=page[-1].last_ms)
    assert [each.session_id for each in older] == ["session-2", "session-1", "session-0"]
    assert (older[1].title, older[1].steps, older[1].trainable) == ("A fine title", 2, 1)
    assert older[0].title.startswith("ask 2 xxx")
    assert len(older[0].title) == 80


def test_a_failing_write_fails_alone(pool: Pool, make_kept: MakeKept) -> None:
    def fail(database: "Database") -> None:
        database.execute("DELETE FROM steps")
        raise ValueError("no")

    started, go = threading.Event(), threading.Event()

    def hold(_database: "Database") -> None:
        started.set()
        assert go.wait(10)

    held = pool.submit(hold)
    assert started.wait(10)
    kept = [make_kept(words=f"{number}") for number in range(4)]
    futures: list[Future[None]] = [pool.keep_step(each) for each in kept[:2]]
    failed = pool.submit(fail)
    futures += [pool.keep_step(each) for each in kept[2:]]
    go.set()
    held.result()
    with pytest.raises(ValueError, match="no"):
        failed.result()
    for future in futures:
        future.result()
    assert pool.session_steps("session-1") == kept
    assert pool.verify().ok


def test_a_full_disk_loses_nothing_that_was_acknowledged_and_the_pool_goes_on(pool: Pool, make_kept: MakeKept) -> None:
    def room(pages: int) -> None:
        limit = "PRAGMA max_page_count = {}"

        def operation(database: "Database") -> None:
            used = database.execute("PRAGMA page_count").fetchone()[0]
            database.execute(limit.format(used + pages))

        pool.submit(operation).result()

    room(40)
    kept = [make_kept(words=random.Random(number).randbytes(6000).hex()) for number in range(60)]
    futures = [pool.keep_step(each) for each in kept]
    errors = [future.exception() for future in futures]
    refused = [error for error in errors if error is not None]
    assert len(refused) > 0
    assert all(isinstance(error, StorageError) and "full" in str(error) for error in refused)
    room(100_000)
    for each in kept:
        pool.keep_step(each).result()
    assert sorted(pool.step_ids()) == sorted(each.step.step_id for each in kept)
    assert all(pool.get_step(each.step.step_id) == each for each in kept)
    assert pool.verify().problems == []


def test_a_write_waits_for_another_process_that_writes(
    tmp_path: Path, pool: Pool, key: bytes, make_kept: MakeKept
) -> None:
    other = open_database(tmp_path / "pool.db", KeyBundle.of(key).file_key)
    with transaction(other):
        future = pool.keep_step(make_kept())
        with pytest.raises(TimeoutError):
            future.result(timeout=0.2)
    future.result(timeout=20)
    other.close()


def test_a_step_is_refused_when_too_much_waits_and_the_caller_is_not_held(
    pool: Pool, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_QUEUED_BYTES", 4000)
    go = threading.Event()
    held = pool.submit(lambda _database: go.wait(10))
    futures = [pool.keep_step(make_kept(words=f"{number}")) for number in range(20)]
    refused = [future for future in futures if future.done()]
    assert 0 < len(refused) < 20
    for future in refused:
        with pytest.raises(PoolError, match="does not keep up"):
            future.result()
    assert pool.stats().refused == len(refused)
    go.set()
    held.result()
    assert sum(future.exception() is None for future in futures) == 20 - len(refused) == pool.stats().steps


def test_readers_see_whole_steps_while_others_are_written(pool: Pool, make_kept: MakeKept) -> None:
    stop, seen, problems = threading.Event(), list[int](), list[str]()

    def read() -> None:
        while not stop.is_set():
            with pool.reading() as reading:
                steps = list(reading.session_steps("session-1"))
                listed = sum(each.steps for each in reading.sessions(10, None))
            if len(steps) != listed or any(
                step.text != f"echo {step.messages[0]['content']}<|im_end|>" for step in steps
            ):
                problems.append(f"{len(steps)} steps read, {listed} listed")
            seen.append(len(steps))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(60):
        pool.keep_step(make_kept(words=f"number {number}")).result()
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert max(seen) > 0
    assert len(pool.session_steps("session-1")) == 60


def test_reads_do_not_wait_for_a_write_in_progress(pool: Pool, make_kept: MakeKept) -> None:
    kept = make_kept()
    pool.keep_step(kept).result()
    started, go = threading.Event(), threading.Event()

    def hold(_database: "Database") -> None:
        started.set()
        assert go.wait(10)

    held = pool.submit(hold)
    assert started.wait(10)
    assert pool.get_step(kept.step.step_id) == kept
    assert not held.done()
    go.set()
    held.result()


def test_a_reader_cannot_write_also_after_another_room_brought_its_tables(pool: Pool, make_kept: MakeKept) -> None:
    def table(database: "Database") -> None:
        database.execute("CREATE TABLE IF NOT EXISTS of_another_room (x)")

    pool.keep_step(make_kept()).result()
    for name in ("first", "second"):
        pool.adopt(name, (table,))
        with pytest.raises(StorageError, match="readonly"), pool.read() as database:
            database.execute("DELETE FROM lookups")
    assert pool.stats().steps == 1


def test_two_edges_on_one_home_are_refused_and_other_commands_are_not(
    tmp_path: Path, key: bytes, make_kept: MakeKept
) -> None:
    with Pool.open(tmp_path, KnownKey.of(key), writer=True) as serving:
        with pytest.raises(PoolError, match=r"another edge \(process \d+\) already runs"):
            Pool.open(tmp_path, KnownKey.of(key), writer=True)
        with Pool.open(tmp_path, KnownKey.of(key)) as command:
            command.set_state("wish", b"1").result()
            serving.keep_step(make_kept()).result()
            assert command.stats().steps == 1
        assert serving.get_state("wish") == b"1"
    Pool.open(tmp_path, KnownKey.of(key), writer=True).close()


def test_rows_moved_between_sessions_are_detected(pool: Pool, make_kept: MakeKept) -> None:
    one, other = make_kept(session="session-1"), make_kept(session="session-2")
    pool.keep_step(one)
    pool.keep_step(other).result()

    def swap(database: "Database") -> None:
        take = "(SELECT talk FROM steps WHERE step_id = ?)"
        ids = (one.step.step_id, other.step.step_id)
        database.execute(f"UPDATE steps SET talk = {take} WHERE step_id = ?", (ids[1], ids[0]))  # noqa: S608

    pool.submit(swap).result()
    with pytest.raises(StorageError, match="wrong key or changed"):
        pool.get_step(one.step.step_id)
    report = pool.verify()
    assert not report.ok
    assert one.step.step_id in report.problems[0]
    assert pool.get_step(other.step.step_id) == other


def test_rows_moved_within_a_session_are_detected(pool: Pool, make_kept: MakeKept) -> None:
    one, other = make_kept(words="one"), make_kept(words="other")
    pool.keep_step(one)
    pool.keep_step(other).result()
    swap = "UPDATE steps SET tokens = (SELECT tokens FROM steps WHERE step_id = ?) WHERE step_id = ?"
    pool.submit(lambda database: database.execute(swap, (one.step.step_id, other.step.step_id))).result()
    with pytest.raises(StorageError, match="wrong key or changed"):
        pool.get_step(other.step.step_id)


def test_verify_counts_what_is_missing(pool: Pool, make_kept: MakeKept) -> None:
    kept = [make_kept(), make_kept()]
    for each in kept:
        pool.keep_step(each).result()
    delete = "DELETE FROM steps WHERE step_id = ?"
    pool.submit(lambda database: database.execute(delete, (kept[1].step.step_id,))).result()
    lost = kept[1].step.step_id
    assert pool.verify().problems == [f"change 2: step {lost} is missing, and was not forgotten"]
    pool.submit(lambda database: mark_forgotten(database, [2])).result()
    by_size, by_number = pool.verify().problems
    assert by_size.startswith("session session-1 counts ")
    assert by_number == "session session-1 counts 2 steps (2 trainable) but has 1 (1)"


def test_state_is_kept_and_replaced_and_sealed_to_its_name(pool: Pool) -> None:
    assert pool.get_state("membership") is None
    for value in (b"one", b"two"):
        pool.set_state("membership", value).result()
    pool.set_state("cursor", b"").result()
    assert pool.get_state("membership") == b"two"
    assert pool.get_state("cursor") == b""
    swap = "UPDATE state SET body = (SELECT body FROM state WHERE name = 'cursor') WHERE name = 'membership'"
    pool.submit(lambda database: database.execute(swap)).result()
    with pytest.raises(StorageError):
        pool.get_state("membership")


def test_a_closed_pool_says_so(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    pool = Pool.open(tmp_path, KnownKey.of(key))
    kept = pool.keep_step(make_kept())
    pool.close()
    kept.result()
    with pytest.raises(PoolError, match="closed"):
        pool.keep_step(make_kept()).result()
    with pytest.raises(PoolError, match="closed"):
        pool.stats()


def test_cancelling_a_future_does_not_undo_its_step(pool: Pool, make_kept: MakeKept) -> None:
    future = pool.keep_step(make_kept())
    assert not future.cancel()
    future.result()
    assert pool.stats().steps == 1

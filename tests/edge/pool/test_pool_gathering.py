"""Steps that come while the writer is busy share a transaction."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool

from .conftest import MakeKept

if TYPE_CHECKING:
    from sqlite_utils import Database


@contextmanager
def busy(pool: Pool) -> Iterator[None]:
    """The writer does something else meanwhile; what comes is its next transaction."""
    begun, over = threading.Event(), threading.Event()

    def work(database: "Database") -> None:
        begun.set()
        over.wait(20)

    pool.submit(work)
    assert begun.wait(20)
    try:
        yield
    finally:
        over.set()


def test_a_step_that_waits_is_kept_when_the_pool_is_closed(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    kept = make_kept()
    with Pool.open(tmp_path, KnownKey.of(key)) as pool, busy(pool):
        future = pool.keep_step(kept)
        assert not future.done()
    future.result(0)
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        assert pool.step_ids() == [kept.step.step_id]


def test_a_step_that_cannot_be_kept_fails_alone_among_those_that_share_its_transaction(
    pool: Pool, make_kept: MakeKept
) -> None:
    kept = [make_kept(words=f"{number}") for number in range(4)]
    with busy(pool):
        futures = [pool.keep_step(each) for each in kept[:2]]
        broken = pool.keep_step(make_kept(messages=[{"role": "user", "content": object()}]))
        futures += [pool.keep_step(each) for each in kept[2:]]
        state = pool.set_state("name", b"value")
    assert isinstance(broken.exception(20), TypeError)
    assert [future.result(20) for future in (*futures, state)] == [None] * 5
    assert pool.session_steps("session-1") == kept
    assert pool.get_state("name") == b"value"
    assert pool.verify().problems == []


def test_what_shares_a_transaction_with_steps_sees_those_before_it(pool: Pool, make_kept: MakeKept) -> None:
    def look(database: "Database") -> tuple[int, int, int]:
        row = database.execute("SELECT steps, (SELECT count(*) FROM steps), (SELECT seq FROM chain) FROM sessions")
        return tuple(row.fetchone())

    kept = [make_kept(words=f"{number}") for number in range(3)]
    with busy(pool):
        first = [pool.keep_step(each) for each in kept[:2]]
        seen = pool.submit(look)
        last = pool.keep_step(kept[2])
    assert seen.result(20) == (2, 2, 2)
    pool.submit(look).result(20)
    assert all(future.done() for future in (*first, last))
    assert pool.session_steps("session-1") == kept


def test_steps_forgotten_in_the_transaction_that_kept_them_are_gone(pool: Pool, make_kept: MakeKept) -> None:
    kept, again = make_kept(), make_kept()
    with busy(pool):
        pool.keep_step(kept)
        forgotten = pool.submit(lambda database: pool.forgetting.forget(database, ["session-1"]))
        pool.keep_step(again)
        other = pool.keep_step(make_kept(session="session-2"))
    assert forgotten.result(20).step_ids == [kept.step.step_id]
    pool.set_state("name", b"value").result(20)
    assert other.done()
    assert [session.session_id for session in pool.sessions()] == ["session-2"]
    assert pool.verify().problems == []

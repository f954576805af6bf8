"""What the pool tells of its steps: counts by kind and reason, titles, and what a call after a restart needs."""

from pathlib import Path
from typing import Any

import msgspec

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_shared.ids import new_id

from .conftest import MakeKept

STAMP = "[Sun 2026-11-22 08:19 UTC] "
RUNTIME = "\n\nRuntime: agent=main | session=agent:main:s1 | sessionId=1c81d855-87ad-47af-a3eb-27ce146f0982 | host=vm"


def counts(pool: Pool) -> dict[tuple[str, str, str], int]:
    return {(count.kind, count.app, count.untrainable): count.steps for count in pool.step_counts()}


def fill(pool: Pool, make_kept: MakeKept) -> dict[tuple[str, str, str], int]:
    for number in range(6):
        pool.keep_step(make_kept(session=f"s{number % 2}")).result(10)
    pool.keep_step(make_kept(kind="title", app="b", untrainable="side request: title")).result(10)
    return {("main", "agent", ""): 6, ("title", "b", "side request: title"): 1}


def test_steps_are_counted_once_as_they_are_kept(pool: Pool, make_kept: MakeKept) -> None:
    wanted = fill(pool, make_kept)
    again = make_kept()
    for _ in range(3):
        pool.keep_step(again).result(10)
    assert counts(pool) == wanted | {("main", "agent", ""): 7}
    assert pool.verify().ok


def test_a_step_that_is_not_kept_is_not_counted(pool: Pool, make_kept: MakeKept) -> None:
    broken = make_kept(messages=[{"role": "user", "content": object()}])
    assert pool.keep_step(broken).exception(10) is not None
    assert counts(pool) == {}


def test_a_pool_from_before_the_counts_is_counted_when_it_is_opened(
    tmp_path: Path, key: bytes, make_kept: MakeKept
) -> None:
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        wanted = fill(pool, make_kept)
        pool.submit(lambda database: database.conn.execute("DROP TABLE tallies") and None).result(10)
        forget = "DELETE FROM _sqlite_migrations WHERE name IN ('tallies', 'count_kept_steps')"
        pool.submit(lambda database: database.conn.execute(forget) and None).result(10)
    for _ in range(2):
        with Pool.open(tmp_path, KnownKey.of(key)) as pool:
            assert counts(pool) == wanted
            assert pool.verify().ok


def test_verify_notices_a_count_that_is_wrong(pool: Pool, make_kept: MakeKept) -> None:
    fill(pool, make_kept)
    pool.submit(lambda database: database.conn.execute("UPDATE tallies SET steps = 5 WHERE steps = 6") and None).result(
        10
    )
    (problem,) = pool.verify().problems
    assert "main / agent" in problem


def titled(pool: Pool) -> str:
    (session,) = pool.sessions()
    return session.title


def test_a_title_is_what_a_person_typed_first(pool: Pool, make_kept: MakeKept) -> None:
    context = {"role": "user", "content": [{"type": "text", "text": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nnone"}]}
    asked = {"role": "user", "content": f"{STAMP}plan a\ntrip{RUNTIME}"}
    pool.keep_step(make_kept(kind="compaction", messages=[{"role": "user", "content": "<conversation>"}])).result(10)
    assert titled(pool) == ""
    pool.keep_step(make_kept(messages=[{"role": "system", "content": "x"}, context, asked])).result(10)
    assert titled(pool) == "plan a trip"
    named = {"role": "assistant", "content": "Norway in winter"}
    pool.keep_step(make_kept(kind="title", reply=named)).result(10)
    pool.keep_step(make_kept(messages=[{"role": "user", "content": "later"}])).result(10)
    assert titled(pool) == "Norway in winter"


def test_the_last_main_step_of_a_session_is_behind_its_side_requests(pool: Pool, make_kept: MakeKept) -> None:
    last = make_kept(session="a", words="last")
    for step in (make_kept(session="a"), last, make_kept(session="a", kind="heartbeat"), make_kept(session="b")):
        pool.keep_step(step).result(10)
    assert pool.last_main_step("a") == last
    assert pool.last_main_step("c") is None


def test_a_run_gives_the_latest_step_of_each_session_it_passes_through(pool: Pool, make_kept: MakeKept) -> None:
    def of_run(session: str, run: str) -> Any:
        kept = make_kept(session=session)
        return msgspec.structs.replace(kept, step=msgspec.structs.replace(kept.step, run_id=run))

    run = new_id()
    one, two, three = of_run("a", run), of_run("b", run), of_run("a", run)
    for step in (one, two, three, of_run("a", "other")):
        pool.keep_step(step).result(10)
    assert pool.run_steps(run) == [three, two]
    assert pool.run_steps("none") == []

"""The background worker: which cases a tree of steps makes, and that a case is judged once, come what may."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.errors import ScorerFailed
from clawloop_edge.gateway.schema import prepare_trajectories
from clawloop_edge.gateway.trajectory_store import TrajectoryStore
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.scoring import metadata_of, read_completed_of
from clawloop_edge.signals import cases
from clawloop_edge.signals.protocol import Case, Moment, Scorer, Verdict
from clawloop_edge.signals.settings import SignalsSettings
from clawloop_edge.signals.worker import SignalWorker
from clawloop_shared.records import Policy, Sampling, Step, Target

Json = dict[str, Any]
EVERY = frozenset(Moment)


class Noting:
    """A scorer that notes what it is asked; `says` answers."""

    def __init__(
        self,
        says: Callable[[Case], list[Verdict]] = lambda case: [Verdict(value=1.0)],
        *,
        name: str = "judge",
        moments: frozenset[Moment] = EVERY,
    ) -> None:
        self.name, self.moments, self.says = name, moments, says
        self.seen: list[Case] = []
        self.asked = asyncio.Event()

    async def score(self, case: Case) -> list[Verdict]:
        self.seen.append(case)
        self.asked.set()
        return self.says(case)

    async def close(self) -> None:
        return

    def by(self, moment: Moment) -> list[Case]:
        return [case for case in self.seen if case.moment is moment]


class Hanging(Noting):
    async def score(self, case: Case) -> list[Verdict]:
        self.seen.append(case)
        self.asked.set()
        await asyncio.Event().wait()
        return []


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.open(tmp_path, KnownKey.of(bytes(range(32)))) as opened:
        prepare_trajectories(opened)
        yield opened


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def said(text: str, *calls: str) -> Json:
    made = [{"id": call, "type": "function", "function": {"name": "run", "arguments": "{}"}} for call in calls]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


def result(call: str, text: str) -> Json:
    return {"role": "tool", "tool_call_id": call, "content": text}


class Talk:
    """Keeps steps of one session."""

    def __init__(self, pool: Pool, session: str = "s") -> None:
        self._pool, self._session, self._count = pool, session, 0

    def step(self, messages: Sequence[Json], reply: Json, *, run: str, parent: str = "", **fields: Any) -> str:
        self._count += 1
        step_id = f"{self._session}-{self._count}"
        kept_fields = {name: fields.pop(name) for name in ("kind",) if name in fields}
        step = Step(
            step_id=step_id,
            session_id=self._session,
            run_id=run,
            prompt_ids=[1, 2, self._count],
            response_ids=[3],
            response_logprobs=[-0.5],
            policy=Policy("line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=self._count,
            parent_id=parent,
            **fields,
        )
        kept = KeptStep(step=step, messages=list(messages), reply=reply, started_ms=1, finished_ms=2, **kept_fields)
        self._pool.keep_step(kept).result()
        return step_id


def worker_of(pool: Pool, *scorers: Scorer, **settings: Any) -> SignalWorker:
    return SignalWorker(
        pool,
        SignalsSettings(**({"idle_s": 3600.0, "retry_after_s": 0.0} | settings)),
        scorers=scorers,
        metadata_of=metadata_of,
        completed=read_completed_of,
        clock_ms=lambda: 1_000_000,
    )


@asynccontextmanager
async def running(worker: SignalWorker) -> AsyncIterator[SignalWorker]:
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - of a database, which wakes nobody
            await asyncio.sleep(0.01)


def kept_signals(pool: Pool, session: str = "s") -> list[Any]:
    with pool.reading() as reading:
        return reading.session_signals(session)


async def test_a_tree_with_a_tool_loop_a_side_request_and_a_new_turn_makes_the_right_cases(pool: Pool) -> None:
    scorer = Noting()
    async with running(worker_of(pool, scorer)) as worker:
        talk = Talk(pool)
        ask = [user("what is up?")]
        first = talk.step(ask, said("", "c1"), run="r1")
        talk.step([user("title please")], said("Title"), run="t", parent=first, kind="title", untrainable="side")
        after = [*ask, said("", "c1"), result("c1", "all well")]
        second = talk.step(after, said("all is well"), run="r1", parent=first)
        beat = [*after, said("all is well"), user("[OpenClaw heartbeat poll]")]
        heart = talk.step(beat, said("ok"), run="h", parent=second, kind="heartbeat", untrainable="side")
        talk.step([*beat, said("ok"), user("no, look again")], said("hm"), run="r2", parent=heart)
        await until(lambda: worker.counts["judge"].made == 2)
        continued, followed = scorer.by(Moment.CONTINUED)[0], scorer.by(Moment.FOLLOWED)[0]
    assert (continued.target, continued.target_id, continued.following) == (Target.STEP, first, [after[-1]])
    assert (followed.target, followed.target_id) == (Target.RUN, "r1")
    assert [kept.step.step_id for kept in followed.steps] == [first, second]
    assert followed.following[-1] == user("no, look again")
    assert followed.earlier == []
    assert {signal.target_id for signal in kept_signals(pool)} == {first, "r1"}


async def test_what_a_retry_replaced_is_not_judged_with_its_run_and_what_is_done_over_is(pool: Pool) -> None:
    scorer = Noting(moments=frozenset({Moment.FOLLOWED}))
    async with running(worker_of(pool, scorer)):
        talk = Talk(pool)
        ask = [user("one")]
        talk.step(ask, said("cut"), run="r1")
        kept = talk.step(ask, said("whole"), run="r1")
        ask2 = [*ask, said("whole"), user("two")]
        poor = talk.step(ask2, said("poor"), run="r2", parent=kept)
        again = talk.step(ask2, said("better"), run="r3", parent=kept)
        await until(lambda: len(scorer.seen) == 2)
    one, two = scorer.seen
    assert [each.step.step_id for each in one.steps] == [kept]
    assert ([each.step.step_id for each in two.steps], two.following_step_id) == ([poor], again)
    assert (two.following, two.earlier) == ([user("two")], ["one"])


async def test_a_run_left_alone_ends_and_one_that_goes_on_does_not(pool: Pool) -> None:
    scorer = Noting(moments=frozenset({Moment.ENDED}))
    now = [1_000_000]
    worker = SignalWorker(
        pool,
        SignalsSettings(idle_s=100.0),
        scorers=[scorer],
        metadata_of=metadata_of,
        completed=read_completed_of,
        clock_ms=lambda: now[0],
    )
    async with running(worker):
        first = Talk(pool, "a").step([user("x")], said("y"), run="ra")
        other = Talk(pool, "b")
        left = other.step([user("x")], said("y"), run="rb")
        other.step([user("x"), said("y"), user("z")], said("w"), run="rb2", parent=left)
        Talk(pool, "c").step([user("x")], said("y"), run="rc", untrainable="temperature 0")
        await until(lambda: worker.counts["judge"].waiting == 2)
        assert not scorer.seen
        now[0] += 100_001
        await until(lambda: len(scorer.seen) == 2)
    assert {case.target_id for case in scorer.seen} == {"ra", "rb2"}
    assert scorer.seen[0].answer.step.step_id == first


async def test_a_completed_trajectory_is_judged_at_once_with_its_metadata(pool: Pool) -> None:
    scorer = Noting(moments=frozenset({Moment.ENDED}))
    store = TrajectoryStore(pool)
    async with running(worker_of(pool, scorer)) as worker:
        entry = await store.create("t" * 32, minted=True, now_ms=1)
        await asyncio.wrap_future(store.update(entry, metadata={"answer": "42", "source": "x"}, next_index=2))
        talk = Talk(pool, "t" * 32)
        talk.step([user("x")], said("y"), run="t" * 32, trajectory_id="t" * 32)
        await asyncio.wrap_future(store.update(entry, completed=True))
        await until(lambda: worker.counts["judge"].waiting == 1)
        await asyncio.sleep(0)
        assert not scorer.seen  # its second step is not on disk yet
        talk.step([user("x"), said("y"), user("z")], said("42"), run="t" * 32, trajectory_id="t" * 32)
        await until(lambda: len(scorer.seen) == 1)
    case = scorer.seen[0]
    assert (case.target, case.metadata, len(case.steps)) == (
        Target.TRAJECTORY,
        {"answer": "42", "source": "x"},
        2,
    )


@pytest.mark.parametrize("turns", range(4))
async def test_it_stops_though_something_new_comes_at_that_very_moment(pool: Pool, turns: int) -> None:
    worker = worker_of(pool, Noting())
    await worker.start()
    news = worker._wake["judge"]
    await until(lambda: bool(news._waiters))
    news.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await worker.stop()


async def test_a_crash_between_judging_and_keeping_gives_one_signal(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn(talk: Talk) -> None:
        first = talk.step([user("x")], said("y"), run="r1")
        talk.step([user("x"), said("y"), user("z")], said("w"), run="r2", parent=first)

    judged, kept, values = Noting(), Noting(), iter([0.5, -0.5, 0.25])
    judged.says = kept.says = lambda case: [Verdict(value=next(values))]
    keep = asyncio.Event()
    with monkeypatch.context() as patched:
        patched.setattr(SignalWorker, "_keep", lambda self, signals, counts: keep.wait())  # dies before it keeps
        async with running(worker_of(pool, judged)):
            turn(Talk(pool))
            await judged.asked.wait()
    assert kept_signals(pool) == []
    with monkeypatch.context() as patched:
        patched.setattr("clawloop_edge.signals.docket.Docket.settle", lambda *args, **more: None)  # dies after it
        async with running(worker_of(pool, kept)):
            await until(lambda: len(kept_signals(pool)) == 1)
    last = Noting(lambda case: [Verdict(value=next(values, 0.0))])
    async with running(worker_of(pool, last)) as worker:
        await until(lambda: worker.counts["judge"].judged == 1)
    assert [signal.value for signal in kept_signals(pool)] == [-0.5]


async def test_a_restart_goes_on_where_it_stopped_and_never_reads_what_was_there_before(pool: Pool) -> None:
    talk = Talk(pool)
    first = talk.step([user("x")], said("y"), run="r1")
    old = talk.step([user("x"), said("y"), user("z")], said("w"), run="r2", parent=first)
    scorer = Noting(moments=frozenset({Moment.FOLLOWED}))
    async with running(worker_of(pool, scorer)):
        pass
    history = [user("x"), said("y"), user("z"), said("w"), user("more")]
    talk.step(history, said("v"), run="r3", parent=old)  # while nothing runs
    async with running(worker_of(pool, scorer)):
        await until(lambda: len(scorer.seen) == 1)
    assert [case.target_id for case in scorer.seen] == ["r2"]


async def test_a_scorer_that_hangs_or_fails_holds_up_nobody_and_makes_no_signal(pool: Pool) -> None:
    def fail(case: Case) -> list[Verdict]:
        raise ScorerFailed("the judge is down")

    moments = frozenset({Moment.FOLLOWED})
    hanging, failing = Hanging(name="judge", moments=moments), Noting(fail, name="rule", moments=moments)
    fine = Noting(name="exact", moments=moments)
    wrong = Noting(lambda case: [Verdict(value=7.0)], name="regex", moments=moments)
    worker = worker_of(pool, hanging, failing, fine, wrong, tries=3)
    async with running(worker):
        talk = Talk(pool)
        first = talk.step([user("x")], said("y"), run="r1")
        talk.step([user("x"), said("y"), user("z")], said("w"), run="r2", parent=first)
        await hanging.asked.wait()
        await until(lambda: worker.counts["rule"].given_up == 1 and worker.counts["exact"].made == 1)
        await until(lambda: worker.counts["regex"].failed["invalid verdict"] == 1)
        assert worker.counts["regex"].given_up == 1
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 2
    assert len(failing.seen) == 3
    assert [signal.source for signal in kept_signals(pool)] == ["exact"]


async def test_what_was_forgotten_meanwhile_is_passed_by(pool: Pool) -> None:
    scorer = Noting(moments=frozenset({Moment.FOLLOWED}))
    worker = worker_of(pool, scorer)
    forget = pool.forgetting.forget

    def judge(case: Case) -> list[Verdict]:
        pool.submit(lambda database: forget(database, ["s"])).result()
        return [Verdict(value=1.0)]

    scorer.says = judge
    async with running(worker):
        talk = Talk(pool)
        first = talk.step([user("x")], said("y"), run="r1")
        talk.step([user("x"), said("y"), user("z")], said("w"), run="r2", parent=first)
        await until(lambda: worker.counts["judge"].failed["gone"] == 1)
        await until(lambda: worker.counts["judge"].waiting == 0)
    assert kept_signals(pool) == []


def test_what_followed_is_found_word_for_word_by_call_by_text_or_not_at_all() -> None:
    def kept(messages: list[Json], reply: Json) -> KeptStep:
        step = Step(
            step_id="x",
            session_id="s",
            run_id="r",
            prompt_ids=[1],
            response_ids=[2],
            response_logprobs=[-1.0],
            policy=Policy("line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=1,
        )
        return KeptStep(step=step, messages=messages, reply=reply, started_ms=1, finished_ms=2)

    asked = kept([user("a")], said("b", "call_1"))
    tail = [result("call1", "ok"), user("c")]
    found = cases.messages_after
    assert found(asked, kept([user("a"), said("b", "call1"), *tail], said("d"))) == tail
    assert found(asked, kept([user("a summary"), said("b", "call1"), *tail], said("d"))) == tail
    assert found(asked, kept([user("a summary"), said("e"), user("f")], said("d"))) == [user("f")]
    assert found(asked, kept([user("a summary"), user("f")], said("d"))) == [user("a summary"), user("f")]


async def test_half_a_character_in_a_judges_words_is_kept_as_a_question_mark(pool: Pool) -> None:
    scorer = Noting(lambda case: [Verdict(value=1.0, comment="so \ud800", evidence="\udfff")])
    talk = Talk(pool)
    async with running(worker_of(pool, scorer)):
        first = talk.step([user("q")], said("a"), run="r1")
        talk.step([user("q"), said("a"), user("x")], said("b"), run="r2", parent=first)
        await until(lambda: bool(kept_signals(pool)))
    assert {(signal.comment, signal.evidence) for signal in kept_signals(pool)} == {("so ?", "?")}
    assert len(scorer.seen) == 1


async def test_a_trajectory_that_went_on_after_it_was_judged_has_the_later_word_too(pool: Pool) -> None:
    says = iter([-1.0, 1.0])
    scorer = Noting(lambda case: [Verdict(value=next(says))], name="exact", moments=frozenset({Moment.ENDED}))
    talk = Talk(pool, "t")
    async with running(worker_of(pool, scorer, idle_s=0.0)):
        first = talk.step([user("q")], said("a"), run="r1", trajectory_id="t")
        await until(lambda: len(kept_signals(pool, "t")) == 1)
        later = [user("q"), said("a"), user("x")]
        talk.step(later, said("b"), run="r1", parent=first, trajectory_id="t")
        await until(lambda: len(kept_signals(pool, "t")) == 2)
    assert sorted(signal.value for signal in kept_signals(pool, "t")) == [-1.0, 1.0]

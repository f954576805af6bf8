"""Learning in a process of its own: it ends when it must, and what was kept is gone on from."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from clawloop_edge.errors import LearnFailed, NotLearnable
from clawloop_edge.learn.child import Held, Kept
from clawloop_edge.learn.learner import MlxLearner, _Heard, _Saver
from clawloop_edge.learn.opening import open_job
from clawloop_edge.learn.updates import Progress

from .home_jobs import a_job, finish


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_killed_process_is_told_and_its_state_is_gone_on_from_bit_for_bit(random_model: Path) -> None:
    job, learner, kept = a_job(random_model, updates=50), MlxLearner(), list[bytes]()

    def keep(state: bytes) -> None:
        kept.append(state)
        assert learner.pid is not None
        if len(kept) == 1:
            os.kill(learner.pid, signal.SIGKILL)

    with pytest.raises(LearnFailed, match=r"was ended by SIGKILL in update \d+; try again"):
        learner.learn(job, go_on=lambda: True, keep=keep)
    assert kept
    assert learner.pid is None
    after = learner.learn(job, go_on=lambda: True, kept=kept[-1])
    assert after == finish(open_job(job, kept=b"", memory_bytes=0)).result()


def test_it_stops_when_it_is_told_to_and_leaves_no_process(random_model: Path) -> None:
    job, learner, pids = a_job(random_model, updates=10_000), MlxLearner(), list[int | None]()
    job = msgspec.structs.replace(job, max_updates=10_000)
    asked: list[float] = []

    def go_on() -> bool:
        if not pids:
            return True
        asked.append(time.monotonic())
        return False

    assert learner.learn(job, go_on=go_on, keep=lambda _: pids.append(learner.pid)) is None
    assert time.monotonic() - asked[0] < 5  # it is ended by force, which takes some milliseconds
    assert pids[0] is not None
    assert is_gone(pids[0])


def test_more_memory_than_it_may_have_ends_it_with_the_number(random_model: Path) -> None:
    job = msgspec.structs.replace(a_job(random_model), max_memory_bytes=20_000_000)
    with pytest.raises(LearnFailed, match=r"20000000.*max_memory_bytes"):
        MlxLearner().learn(job, go_on=lambda: True)


def test_a_job_that_cannot_be_done_says_why_and_nothing_of_what_was_said(random_model: Path) -> None:
    job = a_job(random_model)
    other = [msgspec.structs.replace(t, reward=float("nan")) for t in job.trajectories]
    with pytest.raises(LearnFailed, match="none of 6 trajectories can be learned from: no usable reward"):
        MlxLearner().learn(msgspec.structs.replace(job, trajectories=other), go_on=lambda: True)
    with pytest.raises(LearnFailed, match=r"config.json"):
        MlxLearner().learn(msgspec.structs.replace(job, model=Path("/nowhere")), go_on=lambda: True)


def test_while_a_state_is_being_kept_it_is_asked_on_and_memory_holds_two(random_model: Path) -> None:
    """A disk that takes its time neither holds up who calls nor makes states wait in memory."""
    job = msgspec.structs.replace(a_job(random_model, updates=10_000), max_updates=10_000)
    learner, free = MlxLearner(save_s=0.0), threading.Event()
    kept, seen, asked = list[bytes](), list[int](), list[bool]()

    def keep(state: bytes) -> None:
        kept.append(state)
        if len(kept) == 1:
            assert free.wait(60)

    def go_on() -> bool:
        if kept and len(set(seen)) > 12:  # it has got that much further while the first state is still being kept
            asked.append(free.is_set())
            free.set()
            return False
        return True

    assert learner.learn(job, go_on=go_on, keep=keep, told=seen.append) is None
    assert asked == [False], "it was asked while the first was being kept"
    assert len(kept) == 2, "the others were passed over, but for the last"
    first, last = (msgspec.msgpack.decode(state, type=Progress).at_update for state in kept)
    assert first < 5
    assert last >= max(seen) - 1
    assert len(open_job(job, kept=kept[-1], memory_bytes=0).progress.updates) == last


def test_only_the_latest_state_is_held() -> None:
    heard, kept = _Heard(), list[bytes]()
    for number in range(50):
        heard.put(Kept(bytes(1000 + number)))
        heard.put(Held(number, number))
    assert heard.held_bytes == 1049
    assert heard.take(0.0) == [Kept(bytes(1049)), Held(49, 49)]
    heard.put(None)
    assert heard.take(0.0) == heard.take(0.0) == [None]
    saver = _Saver(kept.append, every_s=60.0)
    for number in range(5):
        saver.offer(bytes(number))
        saver.look(float(number))
    assert saver.held_bytes >= 4
    saver.finish(last=True)
    assert kept == [bytes(0), bytes(4)], "the first, and the last; the rest within a minute is passed over"
    assert saver.held_bytes == 0


def test_what_keeping_a_state_raised_is_heard() -> None:
    def keep(state: bytes) -> None:
        raise RuntimeError("no such key")

    saver = _Saver(keep, every_s=0.0)
    saver.offer(b"state")
    saver.look(0.0)
    with pytest.raises(RuntimeError, match="no such key"):
        saver.finish(last=False)


def test_a_task_whose_numbers_break_learning_is_given_up_at_once(random_model: Path) -> None:
    job = a_job(random_model, reward_low=0.5, reward_high=0.5)
    with pytest.raises(NotLearnable, match="ZeroDivisionError at"):
        MlxLearner().learn(job, go_on=lambda: True)


PARENT = """
import sys
from pathlib import Path
import msgspec
from clawloop_edge.learn.child import decode_begin
from clawloop_edge.learn.learner import MlxLearner
job, learner = decode_begin(Path(sys.argv[1]).read_bytes()).job, MlxLearner()
learner.learn(job, go_on=lambda: True, keep=lambda _: print(learner.pid, flush=True))
"""


def test_it_ends_with_its_parent_and_has_none_of_its_secrets(random_model: Path, tmp_path: Path) -> None:
    from clawloop_edge.learn.child import Begin, encode

    job = msgspec.structs.replace(a_job(random_model, updates=10_000), max_updates=10_000)
    (tmp_path / "job").write_bytes(encode(Begin(job, b"", 0)))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "job")]
    environment = os.environ | {"CLAWLOOP_PASSPHRASE": "of the pool"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert "CLAWLOOP_PASSPHRASE" not in psutil.Process(pid).environ()
        assert psutil.Process(pid).nice() >= 10
        parent.kill()
    deadline = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(pid)

"""Learning in a process of its own: it ends when it must, and what was kept is gone on from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from clawloop_edge.errors import LearnFailed
from clawloop_edge.learn.learner import MlxLearner
from clawloop_edge.learn.opening import open_job

from .home_jobs import a_job, finish


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_killed_process_is_told_and_its_state_is_gone_on_from_bit_for_bit(random_model: Path) -> None:
    job, learner, kept = a_job(random_model), MlxLearner(), list[bytes]()

    def keep(state: bytes) -> None:
        kept.append(state)
        assert learner.pid is not None
        os.kill(learner.pid, signal.SIGKILL)

    with pytest.raises(LearnFailed, match=r"was ended by SIGKILL in update \d; try again"):
        learner.learn(job, go_on=lambda: True, keep=keep)
    assert kept
    assert learner.pid is None
    after = learner.learn(job, go_on=lambda: True, kept=kept[0])
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

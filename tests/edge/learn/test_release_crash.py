"""kill -9 between any two steps of a run: what was begun goes on, nothing leaves twice, and the ledger counts at most
one release too many."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.counting import EntryState
from clawloop_shared.levels import Level

from .learning_device import KEY, LearningDevice, learn_task

POINTS = ("begun", "learning", "learned", "queued", "marked")
CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("learning_device", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["learning_device"] = module
spec.loader.exec_module(module)
device, point = module.LearningDevice(Path(sys.argv[2])), sys.argv[3]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

learn, release = device.learner.learn, device.releaser.release

def learned(job, **how):
    if point == "begun":
        die()
    found = learn(job, **how)
    if point == "learned":
        die()
    return found

def released(run, what):
    found = release(run, what)
    if point == "queued":
        die()
    return found

device.learner.wait = lambda update: die() if point == "learning" and update == 2 else None
device.learner.learn, device.releaser.release = learned, released
device.schedule.tick()
(item,) = device.outbox.list()
device.outbox.mark_sent([item.item_id])
die()
"""


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_loses_nothing_sends_nothing_twice_and_is_counted_once(tmp_path: Path, point: str) -> None:
    device = LearningDevice(tmp_path)
    device.set_level(Level.PRIVATE_DELTAS)
    device.keep_many(2)
    assert device.desk.offered(learn_task()).accepted
    device.close()
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    helper = Path(__file__).with_name("learning_device.py")
    command = [sys.executable, str(script), str(helper), str(tmp_path), point]
    ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    device = LearningDevice(tmp_path)
    left_before = [item.item_id for item in device.outbox.list()]
    assert bool(left_before) == (point in ("queued", "marked"))
    device.schedule.tick()
    assert device.learner.resumed == {"begun": [b""], "learning": [b"2"], "learned": [b"3"]}.get(point, [])
    (item,) = device.outbox.list()
    given, _ = device.outbox.next_items(1 << 20)
    assert [each.item_id for each in given] == [item.item_id]
    device.outbox.mark_sent([item.item_id])
    hashes = {entry.sha256 for entry in AuditLog(device.pool).entries() if entry.kind == "sent"}
    assert hashes == {item.sha256}, "what is sent again is the same"
    with device.pool.read() as database:
        states = [row[0] for row in database.conn.execute("SELECT state FROM ledger")]
    assert states == [EntryState.RELEASED]
    assert device.ledger.spent("line").releases == 1
    assert device.pool.verify().ok
    device.close()


def test_a_run_whose_files_are_damaged_begins_anew_and_gives_its_release_back(tmp_path: Path) -> None:
    device = LearningDevice(tmp_path)
    device.set_level(Level.PRIVATE_DELTAS)
    device.keep_many(2)
    device.desk.offered(learn_task())
    device.learner.wait = lambda update: setattr(device, "idle_s", 0.0) if update == 1 else None
    device.schedule.tick()
    (tmp_path / "learning" / "job.sealed").write_bytes(b"damaged")
    device.idle_s, device.learner.wait = 1e9, lambda _: None
    device.schedule.tick()
    assert device.outbox.list() == []
    assert "cannot be read" in device.runs.history()[-1].reason
    assert device.ledger.spent("line").releases == 0
    device.schedule.tick()
    assert len(device.outbox.list()) == 1
    device.close()
    with Pool.open(tmp_path, KnownKey.of(KEY)) as pool:
        assert pool.verify().ok

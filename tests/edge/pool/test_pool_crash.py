"""kill -9 at any moment loses nothing that was acknowledged, and leaves a whole pool."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.outbox import Outbox

KILLS = 20

WRITER = """
import os, sys
from pathlib import Path
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared.database import sqlcipher
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy, Sampling, Step

sqlcipher()
import sqlite_utils  # imported once, before the forks


def make(session, said, ids, parent):
    step = Step(
        step_id=new_step_id(), session_id=session, run_id="run", prompt_ids=ids, response_ids=[5, 6],
        response_logprobs=[-0.5, -0.5], policy=Policy(line="line"), sampling=Sampling(), finish_reason="stop",
        created_ms=1, parent_id=parent,
    )
    reply = {"role": "assistant", "content": "yes"}
    return KeptStep(step=step, messages=said, reply=reply, started_ms=1, finished_ms=2)


def write(folder, key, session):
    pool = Pool.open(folder, key, writer=True)
    pool.submit(lambda db: db.execute("PRAGMA wal_autocheckpoint = 20")).result()  # so that kills hit checkpoints too
    consent = ConsentLog(pool)
    if not consent.receipts():
        consent.set_level(Level.FULL)
    outbox = Outbox(pool, consent, hold_s=0)
    said, ids, parent = [], [1], ""
    while True:
        waiting = []
        for _ in range(5):
            said = [*said[-20:], {"role": "user", "content": "word " * 300 + new_step_id()}]
            kept = make(session, said, [*ids[-500:], len(ids)], parent)
            waiting.append((kept.step.step_id, pool.keep_step(kept)))
            parent, ids, said = kept.step.step_id, kept.step.token_ids, [*said, kept.reply]
        for step_id, future in waiting:
            future.result()
            os.write(1, f"kept {step_id}\\n".encode())
        outbox.fill()
        outbox.mark_sent([item.item_id for item in outbox.next_items(1 << 20)[0]][-1:])


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        write(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), line.strip())
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead -\\n")
"""


def kill_a_writer(server: "subprocess.Popen[str]", session: str, *, after: int) -> list[str]:
    """Start a writer, kill -9 it once it acknowledged `after` steps; gives all the ids it acknowledged."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{session}\n")
    server.stdin.flush()
    acknowledged, pid, killed = list[str](), 0, False
    for line in server.stdout:
        kind, value = line.split()
        if kind == "dead":
            break
        if kind == "pid":
            pid = int(value)
        else:
            acknowledged.append(value)
        if pid and len(acknowledged) >= after and not killed:
            os.kill(pid, signal.SIGKILL)
            killed = True
    assert killed, "the writer ended by itself"
    return acknowledged


def test_twenty_kills_lose_no_acknowledged_step(tmp_path: Path, key: bytes) -> None:
    chance, acknowledged = random.Random(4), list[str]()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path), key.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as server:
        for number in range(KILLS):
            acknowledged += kill_a_writer(server, f"session-{number}", after=chance.randrange(1, 60))
        assert server.stdin is not None
        server.stdin.close()
    check_pool(tmp_path, key, acknowledged=acknowledged)


def check_pool(folder: Path, key: bytes, *, acknowledged: list[str]) -> None:
    """Everything acknowledged is there, everything there opens, and no step is in two items of the outbox."""
    with Pool.open(folder, key, writer=True) as pool:
        kept = pool.step_ids()
        assert set(acknowledged) <= set(kept)
        report = pool.verify()
        assert report.problems == []
        assert report.steps == len(kept)
        assert AuditLog(pool).verify() > 0
        outbox = Outbox(pool, hold_s=0)
        outbox.fill()
        with pool.read() as database:
            twice = "SELECT record_id FROM outbox_records GROUP BY record_id HAVING count(*) > 1"
            assert database.execute(twice).fetchall() == []
            assert database.execute("SELECT count(*) FROM outbox_records").fetchone()[0] == len(kept)
        assert all(outbox.get(item.item_id).body for item in outbox.list())

"""kill -9 while something is forgotten: all of it is gone or none of it, and who opens the pool next finishes it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from clawloop_edge.pool.finishing import unfinished
from clawloop_edge.pool.keys import FileKeyStore
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool

KILLS = 20
STEPS = 12

FORGETTER = """
import os, signal, sys
from pathlib import Path
from clawloop_edge.pool import rotate, search  # imported once, before the forks
from clawloop_edge.pool.finishing import finish
from clawloop_edge.pool.keys import FileKeyStore
from clawloop_edge.pool.store import Pool
from clawloop_shared.database import engine

engine()
import sqlite_utils


def forget(home, key_file, session):
    pool = Pool.open(home, FileKeyStore(key_file))
    os.write(1, b"begin\\n")
    pool.submit(lambda database: pool.forgetting.forget(database, [session])).result()
    finish(pool)
    os.write(1, b"done\\n")
    signal.pause()


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        forget(Path(sys.argv[1]), Path(sys.argv[2]), line.strip())
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def kill_in_mid_forgetting(server: "subprocess.Popen[str]", session: str, *, after_s: float) -> bool:
    """Have a process forget a session and kill it `after_s` later; whether it had told that it was done."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{session}\n")
    server.stdin.flush()
    pid, lines = 0, list[str]()
    for line in server.stdout:
        lines.append(line.strip())
        if line.startswith("pid"):
            pid = int(line.split()[1])
        if pid and "begin" in lines and "killed" not in lines:
            time.sleep(after_s)  # the moment of death, not a wait for anything
            os.kill(pid, signal.SIGKILL)
            lines.append("killed")
        if line == "dead\n":
            break
    return "done" in lines


def traces(pool: Pool, session: str) -> dict[str, int]:
    """How many rows each table has of a session."""
    counts = {
        "sessions": "SELECT count(*) FROM sessions WHERE session_id = ?",
        "steps": "SELECT count(*) FROM steps WHERE session_id = ?",
        "lookups": "SELECT count(*) FROM lookups JOIN steps USING (seq) WHERE session_id = ?",
        "keys": "SELECT count(*) FROM keys WHERE scope = 'session/' || ?",
        "changes": "SELECT count(*) FROM changes WHERE session_id = ?",
    }
    with pool.read() as database:
        return {name: database.conn.execute(query, (session,)).fetchone()[0] for name, query in counts.items()}


def test_twenty_kills_leave_never_half_a_forgetting(tmp_path: Path, make_kept: Callable[..., KeptStep]) -> None:
    home, store, chance = tmp_path / "home", FileKeyStore(tmp_path / "key"), random.Random(7)
    with Pool.open(home, store) as pool:
        for number in range(KILLS):
            for _ in range(STEPS):
                kept = make_kept(session=f"s{number}", words="what was said " * 100)
                pool.keep_step(kept, index={"reply": kept.step.step_id.encode()})
    whole = {"sessions": 1, "steps": STEPS, "lookups": STEPS, "keys": 1, "changes": STEPS}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORGETTER, str(home), str(store.path)]
    gone = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as server:
        for number in range(KILLS):
            done = kill_in_mid_forgetting(server, f"s{number}", after_s=chance.uniform(0, 0.04))
            with Pool.open(home, store, writer=True) as pool:
                assert unfinished(pool) == ()
                found = traces(pool, f"s{number}")
                assert found == whole or (not any(found.values()))
                with pool.read() as database:
                    forgotten = pool.tombstones.forgotten_sessions(database, [f"s{number}"])
                assert bool(forgotten) == (not found["steps"])
                assert forgotten or not done
                gone += bool(forgotten)
        assert server.stdin is not None
        server.stdin.close()
    with Pool.open(home, store, writer=True) as pool:
        assert pool.verify().problems == []
        assert pool.stats().sessions == KILLS - gone

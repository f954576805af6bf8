"""`python -m pool_torture`: kill -9 at random moments while the pool is written, its key rotated, sessions forgotten,
and a backup restored; after each kill the pool is opened and compared with all that was acknowledged.

Exit code 1 if an acknowledged step is lost, anything does not verify, or a session is half forgotten.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from clawloop_edge.pool import backup, finishing, restore, rotate
from clawloop_edge.pool.keys import FileKeyStore
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import in_silence
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.returning import adopt
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy, Sampling, Step

VERIFY_EVERY = 10
_STEPS_AT_ONCE = 5
_CHECKPOINT_PAGES = 20
"""so that kills hit checkpoints too"""
_ROOMS = restore.Rooms(adopt=adopt, mend=lambda *_: None)


def store_of(home: Path) -> FileKeyStore:
    """The key file of the home that is tortured."""
    return FileKeyStore(home / "pool.key")


def make_step(session: str, *, parent: KeptStep | None) -> KeptStep:
    """The next step of a conversation."""
    before = parent.step.token_ids[-500:] if parent else [1]
    step = Step(
        step_id=new_step_id(),
        session_id=session,
        run_id="run",
        prompt_ids=[*before, len(before)],
        response_ids=[5, 6],
        response_logprobs=[-0.5, -0.5],
        policy=Policy(line="line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
        parent_id=parent.step.step_id if parent else "",
    )
    said = [*parent.messages[-20:], parent.reply] if parent else []
    asked = {"role": "user", "content": "word " * 300 + step.step_id}
    reply = {"role": "assistant", "content": "yes"}
    return KeptStep(step=step, messages=[*said, asked], reply=reply, started_ms=1, finished_ms=2)


# What the processes do that are killed. Each line that they print tells of something that is on the disk.


def tell(*words: str) -> None:
    """One line, at once."""
    os.write(1, (" ".join(words) + "\n").encode())


def write(home: Path, session: str) -> None:
    """Keep steps without end, and have them go through the outbox."""
    pool = Pool.open(home, store_of(home), writer=True)
    pool.submit(lambda db: db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}").fetchall()).result()
    consent = ConsentLog(pool)
    if consent.state().chosen is not Level.FULL:
        consent.set_level(Level.FULL)
    outbox, parent = Outbox(pool, consent, hold_s=0), None
    while True:
        waiting = []
        for _ in range(_STEPS_AT_ONCE):
            parent = make_step(session, parent=parent)
            waiting.append((parent.step.step_id, pool.keep_step(parent)))
        for step_id, future in waiting:
            future.result()
            tell("kept", step_id)
        outbox.fill()
        outbox.mark_sent([item.item_id for item in outbox.next_items(1 << 20)[0]][-1:])
        pool.anchor()


def turn_key(home: Path, session: str) -> None:
    """Rotate the key without end, keeping steps between."""
    pool = Pool.open(home, store_of(home), writer=True)
    while True:
        kept = make_step(session, parent=None)
        pool.keep_step(kept).result()
        tell("kept", kept.step.step_id)
        tell("rotated", str(rotate.rotate(pool).version))


def forget(home: Path, session: str) -> None:
    """Forget a session, and all that remains to be done then; after it the key is rotated on."""
    pool = Pool.open(home, store_of(home))
    adopt(pool)
    pool.submit(lambda database: pool.forgetting.forget(database, [session])).result()
    tell("forgot", session)
    finishing.finish(pool)
    while True:
        tell("rotated", str(rotate.rotate(pool).version))


def put_back(home: Path, session: str) -> None:
    """Take a backup and restore it without end; since nothing is kept between, nothing may be lost."""
    file = home.with_name("torture.backup")
    while True:
        file.unlink(missing_ok=True)
        with Pool.open(home, store_of(home)) as pool:
            adopt(pool)
            backup.back_up(pool, file, seal=None, progress=in_silence)
        restore.restore(
            home,
            file,
            store=store_of(home),
            passphrase=lambda: "",
            replace=True,
            rooms=_ROOMS,
            progress=in_silence,
        )
        tell("restored", session)


class Work(NamedTuple):
    """Something that is done until death: that comes up to `longest_s` after one of the first `lines` that it told."""

    do: Callable[[Path, str], None]
    lines: int
    longest_s: float


WORKS = {
    "write": Work(write, 60, 0.03),
    "rotate": Work(turn_key, 8, 0.06),
    "forget": Work(forget, 3, 0.15),
    "restore": Work(put_back, 2, 0.5),
}


def serve(home: Path) -> None:
    """For each line of stdin, a work and a session, fork a process that does it; modules are loaded once for all."""
    import sqlite_utils  # noqa: F401

    from clawloop_edge.pool import search  # noqa: F401

    for line in sys.stdin:
        work, session = line.split()
        child = os.fork()
        if child == 0:
            tell("begin")
            WORKS[work].do(home, session)
        tell("pid", str(child))
        os.waitpid(child, 0)
        tell("dead")


# What is watched, and compared.


class Found(Counter[str]):
    """What the kills have brought to light: kills of each work, and `lost`, `corrupt`, `half`; all others are facts."""

    @property
    def faults(self) -> int:
        return self["lost"] + self["corrupt"] + self["half"]


class Torture:
    """A home, what was acknowledged in it, and the process that is killed again and again."""

    def __init__(self, home: Path, server: subprocess.Popen[str], *, seed: int) -> None:
        self._home, self._server, self._chance = home, server, random.Random(seed)
        self._kept: dict[str, list[str]] = {}
        self._forgotten: set[str] = set()
        self.found = Found()
        self.problems: list[str] = []

    def run(self, kills: int, *, progress: Callable[[int], None]) -> None:
        """Kill so many times, each work in its turn, and look at the pool after each."""
        for number in range(kills):
            work = list(WORKS)[number % len(WORKS)]
            session = self._victim() if work == "forget" else f"session-{number}"
            self._kill_one(work, session)
            self.found[work] += 1
            self.compare(work, session, whole=(number + 1) % VERIFY_EVERY == 0 or number == kills - 1)
            progress(number + 1)

    def acknowledged(self) -> list[str]:
        """The steps that must be there."""
        return [each for name, ids in self._kept.items() if name not in self._forgotten for each in ids]

    def _victim(self) -> str:
        return self._chance.choice(sorted(set(self._kept) - self._forgotten) or ["nobody"])

    def _kill_one(self, work: str, session: str) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{work} {session}\n")
        self._server.stdin.flush()
        pid, lines, killed = 0, 0, False
        wanted = self._chance.randint(1, WORKS[work].lines)
        for line in self._server.stdout:
            word, _, value = line.strip().partition(" ")
            if word == "pid":
                pid = int(value)
            elif word == "dead":
                break
            else:
                lines += 1
                self._note(word, value, session=session)
            if pid and lines >= wanted and not killed:
                time.sleep(self._chance.uniform(0, WORKS[work].longest_s))  # the moment of death
                os.kill(pid, signal.SIGKILL)
                killed = True
        if not killed:
            self.problems.append(f"{work} ended by itself; see its trace above")
            self.found["corrupt"] += 1

    def _note(self, word: str, value: str, *, session: str) -> None:
        self.found[word] += 1
        if word == "kept":
            self._kept.setdefault(session, []).append(value)
        elif word == "forgot":
            self._forgotten.add(session)

    def compare(self, work: str, session: str, *, whole: bool) -> None:
        """Open the pool as the next edge would, and see that it is what was acknowledged."""
        with Pool.open(self._home, store_of(self._home), writer=True) as pool:
            adopt(pool)
            here = set(pool.step_ids())
            if work == "forget":
                self._settle_forgetting(session, here)
            for name, step_ids in self._kept.items():
                lost = [] if name in self._forgotten else [each for each in step_ids if each not in here]
                if lost:
                    self._fault("lost", f"{len(lost)} steps of {name} after a kill of {work}")
            keys = store_of(self._home).load()
            with pool.read() as database:
                versions = {row[0] for row in database.execute("SELECT kek FROM keys UNION SELECT kek FROM pool")}
            if set(keys.keks) != versions:
                self._fault("corrupt", f"keys {sorted(keys.keks)} for {sorted(versions)} after a kill of {work}")
            if finishing.unfinished(pool):
                self._fault("half", f"a forgetting is unfinished after a kill of {work}")
            if whole:
                self._verify(pool)

    def _settle_forgetting(self, session: str, here: set[str]) -> None:
        steps = self._kept.get(session, [])
        left = [each for each in steps if each in here]
        if left and (session in self._forgotten or len(left) < len(steps)):
            self._fault("half", f"{len(left)} of {len(steps)} steps of {session} are left")
        elif steps and not left:
            self._forgotten.add(session)

    def _verify(self, pool: Pool) -> None:
        self.found["verified"] += 1
        for problem in pool.verify().problems:
            self._fault("corrupt", problem)
        AuditLog(pool).verify()
        twice = "SELECT record_id FROM outbox_records GROUP BY record_id HAVING count(*) > 1"
        with pool.read() as database:
            for (record_id,) in database.execute(twice):
                self._fault("corrupt", f"{record_id} is in two items of the outbox")

    def _fault(self, kind: str, problem: str) -> None:
        self.found[kind] += 1
        self.problems.append(problem)


@contextmanager
def torturing(home: Path, *, seed: int) -> Iterator[Torture]:
    """A home to torture, and the process for it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pool_torture", "--serve", str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as server:
        yield Torture(home, server, seed=seed)
        assert server.stdin is not None
        server.stdin.close()


def main() -> int:
    """See the module. 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/torture")
    parser.add_argument("kills", type=int, nargs="?", default=200, help="how many times (200)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (the time)")
    parser.add_argument("--serve", metavar="HOME", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, torturing(Path(folder) / "home", seed=chosen.seed) as torture:
        torture.run(chosen.kills, progress=lambda done: print(f"\r{done} of {chosen.kills}", end="", flush=True))
        found = torture.found
    print(f"\nseed {chosen.seed}, {time.monotonic() - started:.0f} s")
    print("kills: " + ", ".join(f"{found[work]} of {work}" for work in WORKS))
    print(f"acknowledged: {found['kept']} steps, {found['forgot']} forgettings, {found['restored']} restores")
    print(f"lost {found['lost']}, corrupt {found['corrupt']}, half forgotten {found['half']}")
    for problem in torture.problems:
        print(problem)
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())

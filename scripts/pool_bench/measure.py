"""What is measured of a pool: inserts and commits beside a plain database, a session's bytes, a long fill, reads."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec
import psutil
import zstandard

from clawloop_edge.pool.codec import to_json
from clawloop_edge.pool.keys import DATABASE_NAME, KnownKey
from clawloop_edge.pool.packing import ids_to_seal, pack_floats, pack_ids
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from pool_bench.openclaw import Agent, raw_request
from pool_bench.plain import Plain

BATCH = 256
LONG_BATCH = 16
"""of steps with prompts of 15,000 tokens, of which the pool lets no more than 64 MiB wait"""
PLAIN, UNSEALED, POOL = "plain", "the pool's code, nothing sealed", "the pool"
"""the contenders"""
KEY = KnownKey.of(bytes(range(32)))


@dataclass(frozen=True)
class Inserts:
    """Of one contender: steps a second and CPU of the process a step (µs) by the round; commits of one step (ms)."""

    name: str
    rates: list[float]
    cpu_us: list[float]
    commits_ms: list[float]


@contextmanager
def folder_in(place: Path) -> Iterator[Path]:
    """A fresh folder, removed at the end."""
    made = Path(tempfile.mkdtemp(prefix="bench-pool-", dir=place))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def tag_of(kept: KeptStep) -> bytes:
    """A value that a step is found by."""
    return hashlib.sha256(kept.step.step_id.encode()).digest()


def keep_all(pool: Pool, steps: Sequence[KeptStep], *, batch: int = BATCH) -> None:
    """Keep steps as fast as the pool takes them, two batches at a time; returns once all are on disk."""
    before: list[Future[None]] = []
    for start in range(0, len(steps), batch):
        futures = [pool.keep_step(kept, index={"reply": tag_of(kept)}) for kept in steps[start : start + batch]]
        for future in reversed(before):  # the last first: it is written last
            future.result()
        before = futures
    for future in reversed(before):
        future.result()


def pool_inserts(folder: Path, steps: Sequence[KeptStep], singles: Sequence[KeptStep], *, name: str = POOL) -> Inserts:
    """One round of the pool, as it is in this process."""
    with Pool.open(folder, KEY) as pool:
        rate, cpu = _timed(lambda: keep_all(pool, steps), len(steps))
        commits = [_wall_ms(partial(_keep_one, pool, kept)) for kept in singles]
    return Inserts(name, [rate], [cpu], commits)


def unsealed_inserts(folder: Path, *, seed: int, steps: int, singles: int) -> Inserts:
    """One round of the pool's code with nothing sealed, in a process of its own."""
    command = [sys.executable, "-m", "pool_bench.unsealed", *map(str, (seed, steps, singles)), str(folder)]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return msgspec.json.decode(output, type=Inserts)


def _keep_one(pool: Pool, kept: KeptStep) -> None:
    pool.keep_step(kept, index={"reply": tag_of(kept)}).result()


def plain_inserts(
    folder: Path, steps: Sequence[KeptStep], singles: Sequence[KeptStep], *, tables: Sequence[str]
) -> Inserts:
    """One round of a plain database."""
    plain = Plain(folder / "plain.db", tables)

    def fill() -> None:
        for start in range(0, len(steps), BATCH):
            group = steps[start : start + BATCH]
            plain.keep(group, [tag_of(kept)[:16] for kept in group])

    rate, cpu = _timed(fill, len(steps))
    commits = [_wall_ms(partial(plain.keep, [kept], [tag_of(kept)[:16]])) for kept in singles]
    plain.close()
    return Inserts(PLAIN, [rate], [cpu], commits)


def joined(rounds: Sequence[Inserts]) -> Inserts:
    """The rounds of one contender as one."""
    return Inserts(
        rounds[0].name,
        [rate for each in rounds for rate in each.rates],
        [cpu for each in rounds for cpu in each.cpu_us],
        [commit for each in rounds for commit in each.commits_ms],
    )


@dataclass(frozen=True)
class Session:
    """What a session takes, in bytes.

    `raw`: its requests' JSON. `sealed` and `file`: what it adds to a pool's payload and to its file; `again`: what the
    next session of the same agent adds to the file. `prompt`: its last prompt alone, packed; `new`: what its calls say
    and get beyond that, each packed by itself.
    """

    calls: int
    raw: int
    sealed: int
    file: int
    again: int
    prompt: int
    new: int


def session_bytes(folder: Path, agent: Agent, calls: int) -> Session:
    """What a session of an agent takes in an empty pool."""
    steps = list(agent.session(calls))
    with Pool.open(folder, KEY) as pool:
        before = _file_bytes(pool)
        keep_all(pool, steps, batch=LONG_BATCH)
        sealed, once = pool.stats().payload_bytes, _file_bytes(pool)
        keep_all(pool, list(agent.session(calls)), batch=LONG_BATCH)
        twice = _file_bytes(pool)
        report = pool.verify()
    if not report.ok:
        raise RuntimeError(f"the pool is not whole: {report.problems}")
    return Session(
        calls=calls,
        raw=sum(len(raw_request(kept)) for kept in steps),
        sealed=sealed,
        file=once - before,
        again=twice - once,
        prompt=_prompt_bytes(steps[-1]),
        new=sum(_new_bytes(kept) for kept in steps),
    )


def _prompt_bytes(kept: KeptStep) -> int:
    parts = (to_json(kept.messages), to_json(kept.tools), ids_to_seal(pack_ids(kept.step.prompt_ids)))
    return sum(len(zstandard.compress(part, 3)) for part in parts)


def _new_bytes(kept: KeptStep) -> int:
    """The message that moves on, the reply in text and tokens, and the facts of a call, as one packed record."""
    step = kept.step
    numbers = ids_to_seal(pack_ids(step.response_ids)) + pack_floats(step.logprobs)
    facts = (step.step_id, step.run_id, step.parent_id, kept.started_ms, kept.first_token_ms, kept.finished_ms)
    said = to_json([kept.messages[-1], kept.reply, kept.text, facts])
    return len(zstandard.compress(numbers + said, 3))


def _file_bytes(pool: Pool) -> int:
    """The database without its log, which is copied into it first."""
    if not pool.cut_log():
        raise RuntimeError("the log could not be copied: somebody reads")
    return (pool.folder / DATABASE_NAME).stat().st_size


@dataclass(frozen=True)
class Mark:
    """How a long fill went so far."""

    steps: int
    seconds: float
    rss_mib: float


def fill(pool: Pool, steps: Iterator[KeptStep], count: int, *, marks: int, told: Callable[[Mark], None]) -> list[Mark]:
    """Keep `count` steps, and tell `marks` times how it goes. What is to be kept is made meanwhile, in this process."""
    found: list[Mark] = []
    done, started = 0, time.perf_counter()
    for number in range(1, marks + 1):
        upto = count * number // marks
        while done < upto:
            batch = list(islice(steps, min(4 * BATCH, upto - done)))
            keep_all(pool, batch)
            done += len(batch)
        found.append(Mark(done, time.perf_counter() - started, rss_mib()))
        told(found[-1])
    return found


@dataclass(frozen=True)
class Read:
    """How long a question takes (ms)."""

    name: str
    times_ms: list[float]

    def quantile(self, share: float) -> float:
        """The time within which `share` of them were answered."""
        return sorted(self.times_ms)[min(len(self.times_ms) - 1, int(share * len(self.times_ms)))]


def reads(pool: Pool, sessions: Sequence[str], *, steps: int, count: int) -> list[Read]:
    """`count` questions of each kind, each on a snapshot of its own; `sessions` are those of many calls."""
    chance = random.Random(7)
    last = pool.stats().last_seq
    newest = pool.sessions(1)[0].last_ms
    ids = [_step_at(pool, chance.randrange(1, last)) for _ in range(count)]
    deep = [pool.session_steps(session)[-1].step.step_id for session in sessions]

    def page() -> None:
        with pool.reading() as reading:
            assert len(reading.steps_page(50, chance.randrange(51, last + 1))) == 50

    def transcript() -> None:
        with pool.reading() as reading:
            assert list(reading.transcript(chance.choice(sessions)))

    questions: dict[str, Callable[[], object]] = {
        "a page of 50 steps": page,
        "a page of 50 sessions": lambda: pool.sessions(50, newest - chance.randrange(max(1, steps - 1000))),
        "a transcript": transcript,
        "one step": lambda: pool.get_step(chance.choice(ids)),
        "one step, the last of a long session": lambda: pool.get_step(chance.choice(deep)),
    }
    return [Read(name, [_wall_ms(ask) for _ in range(count)]) for name, ask in questions.items()]


def rss_mib() -> float:
    """What this process holds in memory now."""
    rss: int = psutil.Process().memory_info().rss
    return rss / (1 << 20)


def _step_at(pool: Pool, seq: int) -> str:
    with pool.reading() as reading:
        return reading.steps_page(1, seq + 1)[0].step_id


def _timed(work: Callable[[], None], count: int) -> tuple[float, float]:
    """How many a second, and the CPU of this process for each (µs)."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1e6


def _wall_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3

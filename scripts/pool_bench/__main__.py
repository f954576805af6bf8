"""`python -m pool_bench`: what keeping and reading steps costs, beside plain SQLite with the same tables, in one run.

Exit code 0 if everything kept is whole, 1 otherwise; speed has no part in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from clawloop_edge.pool.store import Pool
from pool_bench import measure
from pool_bench.measure import PLAIN, POOL, UNSEALED, Inserts, Mark, Read, Session
from pool_bench.openclaw import Agent
from pool_bench.plain import tables_of_a_pool
from pool_bench.steps import Words, small_steps

_ROUND_STEPS, _ROUND_SINGLES = 5_000, 150
_LONG_SESSIONS = 5
_MARKS = 10
console = Console(width=120, highlight=False)


def main() -> int:
    """Measure and print; 0 if all was right."""
    parser = argparse.ArgumentParser(prog="scripts/bench-pool", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of inserts, each contender once in each (5)")
    parser.add_argument("--steps", type=int, default=20_000, help="steps in the pool that is read (20,000)")
    parser.add_argument("--session", type=int, default=200, help="calls of a session as OpenClaw has it (200)")
    parser.add_argument("--reads", type=int, default=200, help="questions of each kind (200)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on which disk")
    given = parser.parse_args()
    say_where()
    words = Words(1)
    show_inserts(inserts(given.folder, rounds=given.rounds))
    with measure.folder_in(given.folder) as folder:
        show_session(measure.session_bytes(folder, Agent(words), given.session))
    return long_pool(given.folder, words, steps=given.steps, calls=given.session, reads=given.reads)


def say_where() -> None:
    """The machine and the versions that the numbers are of."""
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    packages = ", ".join(f"{name} {version(name)}" for name in ("sqlcipher3", "cryptography", "zstandard"))
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load}; Python {platform.python_version()}, {packages}"
    )


def inserts(place: Path, *, rounds: int) -> list[Inserts]:
    """The contenders' rounds, taken in turns."""
    with measure.folder_in(place) as folder:
        tables = tables_of_a_pool(folder)
    found: dict[str, list[Inserts]] = {}
    for seed in range(rounds):
        made = list(small_steps(Words(seed), _ROUND_STEPS + _ROUND_SINGLES))
        steps, singles = made[:_ROUND_STEPS], made[_ROUND_STEPS:]
        for contender in (PLAIN, UNSEALED, POOL)[:: 1 if seed % 2 else -1]:
            with measure.folder_in(place) as folder:
                if contender == PLAIN:
                    one = measure.plain_inserts(folder, steps, singles, tables=tables)
                elif contender == POOL:
                    one = measure.pool_inserts(folder, steps, singles)
                else:
                    one = measure.unsealed_inserts(folder, seed=seed, steps=len(steps), singles=len(singles))
            found.setdefault(contender, []).append(one)
    return [measure.joined(found[contender]) for contender in (PLAIN, UNSEALED, POOL)]


def show_inserts(found: list[Inserts]) -> None:
    """A table of the contenders, and how the pool compares."""
    table = Table(title="inserts of 8 KB steps: median (best) of the rounds")
    for title in ("", "a second, in batches", "CPU a step, µs", "one by one: p50, p95 ms"):
        table.add_column(title, justify="left" if not title else "right")
    for each in found:
        commits = Read(each.name, each.commits_ms)
        table.add_row(
            each.name,
            f"{median(each.rates):,.0f} ({max(each.rates):,.0f})",
            f"{median(each.cpu_us):.0f} ({min(each.cpu_us):.0f})",
            f"{commits.quantile(0.5):.2f}, {commits.quantile(0.95):.2f}",
        )
    console.print(table)
    *others, pool = found
    for other in others:
        rates = [mine / its for mine, its in zip(pool.rates, other.rates, strict=True)]
        cpu = [its / mine for mine, its in zip(pool.cpu_us, other.cpu_us, strict=True)]
        over_ms = Read("", pool.commits_ms).quantile(0.5) - Read("", other.commits_ms).quantile(0.5)
        console.print(
            f"beside {other.name}: {median(rates):.2f}x the steps a second (best round {max(rates):.2f}),"
            f" {median(cpu):.2f}x by CPU (best {max(cpu):.2f}); a commit's p50 {over_ms:+.2f} ms"
        )


def show_session(found: Session) -> None:
    """What a session takes, and of what."""
    own = found.prompt + found.new
    console.print(f"\na session of {found.calls} calls, as OpenClaw has it")
    console.print(f"  requests in JSON {found.raw:,} bytes")
    console.print(f"  in the file {found.file:,} ({found.file / found.raw:.2%}); the next session {found.again:,}")
    console.print(f"  sealed payload {found.sealed:,} ({found.sealed / found.raw:.2%})")
    console.print(f"  last prompt packed {found.prompt:,} + new in its calls {found.new:,} = {own:,}")
    console.print(f"  payload / that {found.sealed / own:.2f}, file / that {found.file / own:.2f}")


def long_pool(place: Path, words: Words, *, steps: int, calls: int, reads: int) -> int:
    """Fill a pool, read it, and check some of it; 0 if it is whole."""
    agent = Agent(words)
    with measure.folder_in(place) as folder, Pool.open(folder, measure.KEY) as pool:
        sessions = []
        for _ in range(_LONG_SESSIONS):
            made = list(agent.session(calls))
            measure.keep_all(pool, made, batch=measure.LONG_BATCH)
            sessions.append(made[0].step.session_id)
        del made
        console.print(f"\na pool of {steps:,} steps of 8 KB, and {_LONG_SESSIONS} sessions of {calls} calls")
        marks = measure.fill(pool, small_steps(words, steps), steps, marks=_MARKS, told=show_mark)
        middle = marks[_MARKS // 2 - 1]
        console.print(f"  memory in the second half: {marks[-1].rss_mib - middle.rss_mib:+.1f} MiB")
        show_reads(measure.reads(pool, sessions, steps=steps, count=reads))
        stats = pool.stats()
        whole = stats.steps == steps + _LONG_SESSIONS * calls and stats.refused == 0
        console.print(
            f"  {stats.steps:,} steps kept in {stats.file_bytes / (1 << 20):,.0f} MiB; {stats.refused} refused"
        )
    return 0 if whole else 1


def show_mark(mark: Mark) -> None:
    """One line of progress."""
    rate = mark.steps / mark.seconds
    console.print(
        f"  {mark.steps:>9,} steps in {mark.seconds:6.1f} s ({rate:,.0f}/s, made here too), {mark.rss_mib:.0f} MiB"
    )


def show_reads(found: list[Read]) -> None:
    """A table of questions."""
    table = Table(title="reads, ms")
    for title in ("", "p50", "p95", "slowest"):
        table.add_column(title, justify="left" if not title else "right")
    for each in found:
        table.add_row(each.name, *(f"{each.quantile(share):.1f}" for share in (0.5, 0.95, 1.0)))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

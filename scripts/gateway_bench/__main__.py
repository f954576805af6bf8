"""`python -m gateway_bench`: what our gateway adds to a fixed upstream, beside others, in one run.

Exit code 0 if every answer was right and ours kept them all, 1 otherwise; speed has no part in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from demoworld.stage import Part, StageError
from gateway_bench import contenders as start
from gateway_bench.contenders import Contender
from gateway_bench.measure import PHASES, Batch, Phase, load, rss_mib
from gateway_bench.report import BASE, Kept, Memory, Report, Row, make_row, show, targets_of

WIDTH = 150
COURSE_STEPS = 10
"""how often memory is read in the long run"""


@dataclass(frozen=True)
class Plan:
    """How much is measured. `limit_s` bounds one phase of one round, and each tenth of the long run."""

    rounds: int = 4
    scale: float = 1.0
    long_run: int = 10_000
    limit_s: float = 10.0

    @property
    def phases(self) -> list[Phase]:
        """The phases of a round."""
        return [replace(phase, count=max(phase.at_once, round(phase.count * self.scale))) for phase in PHASES]


QUICK = Plan(rounds=1, scale=0.04, long_run=200, limit_s=5.0)
WARM_UP = Phase("warm up", 100, at_once=4), Phase("warm up", 40, at_once=4, stream=True)


def main() -> int:
    """Measure and print; 0 if all was right."""
    parser = argparse.ArgumentParser(prog="scripts/bench-gateway", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ten seconds: shows that the bench works, measures little")
    parser.add_argument(
        "--litellm", action="store_true", help="LiteLLM too, installed into .litellm/ if it is not there"
    )
    parser.add_argument(
        "--unscored", action="store_true", help="clawloop without scorers too, beside the one with them"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--rounds", type=int, help=f"rounds, interleaved ({Plan.rounds})")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    console = Console(stderr=options.json, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    plan = QUICK if options.quick else Plan()
    plan = replace(plan, rounds=options.rounds or plan.rounds)
    try:
        report = measure_all(plan, with_litellm=options.litellm, unscored=options.unscored, say=console.print)
    except StageError as error:
        console.print(f"bench-gateway: {error}", markup=False)
        return 1
    if options.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    else:
        show(report, console)
    return 0 if report.sound else 1


def measure_all(plan: Plan, *, with_litellm: bool, unscored: bool = False, say: Callable[[str], object]) -> Report:
    """Start all, measure all, stop all."""
    versions = {name: version(name) for name in ("clawloop", "aiohttp", "uvloop")}
    versions["Python"] = platform.python_version()
    left_out = ""
    if with_litellm:
        try:
            versions["litellm"] = start.install_litellm()
        except StageError as error:
            left_out, with_litellm = f"LiteLLM is left out: {error}", False
            say(left_out)
    with temporary_folder() as folder, ExitStack() as stack:
        with start.cores(0):
            direct = stack.enter_context(start.upstream(folder))
        with start.cores(1):
            relay = stack.enter_context(start.relay(folder, direct))
            ours, edge = stack.enter_context(start.edge(folder, direct))
            others = [stack.enter_context(start.litellm(folder, direct))] if with_litellm else []
            if unscored:
                others.append(stack.enter_context(start.edge(folder, direct, name="unscored", scored=False))[0])
        with start.cores(0):
            run = Run(plan, [direct, relay, ours, *others], say)
            uvloop.run(run.measure())
        rows = run.rows()
        edge.stop()
        return Report(
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            versions=versions,
            load_averages=run.load_averages,
            rows=rows,
            memory=run.memory,
            kept=kept_of(edge, ours),
            targets=targets_of(rows, run.memory),
            left_out=left_out,
        )


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for homes and logs; it stays if something went wrong, since the errors name the logs in it."""
    folder = Path(tempfile.mkdtemp(prefix="clawloop-bench-"))
    yield folder
    shutil.rmtree(folder)


def kept_of(edge: Part, ours: Contender) -> Kept:
    """What the pool says of itself, after every sealed row in it was opened."""
    found = edge.run("pool", "verify", "--json", expect_json=True)
    return Kept(ours.answered, found["steps"], found["problems"])


class Run:
    """Rounds over contenders; `load_averages` and `memory` are filled on the way."""

    def __init__(self, plan: Plan, contenders: list[Contender], say: Callable[[str], object]) -> None:
        self._plan, self._contenders, self._say = plan, contenders, say
        self._batches: dict[tuple[str, str], Batch] = {}
        self.load_averages: list[float] = []
        self.memory: list[Memory] = []

    async def measure(self) -> None:
        """Everything, in turn."""
        measured = [contender for contender in self._contenders if contender.pid]
        idle = [rss_mib(contender.pid) for contender in measured]
        for contender in self._contenders:
            for phase in WARM_UP:
                batch = await load(contender, phase, limit_s=self._plan.limit_s)
                if batch.errors:
                    raise StageError(f"{contender.name} answers wrongly: {batch.errors} times, first {batch.why}")
        for number in range(self._plan.rounds):
            self.load_averages.append(os.getloadavg()[0])
            self._say(f"round {number + 1} of {self._plan.rounds}, load average {self.load_averages[-1]:.1f}")
            await self._round()
        for contender, idle_mib in zip(measured, idle, strict=True):
            self._say(f"memory of {contender.name} over {self._plan.long_run} requests")
            self.memory.append(await self._long_run(contender, idle_mib))

    def rows(self) -> list[Row]:
        """The figures so far, by phase."""
        return [
            make_row(phase, each.name, batch=self._batches[phase.name, each.name], base=self._batches[phase.name, BASE])
            for phase in self._plan.phases
            for each in self._contenders
        ]

    async def _round(self) -> None:
        for phase in self._plan.phases:
            for contender in self._contenders:
                batch = await load(contender, phase, limit_s=self._plan.limit_s)
                self._batches.setdefault((phase.name, contender.name), Batch()).add(batch)

    async def _long_run(self, contender: Contender, idle_mib: float) -> Memory:
        after_load, course = rss_mib(contender.pid), list[float]()
        part, total = Phase("long run", self._plan.long_run // COURSE_STEPS, at_once=16), Batch()
        for _ in range(COURSE_STEPS):
            total.add(await load(contender, part, limit_s=self._plan.limit_s))
            course.append(rss_mib(contender.pid))
        return Memory(
            contender=contender.name,
            start_s=contender.start_s,
            idle=idle_mib,
            after_load=after_load,
            requests=len(total.timings),
            errors=total.errors,
            course=course,
        )


if __name__ == "__main__":
    sys.exit(main())

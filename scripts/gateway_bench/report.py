"""The figures of a run: what each contender cost, what it added to going direct, and how ours stands to its targets."""

from collections.abc import Mapping

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway_bench.measure import Batch, Phase, percentile
from gateway_bench.upstream import CHUNKS

_MS = 1000.0
OURS, BASE = "clawloop", "direct"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contender in one phase. Times are ms; `added` is its figure less that of going direct; `cpu` and `waited`
    are a call's, `cpu` in the median round and `cpu_low` in the lowest, since other load can but make it dearer (caches
    and cores are shared). `floor` is the 10th percentile, which such load disturbs least."""

    phase: str
    contender: str
    calls: int
    errors: int
    why: str
    calls_per_s: float
    cpu: float
    cpu_low: float
    waited: float
    floor: float
    p50: float
    p99: float
    floor_added: float
    p50_added: float
    first_p50: float
    first_floor_added: float
    first_added: float
    age_p50: float
    age_p99: float


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident MiB of one contender's processes: idle, after the phases, and as `requests` more calls went on.
    `start_s`: seconds until it answered."""

    contender: str
    start_s: float
    idle: float
    after_load: float
    requests: int
    errors: int
    course: list[float]


class Target(msgspec.Struct, frozen=True):
    """What ours may cost at most, and what it cost."""

    name: str
    most: float
    found: float

    @property
    def met(self) -> bool:
        """Whether it is met."""
        return self.found <= self.most


class Kept(msgspec.Struct, frozen=True):
    """How many calls ours answered, how many steps its pool has, and what a full check of the pool found wrong."""

    answered: int
    steps: int
    problems: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    machine: str
    versions: Mapping[str, str]
    load_averages: list[float]
    rows: list[Row]
    memory: list[Memory]
    kept: Kept
    targets: list[Target]
    left_out: str = ""

    @property
    def sound(self) -> bool:
        """Whether every answer was right and ours kept them all. Says nothing of speed."""
        wrong = sum(row.errors for row in self.rows) + sum(used.errors for used in self.memory)
        return not wrong and not self.kept.problems and self.kept.answered == self.kept.steps


def make_row(phase: Phase, name: str, *, batch: Batch, base: Batch) -> Row:
    """The figures of `batch`, beside those of going direct."""
    totals, base_totals = ([timing.total_s for timing in each.timings] for each in (batch, base))
    firsts, base_firsts = ([timing.first_s for timing in each.timings] for each in (batch, base))
    ages = [age for timing in batch.timings for age in timing.ages_s]
    ran, calls = [cpu.ran_s for cpu in batch.cpu], len(totals)

    def added(share: float) -> float:
        return (percentile(totals, share) - percentile(base_totals, share)) * _MS

    def first_added(share: float) -> float:
        return (percentile(firsts, share) - percentile(base_firsts, share)) * _MS

    return Row(
        phase=phase.name,
        contender=name,
        calls=calls,
        errors=batch.errors,
        why=batch.why,
        calls_per_s=calls / batch.wall_s if batch.wall_s else 0.0,
        cpu=percentile(ran, 0.5) * _MS,
        cpu_low=percentile(ran, 0.0) * _MS,
        waited=percentile([cpu.waited_s for cpu in batch.cpu], 0.5) * _MS,
        floor=percentile(totals, 0.1) * _MS,
        p50=percentile(totals, 0.5) * _MS,
        p99=percentile(totals, 0.99) * _MS,
        floor_added=added(0.1),
        p50_added=added(0.5),
        first_p50=percentile(firsts, 0.5) * _MS,
        first_floor_added=first_added(0.1),
        first_added=first_added(0.5),
        age_p50=percentile(ages, 0.5) * _MS,
        age_p99=percentile(ages, 0.99) * _MS,
    )


def targets_of(rows: list[Row], memory: list[Memory]) -> list[Target]:
    """What ours was to reach."""
    ours = {row.phase: row for row in rows if row.contender == OURS}
    used = next(each for each in memory if each.contender == OURS)
    half = len(used.course) // 2
    return [
        Target("CPU ms a request, one at a time", 1.0, ours["1 KiB prompt"].cpu_low),
        Target("CPU ms a request, 16 at once", 1.0, ours["16 at once"].cpu_low),
        Target(f"CPU ms a stream of {CHUNKS} chunks", 1.5, ours["stream"].cpu_low),
        Target("CPU ms a paced token", 0.3, ours["paced stream"].cpu_low / CHUNKS),
        Target("first token of a paced stream later by ms (floor)", 2.0, ours["paced stream"].first_floor_added),
        Target("first token of a paced stream later by ms (p50)", 2.0, ours["paced stream"].first_added),
        Target("64 KiB prompt later by ms (floor)", 1.5, ours["64 KiB prompt"].floor_added),
        Target("64 KiB prompt later by ms (p50)", 1.5, ours["64 KiB prompt"].p50_added),
        Target("memory MiB, the most seen", 90.0, max([used.idle, used.after_load, *used.course])),
        Target("memory MiB more in the second half of the long run", 1.0, used.course[-1] - used.course[half]),
    ]


def show(report: Report, console: Console) -> None:
    """Print a run as tables."""
    console.print(f"{report.machine}; load average {', '.join(f'{load:.1f}' for load in report.load_averages)}")
    console.print(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    if report.left_out:
        console.print(Text(report.left_out))
    console.print(_costs(report.rows))
    console.print(_memory(report.memory))
    console.print(_targets(report.targets))
    kept = report.kept
    console.print(
        f"clawloop answered {kept.answered} calls, its pool has {kept.steps} steps, {len(kept.problems)} wrong"
    )
    console.print(
        "every answer was right and is kept" if report.sound else "[bold]NOT sound[/bold]: see errors and steps"
    )


def _costs(rows: list[Row]) -> Table:
    right = (
        "CPU",
        "lowest",
        "waited",
        "floor +",
        "p50 +",
        "p50",
        "first floor +",
        "first p50 +",
        "age p50",
        "calls/s",
        "errors",
    )
    table = Table(
        "phase",
        "contender",
        title="ms a call; + is what it adds to going direct; CPU of the median and of the lowest round",
        title_justify="left",
    )
    for name in right:
        table.add_column(name, justify="right")
    last = ""
    for row in rows:
        if last not in ("", row.phase):
            table.add_section()
        streamed, direct = row.age_p50 > 0, row.contender == BASE
        cells = [
            "" if direct else f"{row.cpu:.2f}",
            "" if direct else f"{row.cpu_low:.2f}",
            "" if direct else f"{row.waited:.2f}",
            "" if direct else f"{row.floor_added:+.2f}",
            "" if direct else f"{row.p50_added:+.2f}",
            f"{row.p50:.2f}",
            "" if direct or not streamed else f"{row.first_floor_added:+.2f}",
            "" if direct or not streamed else f"{row.first_added:+.2f}",
            f"{row.age_p50:.2f}" if streamed else "",
            f"{row.calls_per_s:.0f}",
            Text(f"{row.errors} {row.why}".strip()) if row.errors else "0",
        ]
        table.add_row("" if row.phase == last else row.phase, row.contender, *cells)
        last = row.phase
    return table


def _memory(memory: list[Memory]) -> Table:
    table = Table("contender", title="MiB resident", title_justify="left")
    for name in ("start s", "idle", "after load", "further requests", "errors", "on the way"):
        table.add_column(name, justify="right")
    for used in memory:
        course = " ".join(f"{mib:.0f}" for mib in used.course)
        cells = (f"{used.start_s:.1f}", f"{used.idle:.0f}", f"{used.after_load:.0f}", str(used.requests))
        table.add_row(used.contender, *cells, str(used.errors), course)
    return table


def _targets(targets: list[Target]) -> Table:
    table = Table("clawloop's targets", "at most", "found", "", title_justify="left")
    for target in targets:
        table.add_row(target.name, f"{target.most:g}", f"{target.found:.2f}", "met" if target.met else "MISSED")
    return table

"""The figures of a run: what each contender took, whether the gradients agree, and how ours stands to its targets."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer_bench.measure import Times

_TERA = 1e-12
CLOSE = 1e-5
"""gradients in float32 agree if no entry differs by more than this part of the largest one"""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contender on one piece of work. `tokens` are those of all calls, without padding, each call counted whole;
    `computed` the positions that went through the model for them. Seconds are of each round."""

    section: str
    contender: str
    tokens: int
    computed: int
    wall_s: list[float]
    cpu_s: list[float]

    @property
    def best(self) -> float:
        """Seconds of the fastest round."""
        return min(self.wall_s)

    @property
    def rate(self) -> float:
        """Tokens a second in the fastest round."""
        return self.tokens / self.best


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The most memory of one contender, GiB, over what was there before; or why it was not measured."""

    section: str
    contender: str
    base_gib: float = 0.0
    over_gib: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    left_out: str = ""


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """How busy one contender kept a device: operations that its work needs at least, beside those that the device does
    in products of large matrices (see flops.py), both a second."""

    section: str
    contender: str
    useful_flops: float
    wall_s: float
    matrix_rate: float

    @property
    def rate(self) -> float:
        """Useful operations a second."""
        return self.useful_flops / self.wall_s

    @property
    def part(self) -> float:
        """The part of the matrix rate that was of use."""
        return self.rate / self.matrix_rate


class Equality(msgspec.Struct, frozen=True, kw_only=True):
    """The largest difference between two gradients, beside the largest entry."""

    name: str
    difference: float
    largest: float
    close: float = CLOSE

    @property
    def holds(self) -> bool:
        """Whether they are equal, as far as the arithmetic goes."""
        return self.largest > 0.0 and self.difference <= self.close * self.largest


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What ours was to reach, and what it did: `at_least`, or `at_most`."""

    name: str
    found: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether it is met."""
        above = self.at_least is None or self.found >= self.at_least
        return above and (self.at_most is None or self.found <= self.at_most)


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """What one part of the bench found."""

    rows: list[Row] = []
    memory: list[Memory] = []
    uses: list[Use] = []
    equalities: list[Equality] = []
    targets: list[Target] = []
    notes: list[str] = []

    def __add__(self, other: Section) -> Section:
        both = {name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        return Section(**both)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    machine: str
    versions: Mapping[str, str]
    threads: int
    load_averages: list[float]
    found: Section

    @property
    def sound(self) -> bool:
        """Whether all gradients that were compared agree. Says nothing of speed."""
        return all(equality.holds for equality in self.found.equalities)


def row(section: str, contender: str, times: Times, *, tokens: int, computed: int) -> Row:
    """A row of what was measured."""
    return Row(
        section=section, contender=contender, tokens=tokens, computed=computed, wall_s=times.wall, cpu_s=times.cpu
    )


def faster(name: str, theirs: Times, ours: Times, *, at_least: float) -> list[Target]:
    """How many times less time ours took: on the clock, and of the CPU, which others on the machine disturb less."""
    found = {"by the clock": min(theirs.wall) / min(ours.wall), "by CPU": min(theirs.cpu) / min(ours.cpu)}
    return [Target(name=f"{name}, {how}", found=times, at_least=at_least) for how, times in found.items()]


def equality(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, close: float = CLOSE) -> Equality:
    """How far two gradients are from each other; infinitely, if they are not of the same tensors."""
    if set(one) != set(other) or not one:
        return Equality(name=name, difference=float("inf"), largest=0.0, close=close)
    difference = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
    largest = max(float(each.double().abs().max()) for each in one.values())
    return Equality(name=name, difference=difference, largest=largest, close=close)


def show(report: Report, console: Console) -> None:
    """Print a run as tables."""
    load = ", ".join(f"{each:.1f}" for each in report.load_averages)
    console.print(f"{report.machine}; {report.threads} threads; load average {load}")
    console.print(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for note in report.found.notes:
        console.print(note, markup=False)
    found = report.found
    tables = (_rows(found.rows), _memory(found.memory), _uses(found.uses), _equalities(found.equalities))
    for table in (*tables, _targets(found.targets)):
        if table.row_count:
            console.print(table)
    console.print("all gradients agree" if report.sound else "[bold]NOT sound[/bold]: gradients differ")


def _table(title: str, *columns: str, right: tuple[str, ...]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _rows(rows: list[Row]) -> Table:
    columns = ("tokens", "computed", "wall s", "median", "CPU s", "median", "tokens/s")
    table = _table("forward and backward: best and median round", "", "contender", right=columns)
    last = ""
    for each in rows:
        if last not in ("", each.section):
            table.add_section()
        figures = (min(each.wall_s), median(each.wall_s), min(each.cpu_s), median(each.cpu_s))
        cells = [f"{each.tokens:,}", f"{each.computed:,}", *(f"{one:.3f}" for one in figures), f"{each.rate:,.0f}"]
        table.add_row("" if each.section == last else each.section, each.contender, *cells)
        last = each.section
    return table


def _memory(memory: list[Memory]) -> Table:
    table = _table("the most memory, GiB", "", "contender", right=("before", "over it", "wall s", "CPU s"))
    for each in memory:
        figures = [f"{one:.2f}" for one in (each.base_gib, each.over_gib, each.wall_s, each.cpu_s)]
        table.add_row(each.section, each.contender, *([each.left_out] if each.left_out else figures))
    return table


def _uses(uses: list[Use]) -> Table:
    columns = ("useful TFLOP", "TFLOP/s", "matrix rate", "part of it")
    table = _table("use of the device", "", "contender", right=columns)
    for each in uses:
        tera = (each.useful_flops * _TERA, each.rate * _TERA, each.matrix_rate * _TERA)
        table.add_row(each.section, each.contender, *(f"{one:.3g}" for one in tera), f"{each.part:.1%}")
    return table


def _equalities(equalities: list[Equality]) -> Table:
    table = _table("gradients", "", right=("largest difference", "largest entry", ""))
    for each in equalities:
        verdict = "equal" if each.holds else "DIFFERENT"
        table.add_row(each.name, f"{each.difference:.1e}", f"{each.largest:.1e}", verdict)
    return table


def _targets(targets: list[Target]) -> Table:
    table = Table("clawloop's targets", "", "found", "", title_justify="left")
    for each in targets:
        bound = f"at least {each.at_least:g}" if each.at_least is not None else f"at most {each.at_most:g}"
        table.add_row(each.name, bound, f"{each.found:.2f}", "met" if each.met else "MISSED")
    return table

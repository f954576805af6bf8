"""The figures of a run, and how they stand to the targets."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from clawloop_server.simulate.report import Report as Crowd
from federation_bench.costs import Costs
from federation_bench.joining import CLOSE, Joining
from federation_bench.sizes import Sizes
from federation_bench.trip import Trip


class Target(msgspec.Struct, frozen=True):
    """What was to be reached at most, and what was found."""

    name: str
    most: float
    found: float

    @property
    def met(self) -> bool:
        """Whether it is met."""
        return self.found <= self.most


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run; parts that were not asked for are not there."""

    machine: str
    load_average: float
    trip: Trip | None = None
    sizes: Sizes | None = None
    costs: Costs | None = None
    crowd: Crowd | None = None
    joining: Joining | None = None

    @property
    def targets(self) -> list[Target]:
        """The targets of the parts that are there."""
        found = []
        if self.sizes is not None:
            found.append(Target("upload for each byte of OpenClaw's requests", 0.2, self.sizes.ratio))
        if self.trip is not None:
            found.append(Target("upload for each byte of the demo's requests", 0.2, self.trip.ratio))
        if self.crowd is not None:
            found.append(Target("pick-up p95, polling periods", 2.0, self.crowd.pick_ups.p95_polls))
            found.append(Target("acknowledged items lost", 0, self.crowd.items.lost))
        if self.joining is not None:
            found.append(Target("one layer joined, s (median of the rounds)", 3.0, self.joining.median_s))
            found.append(Target("the same, s (best round)", 3.0, self.joining.best_s))
            found.append(Target("its error off the Eckart-Young bound", CLOSE, self.joining.off_bound))
        return found

    @property
    def sound(self) -> bool:
        """Whether nothing was lost or wrong. Says nothing of speed."""
        joined = self.joining is None or self.joining.sound
        return joined and (self.crowd is None or self.crowd.sound)


def show(report: Report, console: Console) -> None:
    """Print a run as tables."""
    console.print(f"{report.machine}; load average {report.load_average:.1f}")
    if report.trip is not None:
        console.print(_trip(report.trip))
    if report.sizes is not None:
        sizes = report.sizes
        console.print(
            f"OpenClaw's requests: {sizes.steps} steps of {sizes.raw_bytes / sizes.steps / 1024:.1f} KiB JSON,"
            f" {sizes.items} items of {sizes.upload_bytes / 1024:.0f} KiB in all: {sizes.ratio:.3f} a byte"
        )
    if report.costs is not None:
        console.print(_costs(report.costs))
    if report.crowd is not None:
        console.print(_crowd(report.crowd))
    if report.joining is not None:
        joined = report.joining
        console.print(
            f"{joined.devices} updates of rank {joined.rank}, {joined.outputs} x {joined.inputs}, cut to {joined.keep},"
            f" {joined.threads} threads: {', '.join(f'{s:.2f}' for s in joined.wall_s)} s"
            f" (median {joined.median_s:.2f}, best {joined.best_s:.2f}); error {joined.error:.6f},"
            f" as told {joined.told:.6f}, bound {joined.bound:.6f}"
        )
    table = Table("target", "at most", "found", "", title_justify="left")
    for target in report.targets:
        table.add_row(target.name, f"{target.most:g}", f"{target.found:.4g}", "met" if target.met else "MISSED")
    console.print(table)
    if not report.sound:
        console.print("[bold]NOT sound[/bold]: something was lost, did not arrive, or is not as near as can be")


def _trip(trip: Trip) -> Table:
    table = Table("stage", "s", title=f"{trip.edges} edges, {trip.steps} steps in {trip.items} items")
    stages = {
        "make the steps (not counted)": trip.make_s,
        "start the edges (not counted)": trip.start_s,
        "upload, until the last is acknowledged": trip.upload_s,
        f"the rest of the round ({trip.trajectories} trajectories)": trip.round_s,
        "release": trip.release_s,
        "swap, the slowest edge": max(trip.swap_s),
        "in all": trip.total_s,
    }
    for name, seconds in stages.items():
        table.add_row(name, f"{seconds:.2f}")
    return table


def _costs(costs: Costs) -> Table:
    idle = ", ".join(f"{name} {cores:.3f}" for name, cores in costs.idle_cores.items())
    table = Table("of the server", "ms CPU", "hub", "superlink", "bridge", title=f"idle, in cores: {idle}")
    for cost in costs.costs:
        parts = (f"{cost.ms[name]:.2f}" for name in ("hub", "superlink", "bridge"))
        table.add_row(f"{cost.name} ({cost.count} times)", f"{cost.total_ms:.2f}", *parts)
    return table


def _crowd(crowd: Crowd) -> Table:
    table = Table("one server", "", title=f"{crowd.devices} simulated devices, polls every {crowd.poll_s:g} s")
    picks, items = crowd.pick_ups, crowd.items
    rows = {
        "devices there, connections": f"{crowd.active}, {crowd.connections}",
        "requests a second (polls)": f"{crowd.calls_per_s:.1f} ({crowd.polls_per_s:.1f})",
        "server CPU s a device and hour": f"{crowd.server_cpu_s_per_device_hour:.2f}"
        f" ({crowd.quiet_cpu_s_per_device_hour:.2f} without releases)",
        "pick-up, s": f"p50 {picks.p50_s:.1f}, p95 {picks.p95_s:.1f}, most {picks.max_s:.1f}",
        "items acknowledged": f"{items.acknowledged}; {items.lost} lost, {items.doubled} doubled; {items.waiting} wait",
        "errors": ", ".join(f"{count} {kind}" for kind, count in crowd.errors.items()) or "none",
    }
    rows |= {
        part.name: f"{part.cpu_s_per_device_hour:.2f} CPU s a device and hour, {part.rss_mib:.0f} MiB"
        for part in crowd.parts
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table

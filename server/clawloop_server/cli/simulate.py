"""`simulate`."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_server.cli.common import JsonOption, print_facts, print_json, print_table

if TYPE_CHECKING:
    from clawloop_server.simulate.report import Report


def simulate(
    devices: Annotated[int, typer.Option(min=1, max=20_000, help="How many devices.")] = 100,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that hold them.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="How long is measured, once all devices are there.")] = 180.0,
    ramp_s: Annotated[float, typer.Option(min=0, help="Over how long devices join.")] = 60.0,
    poll_s: Annotated[float, typer.Option(min=0.1, help="As [node] poll_s of the edge.")] = 15.0,
    heartbeat_s: Annotated[float, typer.Option(min=10, max=1800, help="A device is away after two of them.")] = 30.0,
    keep_s: Annotated[float, typer.Option(min=0.1, help="How long a device keeps an idle connection.")] = 5.0,
    upload_every_s: Annotated[float, typer.Option(min=0.1, help="As [fleet] upload_every_s.")] = 15.0,
    releases: Annotated[int, typer.Option(min=0, max=100, help="Adapters that are released meanwhile.")] = 1,
    items: Annotated[int, typer.Option(min=0, help="What each device uploads, spread over the time.")] = 2,
    deltas: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the devices at level deltas: they send made-up deltas.")
    ] = 0.0,
    adapter_kib: Annotated[int, typer.Option(min=1, max=60_000, help="Size of an adapter.")] = 64,
    home: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of its own for the server, which stays there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a server of this machine under many devices that are not there: real connections, made-up steps.

    It makes and starts a server of its own; no server that learns is touched. Exit 1 if a device could not join, an
    adapter did not arrive or something that was acknowledged is not in the vault.
    """
    for needed in ("aiohttp", "flwr", "torch", "psutil"):
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"no module {needed}", name=needed)
    from clawloop_server.simulate.simulation import Plan
    from clawloop_server.simulate.simulation import simulate as run

    plan = Plan(
        devices=devices,
        processes=processes,
        seconds=seconds,
        ramp_s=ramp_s,
        poll_s=poll_s,
        heartbeat_s=heartbeat_s,
        keep_s=keep_s,
        upload_every_s=upload_every_s,
        releases=releases,
        items=items,
        adapter_bytes=adapter_kib << 10,
        deltas=deltas,
    )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    report = run(plan, folder=home, say=lambda text: typer.echo(text, err=True))
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report.sound:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    found, items = report.pick_ups, report.items
    errors = ", ".join(f"{count} {kind}" for kind, count in report.errors.items()) or "none"
    facts: dict[str, object] = {
        "devices": f"{report.active} of {report.devices}, {report.connections} connections at the end",
        "joined in": f"{report.ramp_s:.0f} s",
        "measured": f"{report.seconds:.0f} s, polls every {report.poll_s:g} s, heartbeats of {report.heartbeat_s:g} s",
        "requests": f"{report.polls_per_s:.1f} polls/s, {report.calls_per_s:.1f} in all",
        "errors": errors,
        "server CPU": f"{report.server_cpu_s_per_device_hour:.2f} s a device and hour"
        f" ({report.quiet_cpu_s_per_device_hour:.2f} without releases)",
        "simulator CPU": f"{report.simulator_cores:.2f} cores; load average {report.load_average:.1f}",
        "pick-up": f"p50 {found.p50_s:.1f} s, p95 {found.p95_s:.1f} s, most {found.max_s:.1f} s"
        f" ({found.p50_polls:.2f}, {found.p95_polls:.2f}, {found.max_polls:.2f} polling periods);"
        f" {found.count} arrived, {found.missing} did not",
        "items": f"{items.acknowledged} acknowledged, {items.lost} lost, {items.doubled} doubled,"
        f" {items.waiting} not acknowledged yet",
    }
    if report.deltas.acknowledged:
        told = report.deltas
        states = ", ".join(f"{count} {state}" for state, count in told.states.items())
        rounds = ", ".join(f"{count} {state}" for state, count in told.rounds.items()) or "none"
        facts["deltas"] = f"{told.acknowledged} acknowledged, {told.lost} lost ({states}); rounds: {rounds}"
    if report.faults or report.refused:
        facts["faults"] = "; ".join([*report.faults, *report.refused])[:2000]
    print_facts("simulation", facts)
    columns = ("process", "CPU s a device and hour", "without releases", "cores", "MiB, the most")
    rows = [
        (
            part.name,
            f"{part.cpu_s_per_device_hour:.2f}",
            f"{part.quiet_cpu_s_per_device_hour:.2f}",
            f"{part.cores:.3f}",
            f"{part.rss_mib:.0f}",
        )
        for part in report.parts
    ]
    print_table("server", columns, rows=rows)

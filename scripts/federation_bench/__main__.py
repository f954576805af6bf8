"""`python -m federation_bench`: what learning together costs: a round trip, many devices on one server, joined updates.

Exit code 0 if nothing was lost or wrong, 1 otherwise; speed has no part in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from clawloop_server.simulate.simulation import Plan, simulate
from clawloop_shared.errors import ClawloopError
from demoworld.stage import StageError
from federation_bench import costs, joining, sizes, trip
from federation_bench.report import Report, show

WIDTH = 150
PARTS = ("joining", "sizes", "costs", "trip", "crowd")
LONG = ("costs", "trip")
"""parts that a quick run leaves out"""
COUNT = 200
QUICK = Plan(
    devices=6, processes=1, seconds=8, ramp_s=1, poll_s=1, upload_every_s=1, items=2, item_steps=2, step_tokens=64
)


def main() -> int:
    """Measure and print; 0 if all was right."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    console = Console(stderr=options.json, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    torch.set_num_threads(options.threads)
    try:
        with _folder() as folder:
            report = _measure(options, folder, console)
    except (StageError, ClawloopError) as error:
        console.print(f"bench-federation: {error}", markup=False)
        return 1
    if options.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    else:
        show(report, console)
    return 0 if report.sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench-federation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="half a minute: shows that it works; no costs, no trip")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--edges", type=int, default=3, help="of the round trip (3)")
    parser.add_argument("--steps", type=int, default=1000, help="of the round trip, and of the sizes (1000)")
    parser.add_argument("--devices", type=int, default=1000, help="simulated (1000)")
    parser.add_argument("--poll-s", type=float, default=60.0, help="how often each asks (60)")
    parser.add_argument("--heartbeat-s", type=float, default=240.0, help="how often each must be heard of (240)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for which these are measured (600)")
    parser.add_argument("--ramp-s", type=float, default=400.0, help="in which they join (400)")
    parser.add_argument("--upload-every-s", type=float, default=600.0, help="as [fleet] upload_every_s (600)")
    parser.add_argument("--processes", type=int, default=2, help="that hold them (2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (as there are cores)")
    return parser


def _measure(options: argparse.Namespace, folder: Path, console: Console) -> Report:
    wanted = options.only or [part for part in PARTS if part not in LONG or not options.quick]
    found = Report(machine=_machine(), load_average=os.getloadavg()[0])
    if "joining" in wanted:
        console.print("joining updates of one layer")
        size = (8, 4, 256, 192, 8, 2) if options.quick else (64, 16, 4096, 4096, 64, 3)
        names = ("devices", "rank", "outputs", "inputs", "keep", "rounds")
        joined = joining.measure(**dict(zip(names, size, strict=True)))
        found = msgspec.structs.replace(found, joining=joined)
    if "sizes" in wanted:
        console.print("what leaves of OpenClaw's requests")
        steps = 50 if options.quick else options.steps
        found = msgspec.structs.replace(found, sizes=sizes.measure(folder / "pool", steps=steps))
    if "costs" in wanted:
        console.print("what a request costs the server")
        found = msgspec.structs.replace(found, costs=costs.measure(folder / "costs", count=COUNT))
    if "trip" in wanted:
        made = trip.measure(folder, edges=options.edges, steps=options.steps, say=console.print)
        found = msgspec.structs.replace(found, trip=made)
    if "crowd" in wanted:
        crowd = simulate(_plan(options), folder=folder / "crowd", say=console.print)
        found = msgspec.structs.replace(found, crowd=crowd)
    return found


def _plan(options: argparse.Namespace) -> Plan:
    if options.quick:
        return QUICK
    return Plan(
        devices=options.devices,
        processes=options.processes,
        seconds=options.seconds,
        ramp_s=options.ramp_s,
        poll_s=options.poll_s,
        heartbeat_s=options.heartbeat_s,
        upload_every_s=options.upload_every_s,
    )


def _machine() -> str:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for homes and logs; it stays if something went wrong, since the errors name the logs in it."""
    folder = Path(tempfile.mkdtemp(prefix="clawloop-bench-"))
    yield folder
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())

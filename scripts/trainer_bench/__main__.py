"""`python -m trainer_bench`: the trainer's step beside TRL's, with and without sharing, its memory, its use of a GPU.

Exit code 0 if all gradients that were compared agree, 1 otherwise; speed has no part in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
import torch
from rich.console import Console

from trainer_bench import gpu, sharing, trl_home, vocabulary
from trainer_bench.report import Report, Section, show
from trainer_bench.trl_home import TrlError

WIDTH = 150
SECTIONS = ("trl", "sharing", "vocabulary", "gpu")
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What is measured and how often."""

    sections: tuple[str, ...]
    rounds: int = 5
    threads: int = 1
    quick: bool = False
    tiny: bool = False


def main() -> int:
    """Measure and print; 0 if all was right."""
    parser = argparse.ArgumentParser(prog="scripts/bench-trainer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: shows that it works, judges nothing"
    )
    parser.add_argument("--trl", action="store_true", help="beside TRL, installed into .trl/ if it is not there")
    parser.add_argument("--gpu", action="store_true", help="the GPU's part; without this it runs where there is CUDA")
    parser.add_argument("--tiny", action="store_true", help="small sizes for the GPU's part: it runs on a CPU, too")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="only these parts")
    parser.add_argument("--rounds", type=int, help=f"rounds, contenders in turns ({Plan.rounds})")
    parser.add_argument("--threads", type=int, default=Plan.threads, help=f"of each contender ({Plan.threads})")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    on_gpu = options.gpu or torch.cuda.is_available()
    default = [name for name in SECTIONS if {"trl": options.trl, "gpu": on_gpu}.get(name, True)]
    plan = Plan(
        sections=tuple(options.only or default),
        rounds=options.rounds or (1 if options.quick else Plan.rounds),
        threads=options.threads,
        quick=options.quick,
        tiny=options.tiny or options.quick,
    )
    if "gpu" in plan.sections and not (plan.tiny or torch.cuda.is_available()):
        parser.error("--gpu: there is no CUDA here; with --tiny it runs on the CPU and measures nothing")
    console = Console(stderr=options.json, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        report = measure_all(plan, say=console.print)
    except TrlError as error:
        console.print(f"bench-trainer: {error}", markup=False)
        return 1
    if options.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    else:
        show(report, console)
    return 0 if report.sound else 1


def measure_all(plan: Plan, *, say: Callable[[str], object]) -> Report:
    """Every section of the plan, one after the other."""
    parts: dict[str, Callable[[], Section]] = {
        "trl": lambda: beside_trl(plan),
        "sharing": lambda: sharing.measure(rounds=plan.rounds, threads=plan.threads, quick=plan.quick),
        "vocabulary": lambda: vocabulary.measure(threads=plan.threads, quick=plan.quick),
        "gpu": lambda: gpu.measure(tiny=plan.tiny),
    }
    found, loads = Section(), list[float]()
    for name in plan.sections:
        loads.append(os.getloadavg()[0])
        say(f"{name}, load average {loads[-1]:.1f}")
        found += parts[name]()
    loads.append(os.getloadavg()[0])
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return Report(
        machine=machine(),
        versions=versions | {"Python": platform.python_version()} | trl_version(plan),
        threads=plan.threads,
        load_averages=loads,
        found=msgspec.structs.replace(found, targets=[] if plan.quick or plan.tiny else found.targets),
    )


def machine() -> str:
    """What the numbers are of."""
    said = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        return said
    card = torch.cuda.get_device_properties(0)
    return f"{said}; {card.name}, {card.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"


def trl_version(plan: Plan) -> dict[str, str]:
    """TRL's, if it took part."""
    return {"trl": trl_home.VERSION} if "trl" in plan.sections else {}


def beside_trl(plan: Plan) -> Section:
    """Our step beside TRL's."""
    trl_home.install()
    return trl_home.measure(rounds=plan.rounds, threads=plan.threads, quick=plan.quick)


if __name__ == "__main__":
    sys.exit(main())

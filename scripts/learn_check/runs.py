"""All runs of a check, several processes at once. Progress goes to stderr."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from learn_check.experiment import Outcome, Run, Variant
from learn_check.model import make_base, quantise

_TOLD_EVERY = 30
progress = Console(stderr=True, width=120, highlight=False)


def free_cores() -> int:
    """Cores that nobody uses now, at least one."""
    cores = os.cpu_count() or 1
    return max(1, min(cores, round(cores - os.getloadavg()[0])))


def run_all(
    folder: Path, variants: Sequence[Variant], *, seeds: Sequence[int], updates: int, jobs: int
) -> list[Outcome]:
    """Every variant with every seed, in the order of the variants, `jobs` processes at once."""
    spawn = multiprocessing.get_context("spawn")  # torch and MLX do not outlive a fork
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for seed in [pool.submit(make_models, folder, seed) for seed in seeds]:
            progress.print(f"seed {seed.result()}: taught the base, and quantised it for the device")
        running: dict[Future[Outcome], tuple[str, int]] = {
            pool.submit(run_one, folder, variant, seed, updates): (variant.name, seed)
            for seed in seeds
            for variant in variants
        }
        found: dict[tuple[str, int], Outcome] = {}
        for future in as_completed(running):
            outcome = found[running[future]] = future.result()
            progress.print(
                f"{len(found)}/{len(running)}  {outcome.variant}, seed {outcome.seed}: {outcome.before.sampled:.3f} ->"
                f" {outcome.after.sampled:.3f} in {outcome.seconds:.0f} s"
            )
    return [found[variant.name, seed] for variant in variants for seed in seeds]


def make_models(folder: Path, seed: int) -> int:
    """The models of a seed, below `folder`."""
    place = models_of(folder, seed)
    make_base(place / "base", seed=seed)
    quantise(place / "base", place / "device")
    return seed


def models_of(folder: Path, seed: int) -> Path:
    """Where the models of a seed are."""
    return folder / f"seed-{seed}"


def run_one(folder: Path, variant: Variant, seed: int, updates: int) -> Outcome:
    """One run in this process."""

    def tell(done: int, reward: float) -> None:
        if done % _TOLD_EVERY == 0:
            progress.print(f"  {variant.name}, seed {seed}: {done} updates, the device's reward {reward:.2f}")

    return Run(models_of(folder, seed), variant, seed=seed).outcome(updates, report=tell)

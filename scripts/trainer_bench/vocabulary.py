"""The most memory of one step with a large vocabulary: full logits, as transformers gives them, and our engine.

Each contender is a process of its own (`python -m trainer_bench.vocabulary NAME`), since what one has taken and given
back the next would get for nothing. One row with many trained positions, a body of one small layer, float32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from clawloop_server.trainer.engine import TrainEngine
from clawloop_shared.rows import Sample
from trainer_bench.engines import OPEN_LOSS, gradients, open_engine, save_random_model, settings
from trainer_bench.measure import available_gib, peak_of
from trainer_bench.report import Memory, Section, Target, equality
from trainer_bench.shapes import QUICK, WIDE_HEAD, ModelShape, Part, SessionShape, session

POSITIONS, QUICK_POSITIONS = 4096, 256
MOST_GIB = 0.5
NEEDED_GIB = 12.0
"""free memory below which full logits are not tried: they would take it from others"""
OURS, GATHERED, SOFTMAX = "clawloop", "full logits, gather - logsumexp", "full logits, log_softmax"


def samples_of(shape: ModelShape, positions: int) -> list[Sample]:
    """One sequence, all of it trained but its first token."""
    return session(SessionShape("", 0, (Part(1, positions),)), vocab=shape.vocab)


def ours(engine: TrainEngine, samples: list[Sample]) -> None:
    """The engine's own step."""
    engine.forward_backward(samples, OPEN_LOSS)


def full_step(logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[TrainEngine, list[Sample]], None]:
    """The same loss on all logits at once."""

    def run(engine: TrainEngine, samples: list[Sample]) -> None:
        (sample,) = samples
        ids_T = torch.tensor(sample.token_ids)
        # No name for the logits, so that they are gone as soon as autograd wants them no more.
        logprobs_P = logprobs_of(engine.model(input_ids=ids_T[None], use_cache=False).logits[0, :-1], ids_T[1:, None])
        weight_P = (logprobs_P.detach() - torch.tensor(sample.logprobs)).exp().clamp(max=OPEN_LOSS.tis_cap)
        per_token_P = weight_P * torch.tensor(sample.advantages) * logprobs_P
        torch.autograd.backward(-per_token_P.sum() / len(sample.trained))

    return run


STEPS: dict[str, Callable[[TrainEngine, list[Sample]], None]] = {
    OURS: ours,
    GATHERED: full_step(lambda logits, target: logits.gather(-1, target).squeeze(-1) - logits.logsumexp(-1)),
    SOFTMAX: full_step(lambda logits, target: F.log_softmax(logits, dim=-1).gather(-1, target).squeeze(-1)),
}


def sizes(*, quick: bool) -> tuple[ModelShape, int]:
    """The model and the trained positions."""
    return (QUICK, QUICK_POSITIONS) if quick else (WIDE_HEAD, POSITIONS)


def main() -> None:
    """Measure one contender and print it as JSON; its gradients go into a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=sorted(STEPS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gradients", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    shape, positions = sizes(quick=given.quick)
    engine = open_engine(given.model, settings(threads=given.threads, device="cpu", row_tokens=2 * positions))
    samples = samples_of(shape, positions)
    engine.logprobs(samples_of(shape, 1))  # the weights are mapped from the file, and resident once they were read
    wall, cpu = time.perf_counter(), time.process_time()
    peak = peak_of(lambda: STEPS[given.contender](engine, samples))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    save_file(gradients(engine.model), given.gradients)
    memory = Memory(
        section=f"vocabulary {shape.vocab:,}, {positions:,} trained positions",
        contender=given.contender,
        base_gib=peak.base,
        over_gib=peak.over,
        wall_s=wall,
        cpu_s=cpu,
    )
    sys.stdout.buffer.write(msgspec.json.encode(memory))


def measure(*, threads: int, quick: bool) -> Section:
    """Every contender for which there is memory, and whether they found the same gradient.

    Raises:
        subprocess.CalledProcessError: one failed; it has said why on stderr.
    """
    shape, _ = sizes(quick=quick)
    found, gradient = list[Memory](), dict[str, dict[str, Tensor]]()
    with tempfile.TemporaryDirectory(prefix="clawloop-bench-") as folder:
        model = Path(folder, "model")
        save_random_model(shape, model)
        for name in STEPS:
            if name != OURS and not quick and available_gib() < NEEDED_GIB:
                left_out = f"needs {NEEDED_GIB:g} GiB of free memory, there are {available_gib():.1f}"
                found.append(Memory(section="", contender=name, left_out=left_out))
                continue
            into = Path(folder, f"{len(found)}.safetensors")
            found.append(_in_a_process(name, model, into, threads=threads, quick=quick))
            gradient[name] = load_file(into)
    equalities = [equality(f"ours and {name}", each, gradient[OURS]) for name, each in gradient.items() if name != OURS]
    return Section(memory=found, equalities=equalities, targets=targets(found))


def _in_a_process(name: str, model: Path, into: Path, *, threads: int, quick: bool) -> Memory:
    command = [sys.executable, "-m", "trainer_bench.vocabulary", name, "--model", str(model), "--gradients", str(into)]
    command += ["--threads", str(threads), *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=Memory)


def targets(found: list[Memory]) -> list[Target]:
    """What ours may take at most."""
    mine = next(each for each in found if each.contender == OURS)
    return [Target(name=f"GiB over the base, {mine.section}", found=mine.over_gib, at_most=MOST_GIB)]


if __name__ == "__main__":
    main()

"""What an update at home takes, by how long the steps are: what the learning process does, one for each length, of
made-up trajectories of one step. Time and memory are of that process."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from clawloop_edge.child import held_bytes
from clawloop_edge.learn.job import Job
from clawloop_shared.deltas import LearnTask, Method
from clawloop_shared.model_line import read_config
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Policy, Sampling, Step, Trajectory

DEMO_MODEL = Path(__file__).parent / "demoworld" / "model"
LINE, TRAJECTORIES, RANK = "bench", 16, 8


class Found(msgspec.Struct, frozen=True):
    """Of one length of steps. `held_mib` is held before the first update, `peak_mib` what MLX's arrays took at most,
    `said_mib` what `learn/memory.py` says that one sample takes beside the model."""

    tokens: int
    update_s: float
    tokens_per_s: float
    held_mib: float
    peak_mib: float
    said_mib: float
    load: float


def trajectory(number: int, *, tokens: int, vocabulary: int) -> Trajectory:
    """One step, of which a quarter is the reply."""
    rng, reply = random.Random(f"{number} {tokens}"), tokens // 4
    ids = [rng.randrange(3, vocabulary) for _ in range(tokens)]
    step = Step(
        step_id=f"{number}",
        session_id=f"{number}",
        run_id=f"{number}",
        prompt_ids=ids[:-reply],
        response_ids=ids[-reply:],
        response_logprobs=[-6.0] * reply,
        policy=Policy(LINE, 0),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=0,
    )
    return Trajectory(trajectory_id=f"{number}", steps=[step], signals=[], reward=(-1.0, 1.0)[number % 2], weight=1.0)


def measure(folder: Path, *, tokens: int, updates: int) -> Found:
    """The median time of an update but the first, which compiles, and the most memory of all."""
    import mlx.core as mx

    from clawloop_edge.engine.memory import model_sizes
    from clawloop_edge.learn import attention, model
    from clawloop_edge.learn.memory import sample_bytes
    from clawloop_edge.learn.opening import open_job

    config = read_config(folder)
    task = LearnTask(
        task_id="bench",
        line_id=LINE,
        base_version=0,
        method=Method.FFA,
        rank=RANK,
        updates=updates + 1,
        batch_trajectories=TRAJECTORIES,
        loss=LossSettings(veto=0.0, opsm_delta=1e9),
    )
    made = [trajectory(number, tokens=tokens, vocabulary=int(config["vocab_size"])) for number in range(TRAJECTORIES)]
    job = Job(task=task, rank=RANK, model=folder, adapter={}, trajectories=made, min_trajectories=8)
    doing, times = open_job(job, kept=b"", memory_bytes=0), list[float]()
    held = held_bytes()
    mx.reset_peak_memory()
    while not doing.done:
        began = time.perf_counter()
        doing.step()
        times.append(time.perf_counter() - began)
    learned = doing.result()
    if len(learned.trajectory_ids) != TRAJECTORIES:
        raise SystemExit(f"{len(learned.trajectory_ids)} of {TRAJECTORIES} trajectories were learned from")
    said = sample_bytes(
        model_sizes(config, dtype_bytes=4),
        tokens=tokens,
        trained=tokens // 4,
        chunk_bytes=model.CHUNK_BYTES,
        block_bytes=attention.BLOCK_BYTES,
    )
    update_s = statistics.median(times[1:])
    return Found(
        tokens=tokens,
        update_s=update_s,
        tokens_per_s=TRAJECTORIES * tokens / update_s,
        held_mib=held / 2**20,
        peak_mib=mx.get_peak_memory() / 2**20,
        said_mib=said / 2**20,
        load=os.getloadavg()[0],
    )


def main() -> None:
    """Measure each length in a process of its own, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(prog="bench-learn", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a model folder; without it the demo's")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048], help="of a step, at least 4")
    parser.add_argument("--updates", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--json", action="store_true", help="a JSON line for each length")
    parser.add_argument("--here", action="store_true", help="measure the first length in this very process")
    asked = parser.parse_args()
    if asked.here:
        print(msgspec.json.encode(measure(asked.model, tokens=asked.tokens[0], updates=asked.updates)).decode())
        return
    if not asked.json:
        print("tokens  s/update  tokens/s  held MiB  peak MiB  said MiB  load")
    for tokens in asked.tokens:
        command = [sys.executable, "-m", "bench_learn", "--here", "--model", str(asked.model)]
        command += ["--tokens", str(tokens), "--updates", str(asked.updates)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = msgspec.convert(json.loads(line), Found)
        if asked.json:
            print(line.strip())
        else:
            print(
                f"{found.tokens:6}  {found.update_s:8.2f}  {found.tokens_per_s:8.0f}  {found.held_mib:8.0f}"
                f"  {found.peak_mib:8.1f}  {found.said_mib:8.1f}  {found.load:4.1f}"
            )


if __name__ == "__main__":
    main()

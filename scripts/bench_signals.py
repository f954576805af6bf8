"""Measure the scorers' worker: from steps on disk to signals on disk, through the rule's process.

Each session is a chat of ten turns whose prompt grows by one of them; every turn is a run of its own, and is judged
when the next is there, or when it was left alone. The pool is real and encrypted; the rule compares numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clawloop_edge.gateway.schema import prepare_trajectories
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.scoring import open_worker
from clawloop_edge.signals.registry import Deps
from clawloop_edge.signals.settings import RuleSettings, SignalsSettings
from clawloop_shared.records import Policy, Sampling, Step

TARGET_S = 5.0
"""for a thousand steps on two cores"""
TURNS = 10
RULE = '''
def rule(case):
    """A look at the answer and at what the user said next."""
    text = case["text"]
    after = " ".join(str(message.get("content")) for message in case["following"])
    return {"value": 1.0 if "42" in text and "no" not in after else -1.0, "weight": 0.5}
'''


def session(number: int, tokens: int) -> list[KeptStep]:
    """The steps of one chat, each with about `tokens` tokens more in its prompt."""
    steps: list[KeptStep] = []
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You help. " * 100}]
    prompt = list(range(tokens))
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"question {turn} of {number}: " + "and so on " * 30})
        reply = {"role": "assistant", "content": f"the answer is {turn} and 42, " + "because it is " * 40}
        response = [1000 + turn] * 120
        step = Step(
            step_id=f"{number}-{turn}",
            session_id=f"session-{number}",
            run_id=f"run-{number}-{turn}",
            parent_id=f"{number}-{turn - 1}" if turn else "",
            prompt_ids=list(prompt),
            response_ids=response,
            response_logprobs=[-0.5] * len(response),
            policy=Policy("line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=turn,
        )
        steps.append(KeptStep(step=step, messages=list(messages), reply=reply, started_ms=turn, finished_ms=turn))
        messages.append(reply)
        prompt += [*response, *range(tokens)]
    return steps


async def measure(folder: Path, *, steps: int, tokens: int) -> dict[str, float]:
    """Seconds, CPU seconds and signals for so many steps."""
    (folder / "bench_rule.py").write_text(RULE)
    settings = SignalsSettings(
        scorers=("rule",), idle_s=0.0, rule=RuleSettings(function="bench_rule:rule", path=str(folder))
    )
    with Pool.open(folder, KnownKey.of(os.urandom(32)), writer=True) as pool:
        prepare_trajectories(pool)
        deps = Deps(settings=settings, engine=None, folder=folder)
        first = open_worker(pool, deps, busy=lambda: 0)
        await first.start()  # what is there before the first start is not judged
        await first.stop()
        for number in range(steps // TURNS):
            for future in [pool.keep_step(kept) for kept in session(number, tokens)]:
                future.result()
        worker = open_worker(pool, deps, busy=lambda: 0)
        began, cpu = time.perf_counter(), time.process_time()
        await worker.start()
        while worker.counts["rule"].judged < steps and time.perf_counter() - began < 20 * TARGET_S:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        took = time.perf_counter() - began
        used = time.process_time() - cpu
        await worker.stop()
        return {"steps": steps, "seconds": took, "cpu_seconds": used, "signals": pool.stats().signals}


def main() -> int:
    """Print what was measured; 1 if it took too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="how many, ten to a session")
    parser.add_argument("--tokens", type=int, default=150, help="what each turn adds to the prompt")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), steps=options.steps, tokens=options.tokens))
    limit = TARGET_S * options.steps / 1000
    if options.json:
        print(json.dumps({**found, "target_seconds": limit}))
    else:
        print(f"{'steps':>8} {'signals':>8} {'seconds':>8} {'CPU s':>8} {'steps/s':>8}")
        rate = found["steps"] / found["seconds"]
        print(
            f"{found['steps']:>8.0f} {found['signals']:>8.0f} {found['seconds']:>8.2f} {found['cpu_seconds']:>8.2f}"
            f" {rate:>8.0f}   (target: {limit:g} s)"
        )
    return 0 if found["seconds"] <= limit and found["signals"] == found["steps"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""How long a full-text search takes over many sessions, and what its index costs. Part of `scripts/bench-pool`."""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.search import INDEX_NAME, SearchIndex
from clawloop_edge.pool.store import Pool
from clawloop_shared.ids import new_step_id
from clawloop_shared.records import Policy, Sampling, Step

WORDS = 50_000
KEY = bytes(range(32))
_POLICY, _SAMPLING = Policy("line"), Sampling()


class Speech:
    """Texts whose words are as common as in a language: the n-th has a share of about 1/n (Zipf). From a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        letters = "etaoinshrdlucmfwyp"
        self.words = [self._word(letters) for _ in range(WORDS)]
        total, self._shares = 0.0, []
        for rank in range(1, WORDS + 1):
            total += 1 / rank
            self._shares.append(total)

    def _word(self, letters: str) -> str:
        return "".join(self._random.choices(letters, k=self._random.randint(2, 11)))

    def text(self, words: int) -> str:
        """So many words."""
        found = self._random.choices(self.words, cum_weights=self._shares, k=words)
        return " ".join(found)


def steps_of(speech: Speech, session: int, *, steps: int) -> list[KeptStep]:
    """One session: each step has the history, a new question, often a tool's answer, and a reply. About 1.5 KB each."""
    messages: list[dict[str, object]] = []
    found: list[KeptStep] = []
    for number in range(steps):
        messages = [*messages, {"role": "user", "content": speech.text(30)}]
        if number % 2:
            messages.append({"role": "tool", "content": speech.text(150)})
        reply: dict[str, object] = {"role": "assistant", "content": speech.text(60)}
        at_ms = 1_700_000_000_000 + session * 60_000 + number * 1000
        step = Step(
            step_id=new_step_id(),
            session_id=f"session-{session}",
            run_id=f"run-{session}-{number}",
            parent_id=found[-1].step.step_id if found else "",
            prompt_ids=list(range(8)),
            response_ids=[1, 2, 3],
            response_logprobs=[-0.5, -0.25, -1.0],
            policy=_POLICY,
            sampling=_SAMPLING,
            finish_reason="stop",
            created_ms=at_ms,
        )
        kept = KeptStep(step=step, messages=messages, reply=reply, app="openclaw", started_ms=at_ms, finished_ms=at_ms)
        found.append(kept)
        messages = [*messages, reply]
    return found


def fill(pool: Pool, speech: Speech, *, first: int = 0, sessions: int, steps: int) -> None:
    """Keep the sessions from number `first` up to `sessions`."""
    waiting: deque[Future[None]] = deque()
    for session in range(first, sessions):
        waiting.extend(pool.keep_step(kept) for kept in steps_of(speech, session, steps=steps))
        while len(waiting) > 2000:
            waiting.popleft().result()
    for future in waiting:
        future.result()


def queries(speech: Speech, count: int) -> dict[str, list[str]]:
    """What people and others look for, by kind."""
    chosen = random.Random(7)

    def word(low: int, high: int) -> str:
        return speech.words[chosen.randint(low, high)]

    return {
        "rare word": [word(5_000, 40_000) for _ in range(count)],
        "common word": [word(0, 20) for _ in range(count)],
        "two words": [f"{word(50, 500)} {word(200, 2000)}" for _ in range(count)],
        "three common words": [f"{word(0, 30)} {word(0, 30)} {word(0, 30)}" for _ in range(count)],
        "phrase": [f'"{word(0, 60)} {word(0, 60)}"' for _ in range(count)],
        "beginning": [f"{word(100, 20_000)[:3]}*" for _ in range(count)],
        "two letters": [f"{one}{other}*" for one in "etaoin" for other in "etaoin"],
        "worst": [
            " ".join(f"{one}{other}*" for one in "etaoin" for other in "etaoi"),
            f'"{" ".join(speech.words[:32])}"',
            " ".join(speech.words[:32]),
            " ".join([speech.words[0], *(f"-{word}" for word in speech.words[1:32])]),
        ],
        "without": [f"{word(50, 500)} -{word(0, 50)}" for _ in range(count)],
        "nothing": [f"zz{number}qq" for number in range(count)],
    }


def measure(index: SearchIndex, asked: dict[str, list[str]], *, best: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of each kind of query, a page of 20 with its snippets; `all` is what people ask, without `worst`."""
    took: dict[str, list[float]] = {"all": []}
    for kind, queries_of_kind in asked.items():
        took[kind] = [_time(partial(index.search, words, best=best)) for words in queries_of_kind]
        took["all"] += took[kind] if kind != "worst" else []
    return {kind: _facts(sorted(times)) for kind, times in took.items()}


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def _facts(times: list[float]) -> dict[str, float]:
    p95 = times[min(len(times) - 1, int(len(times) * 0.95))]
    return {"p50_ms": round(statistics.median(times), 1), "p95_ms": round(p95, 1), "max_ms": round(times[-1], 1)}


def run(folder: Path, *, sessions: int = 10_000, steps: int = 10, count: int = 40) -> dict[str, object]:
    """Fill a pool in `folder`, index it, and search."""
    speech = Speech(1)
    with open_pool(folder) as pool:
        filled_ms = _time(lambda: fill(pool, speech, sessions=sessions, steps=steps))
        index = SearchIndex(pool)
        indexed_ms = _time(lambda: catch_up(index))
        fill(pool, speech, first=sessions, sessions=sessions + 6, steps=steps)
        bite_ms = _time(index.catch_up)
        catch_up(index)
        asked = queries(speech, count)
        return {
            "sessions": sessions,
            "steps": sessions * steps,
            "filled_steps_per_s": round(sessions * steps / filled_ms * 1000),
            "indexed_steps_per_s": round(sessions * steps / indexed_ms * 1000),
            "bite_of_64_steps_ms": round(bite_ms, 1),
            "pool_bytes": pool.stats().file_bytes,
            "index_bytes": (folder / INDEX_NAME).stat().st_size,
            "newest_first": measure(index, asked, best=False),
            "best_first": measure(index, asked, best=True),
        }


def catch_up(index: SearchIndex) -> None:
    """Take in all that is new."""
    while index.catch_up(1000):
        pass


def open_pool(folder: Path) -> Pool:
    """A pool with a key of its own."""
    return Pool.open(folder, KnownKey.of(KEY), writer=True)


def main() -> None:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-search-") as folder:
        print(json.dumps(run(Path(folder), sessions=asked.sessions, steps=asked.steps), indent=2))


if __name__ == "__main__":
    main()

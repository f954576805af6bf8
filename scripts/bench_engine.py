"""`python -m bench_engine`: the engine behind a real edge, beside `mlx_lm.server` on the same model, in one run.

Both are processes of their own that answer streams over HTTP; rounds alternate between them. The edge keeps every call.
Exit code 0 if no request was lost, 1 otherwise; speed has no part in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil

from bench_engine_models import make_models
from bench_engine_swap import Swaps, measure_swaps

START_S = 120.0
SYSTEM_WORDS = 450
"""some 1,500 tokens, like an agent's"""
WORDS = (
    "river",
    "stone",
    "lamp",
    "cloud",
    "paper",
    "garden",
    "window",
    "letter",
    "market",
    "bridge",
    "morning",
    "table",
)


class Server(msgspec.Struct, frozen=True):
    """Where one of the two answers."""

    name: str
    url: str
    headers: dict[str, str]
    model: str
    pid: int

    def cpu_s(self) -> float:
        """Processor time used so far."""
        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)


class Answer(msgspec.Struct, frozen=True):
    """One streamed reply: seconds to its first token and in all, and its tokens."""

    first_s: float
    total_s: float
    tokens: int
    text: str


class Pair(msgspec.Struct, frozen=True):
    """Tokens a second, and processor time (s) a token, of both; the ratio is ours over theirs."""

    ours: float
    theirs: float
    ours_cpu_s: float
    theirs_cpu_s: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


class Turns(msgspec.Struct, frozen=True):
    """First tokens (s) of the turns of a session after its first, and of as long prompts that no cache knows."""

    warm_s: float
    cold_s: float

    @property
    def ratio(self) -> float:
        return self.warm_s / self.cold_s


class Found(msgspec.Struct, frozen=True):
    """All that one model gave."""

    one: Pair
    eight: Pair
    ours: Turns
    theirs: Turns
    swaps: Swaps


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path) -> Iterator[int]:
    """A process of its own group, ended at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            yield process.pid
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def edge(model: Path, folder: Path) -> Iterator[Server]:
    """A real edge: `setup`, `serve`, an encrypted pool, every call kept."""
    port, home = free_port(), folder / "home"
    cli = [str(Path(sys.executable).parent / "clawloop-edge"), "--home", str(home)]
    made = [*cli, "setup", "--model", str(model), "--key-file", "--port", str(port), "--yes"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    with running([*cli, "serve"], folder / "edge.log") as pid:
        token = (home / "token").read_text().strip()
        yield Server("clawloop", f"http://127.0.0.1:{port}", {"authorization": f"Bearer {token}"}, "clawloop", pid)


@contextmanager
def mlx_lm_server(model: Path, folder: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port)]
    with running([*command, "--log-level", "ERROR"], folder / "mlx_lm.log") as pid:
        yield Server("mlx_lm.server", f"http://127.0.0.1:{port}", {}, "default_model", pid)


async def wait_for(server: Server, session: aiohttp.ClientSession) -> None:
    """Raises TimeoutError: it does not answer within two minutes."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            await ask(server, session, say("hello"), tokens=2)
            return
        except aiohttp.ClientError:
            await asyncio.sleep(0.3)
    raise TimeoutError(f"{server.name} does not answer at {server.url}; see its log")


def say(text: str, *, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


async def ask(server: Server, session: aiohttp.ClientSession, messages: list[dict[str, str]], *, tokens: int) -> Answer:
    """One streamed chat completion. Raises aiohttp.ClientError: refused or cut off."""
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, count, text = time.perf_counter(), 0.0, 0, ""
    url = f"{server.url}/v1/chat/completions"
    async with session.post(url, json=body, headers=server.headers, raise_for_status=True) as reply:
        async for event in events(reply):
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            for choice in event.get("choices", ()):
                piece = (choice.get("delta") or {}).get("content") or ""
                if piece and not first:
                    first = time.perf_counter() - began
                text += piece
    if not count:
        raise aiohttp.ClientPayloadError(f"{server.name} ended a stream without usage")
    return Answer(first, time.perf_counter() - began, count, text)


async def events(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    rounds: int = 5
    tokens: int = 64
    turns: int = 6
    swaps: int = 6


class Bench:
    """Both servers on one model, and the client."""

    def __init__(self, ours: Server, theirs: Server, session: aiohttp.ClientSession, plan: Plan) -> None:
        self._both, self._session, self._plan = (ours, theirs), session, plan
        self._rng = random.Random(1)

    def words(self, count: int) -> str:
        """A text that no prompt before it began with."""
        return " ".join(self._rng.choice(WORDS) for _ in range(count))

    async def speed(self, at_once: int) -> Pair:
        """Tokens a second over the wall clock, prompt included; the median over rounds."""
        rates: tuple[list[float], list[float]] = ([], [])
        costs: tuple[list[float], list[float]] = ([], [])
        for number in range(self._plan.rounds + 1):
            prompts = [say(self.words(20)) for _ in range(at_once)]
            for side in (0, 1) if number % 2 else (1, 0):
                server, used_s, began = self._both[side], self._both[side].cpu_s(), time.perf_counter()
                asked = (ask(server, self._session, one, tokens=self._plan.tokens) for one in prompts)
                tokens = sum(answer.tokens for answer in await asyncio.gather(*asked))
                if number:  # the first round warms up
                    rates[side].append(tokens / (time.perf_counter() - began))
                    costs[side].append((server.cpu_s() - used_s) / tokens)
        return Pair(*(statistics.median(one) for one in (*rates, *costs)))

    async def session(self) -> tuple[Turns, Turns]:
        """An agent's day: a long system prompt, then turns on top of what was said before."""
        talks = [say(self.words(20), system=self.words(SYSTEM_WORDS)) for _ in self._both]
        warm: tuple[list[float], list[float]] = ([], [])
        cold: tuple[list[float], list[float]] = ([], [])
        for turn in range(self._plan.turns):
            question = self.words(10)
            for side, server in enumerate(self._both):
                fresh = [{"role": "system", "content": self.words(SYSTEM_WORDS)}, *talks[side][1:]]
                cold[side].append((await ask(server, self._session, fresh, tokens=24)).first_s)
                answer = await ask(server, self._session, talks[side], tokens=24)
                if turn:
                    warm[side].append(answer.first_s)
                talks[side] += [{"role": "assistant", "content": answer.text}, *say(question)]
        ours, theirs = (Turns(statistics.median(warm[n]), statistics.median(cold[n])) for n in (0, 1))
        return ours, theirs


@asynccontextmanager
async def started(model: Path, plan: Plan, logs: Path) -> AsyncIterator[Bench]:
    """Both servers on `model`, warm."""
    timeout = aiohttp.ClientTimeout(total=300)
    with edge(model, logs) as ours, mlx_lm_server(model, logs) as theirs:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for server in (ours, theirs):
                await wait_for(server, session)
            yield Bench(ours, theirs, session, plan)


async def measure(model: Path, plan: Plan, logs: Path) -> Found:
    async with started(model, plan, logs) as bench:
        tell("tokens a second")
        one, eight = await bench.speed(1), await bench.speed(8)
        tell("first tokens of a session")
        ours, theirs = await bench.session()
    tell("swaps under load")
    swaps = await measure_swaps(model, logs / "adapters", swaps=plan.swaps)
    return Found(one, eight, ours, theirs, swaps)


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def show(name: str, found: Found) -> None:
    print(f"\n{name}")
    for words, pair in (("1 request", found.one), ("8 at once", found.eight)):
        print(
            f"  tokens/s, {words:10}{pair.ours:8.1f}  mlx_lm.server {pair.theirs:8.1f}  ratio {pair.ratio:.2f}; "
            f"CPU ms a token {1e3 * pair.ours_cpu_s:.2f} and {1e3 * pair.theirs_cpu_s:.2f}"
        )
    for words, turns in (("clawloop", found.ours), ("mlx_lm.server", found.theirs)):
        print(
            f"  first token of a turn, {words:14}{1e3 * turns.warm_s:7.1f} ms, cold {1e3 * turns.cold_s:7.1f} ms, "
            f"ratio {turns.ratio:.3f}"
        )
    swaps = found.swaps
    print(
        f"  {swaps.swaps} swaps under 8 streams: {swaps.lost} of {swaps.requests} requests lost; median gap between "
        f"tokens {1e3 * swaps.median_s:.1f} ms, longest near a swap {1e3 * swaps.longest_s:.1f} ms "
        f"(elsewhere {1e3 * swaps.elsewhere_s:.1f} ms)"
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="scripts/bench-engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=Plan().rounds, help="rounds of each speed")
    parser.add_argument("--quick", action="store_true", help="shows that the bench works, measures little")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end with us
    plan = Plan(rounds=1, tokens=16, turns=2, swaps=1) if options.quick else Plan(rounds=options.rounds)
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        found = {}
        for name, model in make_models(Path(folder)).items():
            logs = Path(folder) / f"logs of {name}"
            logs.mkdir()
            tell(f"{name}: starting both servers")
            found[name] = asyncio.run(measure(model, plan, logs))
    if options.json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        for name, one in found.items():
            show(name, one)
    return 1 if any(one.swaps.lost for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

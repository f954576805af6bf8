"""One round trip of everything real: steps are made by edges that nobody hears, then all are uploaded, one adapter is
learned from them and swapped in on every edge.

The edges make their steps while the server is down, so that the upload is of all of them at once; then both start, and
the clock with them. The model is the demo's, its users are the demo's, and the gate is off: what is measured is time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from demoworld.demo import EDGE_SETTINGS, MODEL
from demoworld.stage import Part, StageError, make_edge, make_server
from demoworld.user import Office

_UPDATES = 5
_LIMIT_S = 600.0
_LOOK_S = 0.05
_AT_ONCE = 16
_SETTLE_S, _QUIET_S = 0.5, 2.0


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each stage: until all edges are up again (their model is loaded anew), from there until the server has
    acknowledged every item, from there until the round has ended, from its end until its adapter is released, and until
    each edge uses it. A stage that ended before the one before it took 0."""

    edges: int
    steps: int
    items: int
    trajectories: int
    make_s: float
    start_s: float
    upload_s: float
    round_s: float
    release_s: float
    swap_s: list[float]
    raw_bytes: int
    sent_bytes: int

    @property
    def total_s(self) -> float:
        """From edges that are up to the last swap."""
        return self.upload_s + self.round_s + self.release_s + max(self.swap_s)

    @property
    def ratio(self) -> float:
        """What was sent for each byte of request."""
        return self.sent_bytes / self.raw_bytes


def measure(folder: Path, *, edges: int, steps: int, say: Callable[[str], object]) -> Trip:
    """Run it in `folder`.

    Raises:
        StageError: a part did not do what it should; the text names its log.
    """
    settings: dict[str, dict[str, object]] = {
        "fleet": {"upload_every_s": 0.5},
        "reward": {"settle_s": _SETTLE_S},
        "gate": {"required": False},
    }
    server = make_server(folder, MODEL, settings=settings)
    parts: list[Part] = []
    try:
        server.start()
        for number in range(edges):
            parts.append(_joined(folder, server, name=f"edge{number + 1}"))
        server.stop()
        say(f"{edges} edges make {steps} steps")
        began = time.monotonic()
        raw_bytes, episodes = asyncio.run(_make(parts, steps))
        make_s = time.monotonic() - began
        made = _settled(parts)
        for part in parts:
            part.stop()
        say("and upload them")
        server.configure({"train": {"batch_trajectories": max(1, episodes // _UPDATES), "lr": 3e-3}})
        return _back(server, parts, made=made, raw_bytes=raw_bytes, make_s=make_s)
    finally:
        for part in [*parts, server]:
            part.stop()


def _back(server: Part, edges: list[Part], *, made: list[dict[str, Any]], raw_bytes: int, make_s: float) -> Trip:
    server.start()
    began = time.monotonic()
    with ThreadPoolExecutor(len(edges)) as pool:
        list(pool.map(lambda edge: edge.start(), edges))
    up = time.monotonic()
    _until(lambda: not any(_waits(edge) for edge in edges), "acknowledged")
    uploaded = time.monotonic()
    _until(lambda: _rounds(server) > 0, "learned")
    learned = time.monotonic()
    _until(lambda: server.get("/v1/status")["adapter"] is not None, "released")
    released = time.monotonic()
    swapped: dict[str, float] = {}

    def all_have_it() -> bool:
        for edge in edges:
            if edge.name not in swapped and edge.get("/v1/status")["adapter_version"] > 0:
                swapped[edge.name] = time.monotonic() - released
        return len(swapped) == len(edges)

    _until(all_have_it, "swapped in")
    (round_,) = server.run("rounds", "list", "--json", expect_json=True)
    states = [edge.get("/v1/status") for edge in edges]
    return Trip(
        edges=len(edges),
        steps=sum(state["steps"] for state in made),
        items=sum(state["outbox_waiting"] + state["outbox_unacknowledged"] for state in made),
        trajectories=round_["trajectories"],
        make_s=make_s,
        start_s=up - began,
        upload_s=uploaded - up,
        round_s=learned - uploaded,
        release_s=released - learned,
        swap_s=[swapped[edge.name] for edge in edges],
        raw_bytes=raw_bytes,
        sent_bytes=sum(state["sent_bytes"] for state in states),
    )


def _joined(folder: Path, server: Part, *, name: str) -> Part:
    edge = make_edge(folder, MODEL, name=name, settings=EDGE_SETTINGS)
    edge.start()
    edge.run("join", server.run("invite", "--json", expect_json=True)["invitation"], "--yes")
    edge.run("privacy", "set", "full", "--yes")
    return edge


async def _make(edges: list[Part], steps: int) -> tuple[int, int]:
    """Have users work until so many steps are kept; the bytes of their requests, and how many episodes they had."""
    raw_bytes = 0

    async def count(request: Any) -> None:
        nonlocal raw_bytes
        if request.url.path.endswith("/chat/completions"):
            raw_bytes += len(request.content)

    offices = []
    for number, edge in enumerate(edges):
        office = Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=number)
        office.client._client.event_hooks["request"].append(count)
        offices.append(office)
    stop, deadline = asyncio.Event(), time.monotonic() + _LIMIT_S
    async with asyncio.TaskGroup() as group:
        for office in offices:
            group.create_task(office.work(stop, concurrency=_AT_ONCE))
        while not stop.is_set():
            await asyncio.sleep(0.5)
            kept = [await asyncio.to_thread(edge.get, "/v1/status") for edge in edges]
            if sum(state["steps"] for state in kept) >= steps or time.monotonic() > deadline:
                stop.set()
    for office in offices:
        await office.client.close()
    return raw_bytes, sum(office.tally.episodes for office in offices)


def _settled(edges: list[Part]) -> list[dict[str, Any]]:
    """How the edges are once nothing more comes into their outboxes."""
    before: list[int] = []
    while (now := [_waits(edge) for edge in edges]) != before:
        before = now
        time.sleep(_QUIET_S)
    return [edge.get("/v1/status") for edge in edges]


def _waits(edge: Part) -> int:
    state = edge.get("/v1/status")
    return int(state["outbox_waiting"] + state["outbox_unacknowledged"])


def _rounds(server: Part) -> int:
    rounds = server.get("/v1/status")["rounds"]
    return int(rounds["passed"] + rounds["refused"] + rounds["failed"])


def _until(condition: Callable[[], bool], what: str) -> None:
    """Raises StageError: it did not come true."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:  # it is busy, or starts just now
            pass
        time.sleep(_LOOK_S)
    raise StageError(f"not {what} within {_LIMIT_S:.0f} s")

"""What is forgotten on a device is deleted by the real server, which signs that it did, while both sides run."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from demoworld.stage import Part, make_edge, make_server
from demoworld.user import Office

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
SERVER: Mapping[str, Mapping[str, object]] = {
    "fleet": {"upload_every_s": 0.2},
    "train": {"batch_trajectories": 1_000_000},
}
EDGE: Mapping[str, Mapping[str, object]] = {
    "privacy": {"hold_s": 0.0, "fill_every_s": 0.1},
    "node": {"poll_s": 0.2},
}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[tuple[Part, Part]]:
    """A server and an edge that has joined it and lets everything leave; stopped at the end."""
    server = make_server(tmp_path, MODEL, settings=SERVER)
    edge = make_edge(tmp_path, MODEL, name="edge", settings=EDGE)
    try:
        server.start()
        edge.start()
        edge.run("join", server.run("invite", "--json", expect_json=True)["invitation"], "--yes")
        edge.run("privacy", "set", "full", "--yes")
        yield server, edge
    finally:
        edge.stop()
        server.stop()


def play(edge: Part) -> None:
    async def played() -> None:
        stop = asyncio.Event()
        office = Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=7)
        async with office, asyncio.TaskGroup() as group:
            group.create_task(office.work(stop, concurrency=2))
            await office.played(3)
            stop.set()

    asyncio.run(played())


def until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def arrived(status: dict[str, Any]) -> bool:
    """Whether something left, and the server has signed for all of it."""
    return bool(status["sent_items"]) and not status["outbox_waiting"] and not status["outbox_unacknowledged"]


def test_a_server_deletes_and_signs_for_what_a_device_forgot(stage: tuple[Part, Part]) -> None:
    server, edge = stage
    play(edge)

    def steps() -> int:
        found: int = server.run("data", "stats", "--json", expect_json=True)["steps"]
        return found

    until(lambda: arrived(edge.get("/v1/status")))
    before, kept = steps(), edge.run("sessions", "list", "--json", expect_json=True)
    assert before > 0
    one = edge.run("sessions", "forget", kept[0]["session_id"], "--yes", "--json", expect_json=True)
    (deletion,) = one["deletions"]
    assert (deletion["state"], deletion["deleted"] >= kept[0]["trainable"]) == ("done", True)
    assert steps() < before
    everything = edge.run("sessions", "forget", "--everything", "--yes", "--json", expect_json=True)
    assert [each["state"] for each in everything["deletions"]] == ["done"]
    assert steps() == 0
    assert edge.run("sessions", "list", "--json", expect_json=True) == []
    device = server.run("devices", "list", "--json", expect_json=True)[0]["device_id"]
    asked = server.run("devices", "show", device, "--json", expect_json=True)["forgotten"]
    assert {each["request_id"] for each in asked} == {
        each["request_id"] for each in edge.run("privacy", "deletions", "--json", expect_json=True)
    }
    edge.run("audit", "verify")
    edge.run("pool", "verify")
    status = edge.get("/v1/status")
    assert (status["steps"], status["not_kept"], status["server_state"]) == (0, 0, "online")

"""The whole loop in real processes: `clawloop-server serve` and `clawloop-edge serve`, driven by their command lines.

A round is made small, so that an adapter comes within seconds; what it learned is the demo's matter.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from clawloop_server import home as homes
from clawloop_server.release.keys import load_keys
from clawloop_server.release.log import ReleaseLog
from clawloop_server.vault.database import ServerDatabase
from demoworld.stage import Part, StageError, make_edge, make_server
from demoworld.user import Office

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
SERVER: Mapping[str, Mapping[str, object]] = {
    "fleet": {"upload_every_s": 0.2},
    "reward": {"settle_s": 0.0},
    "train": {"batch_trajectories": 8, "updates_per_round": 1, "lr": 1e-3},
    "gate": {"required": False},
}
EDGE: Mapping[str, Mapping[str, object]] = {"privacy": {"hold_s": 0.0, "fill_every_s": 0.1}, "node": {"poll_s": 0.2}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Part, Part]]:
    folder = tmp_path_factory.mktemp("loop")
    server = make_server(folder, MODEL, settings=SERVER)
    edge = make_edge(folder, MODEL, name="edge", settings=EDGE)
    try:
        server.start()
        edge.start()
        edge.run("join", server.run("invite", "--json", expect_json=True)["invitation"], "--yes")
        yield server, edge
    finally:
        edge.stop()
        server.stop()


def office_of(edge: Part) -> Office:
    return Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=1)


async def play(edge: Part, episodes: int) -> Office:
    """At least so many judged episodes, four at a time."""
    stop = asyncio.Event()
    async with office_of(edge) as office, asyncio.TaskGroup() as group:
        group.create_task(office.work(stop, concurrency=4))
        await office.played(episodes)
        stop.set()
    return office


def until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def adapter_of(edge: Part) -> int:
    version: int = edge.get("/v1/status")["adapter_version"]
    return version


def test_at_level_off_the_server_hears_nothing(parts: tuple[Part, Part]) -> None:
    server, edge = parts
    asyncio.run(play(edge, 4))
    assert edge.get("/v1/status")["server_state"] == "silent (level off)"
    assert server.get("/v1/status")["devices"]["online"] == 0
    assert edge.run("outbox", "list", "--json", expect_json=True) == []


def test_what_was_rewarded_comes_back_as_an_adapter_while_the_agent_goes_on(parts: tuple[Part, Part]) -> None:
    server, edge = parts
    edge.run("privacy", "set", "full", "--yes")
    office = asyncio.run(play(edge, 12))
    assert office.tally.failed == 0
    until(lambda: adapter_of(edge) >= 1)
    assert server.get("/v1/status")["adapter"]["version"] >= 1
    kept = set(edge.run("pool", "ids", "--json", expect_json=True))
    assert set(office.tally.acknowledged) <= kept
    edge.run("audit", "verify")
    known = edge.run("log", "show", "--json", expect_json=True)["known"]
    assert known["head"]["size"] >= 1
    assert not known["stopped"]
    (log,) = server.run("log", "verify", "--json", expect_json=True)
    assert log["size"] >= known["head"]["size"]
    assert log["heads"] == log["size"]


def test_a_device_that_is_shown_another_log_stops_updating_and_says_so(parts: tuple[Part, Part]) -> None:
    server, edge = parts
    server.stop()
    before = adapter_of(edge)
    forge_log(server.home)
    server.start()
    asyncio.run(play(edge, 12))
    until(lambda: edge.get("/v1/status")["adapter_log"].startswith("adapters are refused: the server's log is not the"))
    assert adapter_of(edge) == before
    with pytest.raises(StageError, match="restore the database"):
        server.run("log", "verify")
    edge.run("log", "accept", "--yes")
    assert not edge.run("log", "show", "--json", expect_json=True)["known"]["stopped"]
    until(lambda: not edge.get("/v1/status")["adapter_log"].startswith("adapters are refused"))


def forge_log(folder: Path) -> None:
    """The server forgets which adapter came first, and signs a log that says otherwise."""
    home = homes.open_home(folder)
    keys = load_keys(home)
    database = ServerDatabase.open(home.database, keys.master)
    log = ReleaseLog(database)
    with database.write():
        (line_id,) = log.lines()
        entries = log.entries(line_id, limit=999)[::-1]
        for statement in ("DELETE FROM log_entries", "DELETE FROM log_nodes", "DELETE FROM log_heads"):
            database.run(statement)
        for entry in entries:
            digest = entry.manifest_sha256 if entry.position else "00" * 32
            log.append(line_id, entry.version, digest, now_ms=1)
            log.sign_head(line_id, keys.release)
    database.close()


def test_a_server_that_is_away_changes_nothing_for_the_agent_and_sync_resumes(parts: tuple[Part, Part]) -> None:
    server, edge = parts
    before = adapter_of(edge)
    server.kill()
    office = asyncio.run(play(edge, 10))
    assert office.tally.failed == 0
    server.start()
    until(lambda: adapter_of(edge) > before, timeout_s=90)


def test_an_edge_killed_while_it_serves_keeps_every_acknowledged_step(parts: tuple[Part, Part]) -> None:
    _server, edge = parts
    version = adapter_of(edge)

    async def killed_in_the_middle() -> list[str]:
        stop = asyncio.Event()
        async with office_of(edge) as office:
            work = asyncio.create_task(office.work(stop, concurrency=4))
            await office.played(6)
            edge.kill()
            stop.set()
            await work
        return office.tally.acknowledged

    acknowledged = asyncio.run(killed_in_the_middle())
    edge.start()
    kept = set(edge.run("pool", "ids", "--json", expect_json=True))
    assert set(acknowledged) <= kept
    assert len(acknowledged) >= 6
    assert adapter_of(edge) >= version
    assert edge.run("pool", "verify", "--json", expect_json=True)["problems"] == []


def test_a_lowered_level_holds_at_once(parts: tuple[Part, Part]) -> None:
    _server, edge = parts
    edge.run("privacy", "set", "off", "--yes")
    until(lambda: edge.get("/v1/status")["server_state"] == "silent (level off)")
    sent = edge.get("/v1/status")["sent_bytes"]
    asyncio.run(play(edge, 4))
    assert edge.get("/v1/status")["sent_bytes"] == sent


def test_rolling_back_is_one_command(parts: tuple[Part, Part]) -> None:
    _server, edge = parts
    before = adapter_of(edge)
    edge.run("adapters", "rollback")
    until(lambda: adapter_of(edge) < before)
    edge.run("adapters", "use", "0")
    until(lambda: adapter_of(edge) == 0)
    with pytest.raises(StageError, match="is not kept here"):
        edge.run("adapters", "use", "999")

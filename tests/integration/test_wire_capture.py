"""What leaves an edge, read off the wire by a proxy that ends its TLS: nothing at `off`, counters at the levels without
steps, and at the others the very bytes that the outbox showed.

The tests go up the levels in turn, on one edge; the last one lowers it in the midst of an upload.
"""

import asyncio
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.records import KeptStep
from clawloop_shared import wire
from clawloop_shared.errors import WireError
from clawloop_shared.messages import AdapterReply, StatusReply, UploadReply, read_invitation
from clawloop_shared.records import Policy, Sampling, Step, StepBatch
from demoworld.stage import BIN, Part, free_ports, make_edge, make_server
from demoworld.user import Office

from .wiretap import Tap, tls_files

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
SERVER: Mapping[str, Mapping[str, object]] = {
    "fleet": {"upload_every_s": 0.2},
    "train": {"batch_trajectories": 1_000_000},
}
EDGE: Mapping[str, Mapping[str, object]] = {
    "privacy": {"hold_s": 86_400.0, "fill_every_s": 0.1},
    "node": {"poll_s": 0.2},
}
WITHOUT_STEPS = ("metrics", "private-deltas", "deltas")
Reply = UploadReply | StatusReply | AdapterReply


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Part, Tap]]:
    folder = tmp_path_factory.mktemp("tap")
    server = make_server(folder, MODEL, settings=SERVER)
    edge = make_edge(folder, MODEL, name="edge", settings=EDGE)
    (port,) = free_ports(1)
    try:
        server.start()
        invitation = server.run("invite", "--json", expect_json=True)["invitation"]
        public = urlsplit(read_invitation(invitation).url).port
        assert public is not None
        with Tap(tls_files(server.home), port=port, server_port=public) as tap:
            edge.start()
            edge.run("join", tap.invitation(invitation), "--yes")
            yield edge, tap
            edge.stop()
    finally:
        edge.stop()
        server.stop()


def play(edge: Part, episodes: int = 3) -> None:
    async def played() -> None:
        stop = asyncio.Event()
        office = Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=time.monotonic_ns() % 1_000)
        async with office, asyncio.TaskGroup() as group:
            group.create_task(office.work(stop, concurrency=2))
            await office.played(episodes)
            stop.set()

    asyncio.run(played())


def until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def items(edge: Part) -> list[dict[str, object]]:
    found: list[dict[str, object]] = edge.run("outbox", "list", "--json", expect_json=True)
    return found


def preview(edge: Part, item_id: str) -> bytes:
    """The bytes that the outbox shows, as its owner can have them."""
    environment = edge._environment()
    command = [str(BIN / edge.command), "outbox", "show", item_id, "--raw"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout


def said(tap: Tap) -> list[Reply]:
    """Every message that was sent; one of any other kind is an error."""
    return [answer_in(payload) for payload in tap.payloads()]


def answer_in(payload: bytes) -> Reply:
    for kind in (UploadReply, StatusReply, AdapterReply):
        try:
            return wire.decode(payload, kind)  # type: ignore[return-value]  # one of the three
        except WireError:
            continue
    raise AssertionError(f"{len(payload)} bytes left that are no answer of ours")


def uploaded(tap: Tap) -> dict[str, bytes]:
    return {item.item_id: item.body for reply in said(tap) if isinstance(reply, UploadReply) for item in reply.items}


def settled(edge: Part, level: str) -> None:
    edge.run("privacy", "set", level, "--yes")
    until(lambda: edge.get("/v1/status")["server_state"] == "online")


def test_at_off_not_one_byte_leaves(tapped: tuple[Part, Tap]) -> None:
    edge, tap = tapped
    tap.forget()  # what joining sent
    play(edge)
    time.sleep(2.0)  # ten times the period in which it would have asked the server
    assert tap.taken == 0
    assert not tap.connections


@pytest.mark.parametrize("level", WITHOUT_STEPS)
def test_the_levels_without_steps_let_out_counters_alone(tapped: tuple[Part, Tap], level: str) -> None:
    edge, tap = tapped
    settled(edge, level)
    play(edge)
    time.sleep(3.0)  # at `full`, what was kept leaves within one
    assert tap.taken > 0
    assert {reply.level for reply in said(tap) if isinstance(reply, StatusReply)} <= {*WITHOUT_STEPS}
    assert uploaded(tap) == {}
    assert items(edge) == []


@pytest.mark.parametrize("level", ["redacted", "full"])
def test_what_is_sent_is_byte_for_byte_what_the_outbox_showed(tapped: tuple[Part, Tap], level: str) -> None:
    edge, tap = tapped
    known = {str(item["item_id"]) for item in items(edge)}
    settled(edge, level)
    tap.forget()
    play(edge)
    until(lambda: [item for item in items(edge) if item["item_id"] not in known and item["state"] == "queued"])
    time.sleep(1.0)  # what the last calls left is put there as well
    assert uploaded(tap) == {}, "held items left before their time"
    shown = {
        str(item["item_id"]): preview(edge, str(item["item_id"]))
        for item in items(edge)
        if item["item_id"] not in known and item["state"] == "queued"
    }
    assert all(wire.decode(body, StepBatch).steps or wire.decode(body, StepBatch).signals for body in shown.values())
    edge.run("outbox", "approve", "--all", "--yes")
    until(lambda: {str(i["item_id"]) for i in items(edge) if i["state"] == "received"} >= set(shown))
    assert uploaded(tap) == shown


def test_what_leaves_besides_messages_has_no_content(tapped: tuple[Part, Tap]) -> None:
    edge, tap = tapped
    requests = list(tap.requests())
    assert requests
    session_ids = [s["session_id"] for s in edge.run("sessions", "list", "--json", expect_json=True)]
    for request in requests:
        assert request.path.startswith("/v1/"), request.path
        assert edge.token().encode() not in request.headers + request.body
        if request.path.endswith("push-object"):
            continue
        assert len(request.body) < 4096, f"{request.path} carries {len(request.body)} bytes"
        assert not [name for name in session_ids if name.encode() in request.headers + request.body]


def test_a_lowered_level_stops_an_upload_in_its_midst_within_a_second(tapped: tuple[Part, Tap]) -> None:
    edge, tap = tapped
    keep_bulk(edge, steps=24)
    until(lambda: sum(item["state"] == "queued" for item in items(edge)) >= 24)
    tap.forget()
    tap.bytes_per_s = 1_000_000
    try:
        edge.run("outbox", "approve", "--all", "--yes")
        until(lambda: tap.taken > 2_000_000)
        edge.run("privacy", "set", "metrics", "--yes")
        time.sleep(1.0)
        taken = tap.taken
        time.sleep(3.0)
        assert tap.taken - taken < 64_000, "the upload went on after the level was lowered"
    finally:
        tap.bytes_per_s = 0
    assert len(uploaded(tap)) < 24, "the upload was over before the level was lowered"


def keep_bulk(edge: Part, *, steps: int) -> None:
    """Steps whose bytes no compression makes smaller, put into the pool beside the running edge: some 0.5 MB each."""
    draw = random.Random(7)
    with open_pool(EdgeHome(edge.home), writer=False) as pool:
        line = str(edge.get("/v1/status")["model_line"])
        for number in range(steps):
            length = 40_000
            step = Step(
                step_id=f"bulk-{number}",
                session_id=f"bulk-{number}",
                run_id=f"bulk-{number}",
                prompt_ids=[1, 2, 3],
                response_ids=[draw.randrange(1, 400) for _ in range(length)],
                response_logprobs=[-draw.random() for _ in range(length)],
                policy=Policy(line),
                sampling=Sampling(),
                finish_reason="stop",
                created_ms=time.time_ns() // 1_000_000,
            )
            kept = KeptStep(step=step, messages=[], reply={"role": "assistant"}, started_ms=1, finished_ms=2)
            pool.keep_step(kept).result()

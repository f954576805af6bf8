"""What leaves over the wire is what the outbox showed, and a level that is lowered stops it in its midst. Real parts on
the edge's side: pool, outbox, handlers, worker and Flower's own connection, over TLS to a server that can be slow.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.handlers import Handlers
from clawloop_edge.node.flower import FlowerTransport
from clawloop_edge.node.transport import Answer, NodeRefused, Withdrawn
from clawloop_edge.node.worker import NodeSettings, NodeWorker
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared import wire
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.messages import STATUS, UPLOAD, StatusReply, StatusRequest, UploadReply, UploadRequest
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy, Sampling, Step

from .fake_fleet import FakeFleet

KEY = bytes(range(32))
SLOW = 400_000
"""bytes a second that the server takes"""
SETTLED_S = 1.0
"""after a level was lowered; what it had on its way by then may still be counted"""
MIB = 1 << 20


class Engine:
    """As much of an engine as the server is told of."""

    line = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
    policy = Policy("line")


@dataclass
class Edge:
    """A device that syncs."""

    pool: Pool
    command: Pool
    """as another process has it"""
    outbox: Outbox
    worker: NodeWorker


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FakeFleet]:
    with FakeFleet(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def edge(tmp_path: Path, fleet: FakeFleet) -> Iterator[Edge]:
    store = KnownKey.of(KEY)
    loop = asyncio.new_event_loop()
    with Pool.open(tmp_path / "home", store, writer=True) as pool, Pool.open(tmp_path / "home", store) as command:
        consent, engine = ConsentLog(pool), Engine()
        outbox = Outbox(pool, consent, hold_s=0)
        handlers = Handlers(
            engine,  # type: ignore[arg-type]
            outbox,
            consent=consent,
            member=fleet.membership(),
            activator=None,  # type: ignore[arg-type]
            keep_cohort=lambda devices: None,
            loop=loop,
        )
        worker = NodeWorker(FlowerTransport(fleet.membership()), handlers, settings=NodeSettings(poll_s=0.05))
        yield Edge(pool, command, outbox, worker)
        worker.stop()
    loop.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def keep_bulk(pool: Pool, *, session: str = "talk", tokens: int = 40_000) -> None:
    """A step whose bytes no compression makes smaller: ten a token."""
    draw = random.Random(tokens)
    step = Step(
        step_id=new_step_id(),
        session_id=session,
        run_id="run",
        prompt_ids=[1, 2, 3],
        response_ids=[draw.randrange(1, 60_000) for _ in range(tokens)],
        response_logprobs=[-draw.random() for _ in range(tokens)],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    kept = KeptStep(step=step, messages=[], reply={"role": "assistant"}, app="agent", started_ms=1, finished_ms=2)
    pool.keep_step(kept).result()


def lower_to(level: Level) -> Callable[[ConsentLog], object]:
    return lambda consent: consent.set_level(level)


LOWERINGS: dict[str, Callable[[ConsentLog], Any]] = {
    "metrics": lower_to(Level.METRICS),
    "redacted": lower_to(Level.REDACTED),
    "off": lower_to(Level.OFF),
    "its session": lambda consent: consent.set_limit(Subject.SESSION, "talk", level=Level.METRICS),
    "its app": lambda consent: consent.set_limit(Subject.APP, "agent", level=Level.OFF),
    "a pause": lambda consent: consent.pause(time.time_ns() // 1_000_000 + 60_000),
}


@pytest.mark.parametrize("how", LOWERINGS)
def test_a_level_lowered_by_another_process_stops_an_upload_within_a_second(
    edge: Edge, fleet: FakeFleet, how: str
) -> None:
    ConsentLog(edge.command).set_level(Level.FULL)
    for _ in range(4):
        keep_bulk(edge.pool)
    edge.outbox.fill()
    size = sum(item.size_bytes for item in edge.outbox.list())
    fleet.bytes_per_s = SLOW
    edge.worker.start()
    fleet.ask(UPLOAD, UploadRequest([], 8 * MIB))
    until(lambda: fleet.pushed_bytes > SLOW // 4)
    LOWERINGS[how](ConsentLog(edge.command))
    began = time.monotonic()
    until(lambda: [entry for entry in AuditLog(edge.pool).entries() if entry.kind == "stopped"])
    assert time.monotonic() - began < SETTLED_S
    pushes = [heard for heard in fleet.heard if heard.path.endswith("push-object")]
    until(lambda: not any(heard.last_s > time.monotonic() - 0.3 for heard in pushes))
    assert max(heard.last_s for heard in pushes) - began < SETTLED_S
    assert fleet.pushed_bytes < size // 2, "nearly all of it had left before the level was lowered"
    assert fleet.answers.empty()
    assert "deactivate-node" not in fleet.paths


def test_a_limit_of_another_session_lets_an_upload_go_on(edge: Edge, fleet: FakeFleet) -> None:
    ConsentLog(edge.command).set_level(Level.FULL)
    keep_bulk(edge.pool, tokens=20_000)
    keep_bulk(edge.pool, session="other", tokens=1_000)
    edge.outbox.fill()
    (wanted, _) = edge.outbox.list()
    edge.outbox.drop(edge.outbox.list()[1].item_id)
    fleet.bytes_per_s = SLOW
    edge.worker.start()
    fleet.ask(UPLOAD, UploadRequest([], 8 * MIB))
    until(lambda: fleet.pushed_bytes > 50_000)
    ConsentLog(edge.command).set_limit(Subject.SESSION, "other", level=Level.OFF)
    reply = wire.decode(fleet.answers.get(timeout=10), UploadReply)
    assert [item.item_id for item in reply.items] == [wanted.item_id]
    assert [entry.kind for entry in AuditLog(edge.pool).entries()] == ["sent"]


def test_what_is_sent_is_byte_for_byte_what_the_outbox_showed(edge: Edge, fleet: FakeFleet) -> None:
    ConsentLog(edge.command).set_level(Level.FULL)
    for session in ("one", "two"):
        keep_bulk(edge.pool, session=session, tokens=500)
    edge.outbox.fill()
    shown = {item.item_id: edge.outbox.get(item.item_id).body for item in edge.outbox.list()}
    edge.worker.start()
    fleet.ask(UPLOAD, UploadRequest([], MIB))
    reply = wire.decode(fleet.answers.get(timeout=10), UploadReply)
    assert {item.item_id: item.body for item in reply.items} == shown
    assert len(shown) == 2


def test_at_off_the_server_is_not_even_called(edge: Edge, fleet: FakeFleet) -> None:
    edge.worker.start()
    keep_bulk(edge.pool, tokens=10)
    fleet.ask(STATUS, StatusRequest())
    for _ in range(10):
        edge.worker.poke()
        time.sleep(0.02)
    assert fleet.connections == 0
    ConsentLog(edge.command).set_level(Level.METRICS)
    assert wire.decode(fleet.answers.get(timeout=10), StatusReply).level == "metrics"


def test_at_metrics_an_upload_has_no_item(edge: Edge, fleet: FakeFleet) -> None:
    ConsentLog(edge.command).set_level(Level.METRICS)
    keep_bulk(edge.pool, tokens=10)
    edge.outbox.fill()
    edge.worker.start()
    fleet.ask(UPLOAD, UploadRequest([], MIB))
    assert wire.decode(fleet.answers.get(timeout=10), UploadReply).items == []


def test_the_level_is_asked_before_each_part_and_a_no_ends_the_sending(fleet: FakeFleet) -> None:
    transport = FlowerTransport(fleet.membership())
    transport.connect()
    fleet.ask(UPLOAD, UploadRequest([], MIB))
    incoming = transport.receive()
    assert incoming is not None
    asked = iter([True, True, False])
    with pytest.raises(Withdrawn):
        transport.send(incoming, Answer(random.Random(1).randbytes(11 * MIB)), permit=lambda: next(asked))
    assert fleet.paths.count("push-object") == 1
    transport.close(goodbye=False)
    assert "deactivate-node" not in fleet.paths


def test_after_a_cut_nothing_is_sent_until_it_connects_again(fleet: FakeFleet) -> None:
    transport = FlowerTransport(fleet.membership())
    transport.connect()
    fleet.ask(UPLOAD, UploadRequest([], MIB))
    incoming = transport.receive()
    assert incoming is not None
    transport.cut()
    heard = len(fleet.heard)
    with pytest.raises(Withdrawn):
        transport.send(incoming, Answer(b"late"), permit=lambda: True)
    assert len(fleet.heard) == heard
    transport.close(goodbye=False)
    transport.connect()
    transport.close()
    assert fleet.paths[-2:] == ["activate-node", "deactivate-node"]


def test_a_message_of_a_run_that_has_ended_is_dropped_and_the_node_stays(fleet: FakeFleet) -> None:
    transport = FlowerTransport(fleet.membership())
    transport.connect()
    fleet.refuses = {"confirm-message-received"}
    fleet.ask(UPLOAD, UploadRequest([], MIB))
    assert transport.receive() is None
    fleet.refuses = {"pull-messages"}
    with pytest.raises(NodeRefused):
        transport.receive()
    transport.close()

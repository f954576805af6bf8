"""What goes wrong for one device, or where nobody expected it, takes nothing from the others and ends no bridge."""

import asyncio
import logging
from pathlib import Path

import pytest

from clawloop_server.fleet import dispatch as dispatching
from clawloop_server.fleet.channel import Channel, Line, NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.errors import StorageError
from clawloop_shared.messages import ADAPTER, LEARN, STATUS, UPLOAD, StatusReply

from .secure_fleet import TASK
from .test_fleet_dispatch import LINE, World

NODES = [NodeInfo(7, "device"), NodeInfo(8, "other")]


class Tasks:
    """Tasks for everybody, but for one whose row is broken."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def due(self, device_id: str, *, adapter_version: int) -> LearnTask | None:
        if device_id == "device":
            raise self.error
        return TASK

    def answered(self, device_id: str, reply: LearnReply) -> None:
        raise AssertionError("nobody answers")


async def greeted(error: Exception) -> tuple[World, Dispatcher]:
    world = World()
    world.members = {7: "device", 8: "other"}
    world.dispatcher = dispatcher = Dispatcher(
        vault=world,
        releases=world,
        members=world,
        sign=lambda received: pytest.fail("nothing is sent"),
        tasks=Tasks(error),
        clock=lambda: world.now_s,
    )
    await dispatcher.work(NODES)
    for node in NODES:
        await dispatcher.reply(Reply(node.node_id, STATUS, wire.encode(StatusReply("deltas", LINE, 0, 0, "1"))))
    return world, dispatcher


@pytest.mark.parametrize(("error", "traceback"), [(StorageError("bad row"), False), (KeyError("odd"), True)])
async def test_one_device_whose_task_cannot_be_looked_up_takes_nothing_from_the_others(
    error: Exception, caplog: pytest.LogCaptureFixture, *, traceback: bool
) -> None:
    world, dispatcher = await greeted(error)
    world.version = 1
    out = await dispatcher.work(None)
    assert sorted((o.node_id, o.type) for o in out if o.type != UPLOAD) == [(7, ADAPTER), (8, ADAPTER), (8, LEARN)]
    (told,) = [record for record in caplog.records if "cannot be looked up" in record.getMessage()]
    assert bool(told.exc_info) is traceback


async def test_an_odd_error_while_a_reply_is_taken_is_that_devices_failure(caplog: pytest.LogCaptureFixture) -> None:
    world, dispatcher = await greeted(StorageError("bad row"))

    def broken(device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        raise ZeroDivisionError

    world.seen = broken  # type: ignore[method-assign]
    await dispatcher.reply(Reply(7, STATUS, wire.encode(StatusReply("deltas", LINE, 0, 0, "1"))))
    assert dispatcher._devices[7].failures == 1
    assert any(record.exc_info for record in caplog.records)


async def test_of_a_large_adapter_so_many_are_offered_at_once_as_fit_and_the_others_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, dispatcher = await greeted(StorageError("bad row"))
    world.version = 1
    monkeypatch.setattr(dispatching, "_MAX_OFFERED_BYTES", 100)
    for wanted in ([7], [8], []):
        assert [out.node_id for out in await dispatcher.work(None) if out.type == ADAPTER] == wanted


class Broken:
    """A hub in which something is wrong that nobody thought of, once."""

    def __init__(self) -> None:
        self.told: list[Reply] = []
        self.errors: list[Exception] = [KeyError("reply"), KeyError("work")]

    async def connected(self) -> None:
        return

    async def work(self, online: list[NodeInfo] | None) -> list[Outgoing]:
        if self.errors:
            raise self.errors.pop()
        return [Outgoing(1, STATUS, b"x")]

    async def reply(self, reply: Reply) -> None:
        if self.errors:
            raise self.errors.pop()
        self.told.append(reply)

    async def wait(self, timeout_s: float) -> None:
        return


async def test_an_odd_error_does_not_end_the_bridges_line_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, file = Broken(), tmp_path / "bridge.json"
    channel = Channel(port)
    await channel.start(file, log=tmp_path / "bridge.log")
    line = await asyncio.to_thread(Line, file, 1)
    with caplog.at_level(logging.ERROR):
        found = [await asyncio.to_thread(line.exchange, None, [Reply(1, STATUS, b"x")], wait_s=0) for _ in range(2)]
    assert [len(orders) for orders in found] == [0, 1]
    assert len(port.told) == 1
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]
    line.close()
    await channel.stop()

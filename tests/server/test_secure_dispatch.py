"""From an accepted task to a delta that waits for a round, through the dispatcher and the edge's table of messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from clawloop_edge.node import messages
from clawloop_server.aggregate.secure import Status
from clawloop_server.aggregate.secure_store import SecureSums
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.deltas import Deltas
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import SumDeltas
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.flat import flatten
from clawloop_shared.messages import (
    SECURE,
    AdapterOffer,
    AdapterReply,
    ItemReceipt,
    ItemReceived,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadItem,
    UploadReply,
    UploadRequest,
)
from clawloop_shared.model_line import ModelLine
from clawloop_shared.secure import Masked, Phase

from .secure_fleet import SHAPE, TASK, Device

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")


class Edge:
    """The handlers of one device that has nothing to upload, and learns at once."""

    def __init__(self, device: Device) -> None:
        self.device, self.sent = device, dict[str, bytes]()

    def status(self, request: StatusRequest) -> StatusReply:
        return StatusReply("private-deltas", LINE, 0, 1, "1")

    def upload(self, request: UploadRequest) -> UploadReply:
        return UploadReply([], False, 0)

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        raise AssertionError("no adapter is offered")

    def learn(self, task: LearnTask) -> LearnReply:
        return LearnReply(task_id=task.task_id, accepted=True)

    def secure(self, request: SecureRequest) -> SecureReply:
        return self.device.member.asked(request)

    def may_leave(self, item_ids: Sequence[str]) -> bool:
        return True

    def stopped(self, item_ids: Sequence[str]) -> None:
        pass

    def answer(self, message: Outgoing) -> Reply:
        """As the node does."""
        found = messages.answer(message.type, message.payload, handlers=self)
        assert not found.error
        if found.items:
            self.sent |= dict.fromkeys(found.items, found.payload)
        return Reply(message.node_id, message.type, found.payload)


class World:
    """A dispatcher with real sums; each of its devices takes on one task."""

    def __init__(self, vault: Vault, keys: ServerKeys, add: Callable[..., str], devices: int) -> None:
        self.now_s = 1000.0
        self.edges = {number: Edge(Device(number)) for number in range(devices)}
        self.ids = {number: add(edge.device.key) for number, edge in self.edges.items()}
        self.seals, self.vault = DeviceSeals(vault.database, keys.master), vault
        self.sums = SecureSums(
            vault.database,
            settings=FederateSettings(secure_phase_s=60),
            shape_of=lambda line_id: SHAPE,
            keep=SumDeltas(vault.database, self.seals),
            clock_ms=lambda: int(self.now_s * 1000),
        )
        self.accepted = set[str]()
        self.dispatcher = Dispatcher(
            vault=self,
            releases=self,
            members=self,
            sign=lambda received: ItemReceipt(b"", b""),
            tasks=self,
            sums=self.sums,
            clock=lambda: self.now_s,
        )

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        raise AssertionError("nothing is uploaded")

    def current_version(self) -> int:
        return 0

    def offer(self, version: int) -> AdapterOffer:
        raise AssertionError("nothing is released")

    def device_of(self, node_id: int) -> str | None:
        return self.ids.get(node_id)

    def cohort(self) -> int:
        return len(self.ids)

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        pass

    def due(self, device_id: str, *, adapter_version: int) -> LearnTask | None:
        return None if device_id in self.accepted else TASK

    def answered(self, device_id: str, reply: LearnReply) -> None:
        self.accepted.add(device_id)
        self.sums.expect(device_id, TASK)

    async def run(self, *, away: Callable[[Phase, int], bool] = lambda phase, number: False) -> None:
        """Until no sum runs; `away`: which devices do not answer in which phase."""
        for _ in range(120):
            for message in await self.dispatcher.work([NodeInfo(number, f"{number}") for number in self.edges]):
                if message.type == SECURE:
                    phase = Phase(wire.decode(message.payload, SecureRequest).phase)
                    if away(phase, message.node_id):
                        continue
                await self.dispatcher.reply(self.edges[message.node_id].answer(message))
            self.now_s += 10
            found = self.sums.overview()
            if found and all(each.status is not Status.RUNNING for each in found):
                return
        raise AssertionError(f"no end: {self.sums.overview()}")

    def mean(self) -> np.ndarray:
        """Of the one delta that waits."""
        deltas = Deltas(self.vault.database, self.seals)
        (waiting,) = deltas.waiting(TASK.line_id)
        delta = deltas.read(waiting.delta_id)
        assert delta is not None
        return flatten(delta.weights)


@pytest.fixture
def world(vault: Vault, keys: ServerKeys, add_device: Callable[..., str]) -> World:
    return World(vault, keys, add_device, 9)


async def test_devices_that_took_on_a_task_are_summed(world: World) -> None:
    await world.run()
    plain = [flatten(edge.device.delta.weights) for edge in world.edges.values()]
    assert np.abs(world.mean() - np.mean(plain, axis=0)).max() < 1e-6
    for edge in world.edges.values():
        (payload,) = edge.sent.values()
        reply = wire.decode(payload, SecureReply)
        assert reply.body == edge.device.left[0], "what the outbox has is what is sent"
        assert reply.item_id == wire.decode(reply.body, Masked).item_id == "item"


@pytest.mark.parametrize("phase", list(Phase)[1:])
async def test_a_third_that_falls_asleep_is_done_without(world: World, phase: Phase) -> None:
    order = list(Phase)
    await world.run(away=lambda at, number: number < 3 and order.index(at) >= order.index(phase))
    stayed = [edge for number, edge in world.edges.items() if number >= 3 or phase in (Phase.CONFIRM, Phase.UNMASK)]
    plain = [flatten(edge.device.delta.weights) for edge in stayed]
    assert np.abs(world.mean() - np.mean(plain, axis=0)).max() < 1e-6

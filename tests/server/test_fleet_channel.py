"""The line between hub and bridge: only with the secret, one bridge at a time, and its end is seen at once."""

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from clawloop_server.errors import FleetError
from clawloop_server.fleet.channel import Channel, Line, NodeInfo, Outgoing, Reply, read_address


class Port:
    """A hub that notes what it is told and sends what it was given."""

    def __init__(self) -> None:
        self.told: list[Reply] = []
        self.out: list[Outgoing] = []
        self.bridges = 0

    async def connected(self) -> None:
        self.bridges += 1

    async def work(self, online: list[NodeInfo] | None) -> list[Outgoing]:
        out, self.out = self.out, []
        return out

    async def reply(self, reply: Reply) -> None:
        self.told.append(reply)

    async def wait(self, timeout_s: float) -> None:
        await asyncio.sleep(min(timeout_s, 0.05))
        self.out.append(Outgoing(1, "query.status", b"late"))


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[tuple[Port, Channel, Path]]:
    port = Port()
    channel = Channel(port)
    file = tmp_path / "bridge.json"
    await channel.start(file, log=tmp_path / "bridge.log")
    yield port, channel, file
    await channel.stop()


async def open_line(file: Path, run_id: int = 1) -> Line:
    return await asyncio.to_thread(Line, file, run_id)


async def test_replies_go_in_and_orders_come_out(hub: tuple[Port, Channel, Path]) -> None:
    port, channel, file = hub
    port.out = [Outgoing(5, "query.upload", b"x" * 3_000_000)]
    line = await open_line(file, run_id=2**63 + 5)
    orders = await asyncio.to_thread(line.exchange, [NodeInfo(5, "d")], [Reply(5, "query.status", b"ok")], wait_s=0)
    assert [order.node_id for order in orders] == [5]
    assert port.told == [Reply(5, "query.status", b"ok")]
    assert channel.connected
    assert channel.run_id == 2**63 + 5
    line.close()
    assert await channel.wait_lost(5)
    assert not channel.connected


async def test_without_work_the_hub_waits_for_some(hub: tuple[Port, Channel, Path]) -> None:
    line = await open_line(hub[2])
    orders = await asyncio.to_thread(line.exchange, [], [], wait_s=1.0)
    assert [order.payload for order in orders] == [b"late"]
    line.close()


async def test_the_file_with_the_secret_is_for_its_owner_alone(hub: tuple[Port, Channel, Path]) -> None:
    assert stat.S_IMODE(hub[2].stat().st_mode) == 0o600


async def test_a_wrong_secret_is_hung_up_on(hub: tuple[Port, Channel, Path], tmp_path: Path) -> None:
    port, _, file = hub
    forged = tmp_path / "forged.json"
    forged.write_bytes(msgspec.json.encode(msgspec.structs.replace(read_address(file), secret=b"guess")))
    line = await open_line(forged)
    with pytest.raises(FleetError, match="hung up"):
        await asyncio.to_thread(line.exchange, [], [], wait_s=0)
    assert port.bridges == 0
    line.close()


async def test_rubbish_on_the_port_changes_nothing(hub: tuple[Port, Channel, Path]) -> None:
    port, _, file = hub
    with socket.create_connection(("127.0.0.1", read_address(file).port)) as raw:
        raw.sendall(b"\xff" * 64)
        raw.settimeout(10)
        assert await asyncio.to_thread(raw.recv, 1) == b""
    assert port.bridges == 0


async def test_a_newer_bridge_takes_over(hub: tuple[Port, Channel, Path]) -> None:
    first = await open_line(hub[2], 1)
    await asyncio.to_thread(first.exchange, [], [], wait_s=0)
    second = await open_line(hub[2], 2)
    await asyncio.to_thread(second.exchange, [], [], wait_s=0)
    with pytest.raises(FleetError):
        await asyncio.to_thread(first.exchange, [], [], wait_s=0)
    assert hub[1].run_id == 2
    assert hub[1].connected
    first.close()
    second.close()

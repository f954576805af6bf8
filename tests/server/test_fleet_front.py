"""The public port: whole bodies however they arrive, an end to those that stall, no half answer taken for a whole."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node

from clawloop_server.fleet import pushes
from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.hub import front
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.front import Front
from clawloop_shared.messages import MAX_JOIN_BYTES


class Desk:
    """Tells how much it was given, and by whom."""

    async def answer(self, body: bytes, *, peer: str = "") -> DeskAnswer:
        return DeskAnswer(400, message=f"{len(body)} bytes from {peer or 'a member'}")


class World:
    """A front before a SuperLink that breaks off in the middle of a large answer."""

    def __init__(self, folder: Path) -> None:
        files = ensure_tls(folder)
        self.tls, self._server_tls = client_context(files), server_context(files)
        self.port = 0

    async def start(self, *, trusted: tuple[str, ...] = ()) -> None:
        app = web.Application()
        app.router.add_post("/v1/fleet/pull-object", self._breaks_off)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._server_tls).start()
        superlink = f"127.0.0.1:{self._runner.addresses[0][1]}"
        self._front = Front(
            superlink, joining=Desk(), forgetting=Desk(), upstream_tls=self.tls, trusted_proxies=trusted
        )
        self.port = await self._front.start("127.0.0.1", 0, tls=self._server_tls)

    async def stop(self) -> None:
        await self._front.stop()
        await self._runner.cleanup()

    async def _breaks_off(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(2 << 20)})
        await response.prepare(request)
        await response.write(b"a" * 1000)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def send(self, *pieces: bytes, path: str = "/v1/join", head: bytes = b"") -> bytes:
        """What comes back until the end of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)
        head = head or b"Content-Length: %d\r\n" % sum(map(len, pieces))
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n" % (path.encode(), head))
        for piece in pieces:
            await writer.drain()
            await asyncio.sleep(0.02)  # so that each is a segment of its own
            writer.write(piece)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        except (ConnectionError, ssl.SSLError):
            return b""
        finally:
            writer.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start()
    yield world
    await world.stop()


async def test_a_join_request_in_several_pieces_is_read_whole(world: World) -> None:
    assert b"2500 bytes" in await world.send(b"a" * 500, b"b" * 1500, b"c" * 500)


async def test_a_join_request_without_a_length_that_is_too_large_is_told_so(world: World) -> None:
    size = MAX_JOIN_BYTES + 1
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"a" * size)
    assert b" 413 " in await world.send(chunk, head=b"Transfer-Encoding: chunked\r\n")


async def test_a_caller_who_stalls_is_hung_up_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_REQUEST_S", 0.2)
    await asyncio.wait_for(world.send(b"a", head=b"Content-Length: 100\r\n"), 5)


async def test_a_connection_that_never_sends_a_whole_request_is_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world._front.stop()
    monkeypatch.setattr(front, "_IDLE_S", 0.3)
    world.port = await world._front.start("127.0.0.1", 0, tls=world._server_tls)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port, ssl=world.tls)
    writer.write(b"POST /v1/join HTTP/1.1\r\nHo")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole(world: World) -> None:
    answer = await world.send(b"x", path="/v1/fleet/pull-object")
    assert b" 503 " not in answer
    assert len(answer) < 2 << 20


@pytest.mark.parametrize("path", ["/v1/fleet/register-node", "/v1/fleet/pull-object?x=1", "/v1/fleet/..%2fcontrol"])
async def test_other_paths_are_not_published(world: World, path: str) -> None:
    assert b" 404 " in await world.send(b"", path=path)


FORWARDED = b"Content-Length: 1\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-For: 8.8.8.8, 10.1.2.3\r\n"


async def test_a_caller_is_its_connection_whatever_it_writes(world: World) -> None:
    assert b"1 bytes from 127.0.0.1" in await world.send(b"a", head=FORWARDED)


async def test_of_a_trusted_proxy_the_last_address_is_believed(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.start(trusted=("127.0.0.1",))
    try:
        assert b"1 bytes from 10.1.2.3" in await world.send(b"a", head=FORWARDED)
        assert b"1 bytes from 127.0.0.1" in await world.send(b"a")
    finally:
        await world.stop()


@pytest.mark.parametrize(("node_id", "status"), [(7, 200), (8, 503), (0, 503)])
async def test_a_poll_of_a_device_for_which_there_is_nothing_does_not_reach_flower(
    tmp_path: Path, node_id: int, status: int
) -> None:
    files = ensure_tls(tmp_path)
    superlink = Front(
        "127.0.0.1:1",  # where nobody listens
        joining=Desk(),
        forgetting=Desk(),
        upstream_tls=client_context(files),
        nothing_for=lambda asked: asked == 7,
    )
    port = await superlink.start("127.0.0.1", 0, tls=server_context(files))
    body = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString() if node_id else b"\xff rubbish"
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_context(files))) as session,
            session.post(f"https://127.0.0.1:{port}/v1/fleet/pull-messages", data=body) as response,
        ):
            assert response.status == status
            if status == 200:
                assert PullMessagesResponse.FromString(await response.read()) == PullMessagesResponse()
                assert response.content_type == "application/protobuf"
    finally:
        await superlink.stop()


def announcing(objects: int) -> bytes:
    tree = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id="b" * 64)] * (objects - 1))
    return bytes(PushMessagesRequest(node=Node(node_id=7), message_object_trees=[tree]).SerializeToString())


async def test_a_node_may_announce_as_many_objects_as_a_message_has_and_no_more(world: World) -> None:
    assert b" 413 " in await world.send(announcing(33), path="/v1/fleet/push-messages")
    assert b" 413 " in await world.send(b"\xff rubbish", path="/v1/fleet/push-messages")
    assert b" 413 " in await world.send(bytes(pushes.MAX_BODY_BYTES + 1), path="/v1/fleet/push-messages")
    assert b" 413 " in await world.send(bytes(pushes.MAX_OBJECT_BYTES + 1), path="/v1/fleet/push-object")
    assert b" 404 " in await world.send(announcing(32), path="/v1/fleet/push-messages"), "passed on to the SuperLink"

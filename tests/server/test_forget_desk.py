"""Forgetting over the public port: only for the device itself, fresh, bounded, answered under the release key."""

import http.client
import io
import json
import os
import random
import signal as signals
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.home import Home
from clawloop_server.hub.allowance import Allowance
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Devices
from clawloop_server.hub.forget import ForgetDesk
from clawloop_server.hub.front import Front
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.store import Vault
from clawloop_shared import signing, wire
from clawloop_shared.errors import StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.messages import (
    FORGET_PATH,
    MAX_FORGET_BYTES,
    ForgetReceipt,
    ForgetRequest,
    SignedAnswer,
    SignedRequest,
    UploadItem,
)
from clawloop_shared.receipts import open_forgotten, sign_forget
from clawloop_shared.records import StepBatch

Make = Callable[..., Any]
NOW_MS = 1_000_000


class NoDesk:
    """Nobody joins here."""

    async def answer(self, body: bytes, *, peer: str) -> DeskAnswer:
        return DeskAnswer(404)


class World:
    """A vault with one device behind a real TLS port."""

    def __init__(self, vault: Vault, keys: ServerKeys, *, folder: Path, add_device: Callable[..., str]) -> None:
        self.vault, self.release_key = vault, keys.release_public
        self.key = signing.new_key()
        self.device = add_device(self.key)
        self.now_s = 0.0
        files = ensure_tls(folder)
        self.tls, self._server_tls = client_context(files), server_context(files)
        self.desk = ForgetDesk(
            vault,
            device=Devices(vault.database).get,
            release_key=keys.release,
            clock=lambda: self.now_s,
            now_ms=lambda: NOW_MS,
        )
        self._front = Front("127.0.0.1:9", joining=NoDesk(), forgetting=self.desk, upstream_tls=self.tls)

    async def start(self) -> None:
        self.port = await self._front.start("127.0.0.1", 0, tls=self._server_tls)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls))

    async def stop(self) -> None:
        await self._session.close()
        await self._front.stop()

    def asking(self, *ids: str, **fields: Any) -> ForgetRequest:
        values: dict[str, Any] = {"request_id": new_id(), "device_id": self.device, "at_ms": NOW_MS} | fields
        return ForgetRequest(record_ids=list(ids), **values)

    async def post(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        url = f"https://127.0.0.1:{self.port}{FORGET_PATH}"
        async with self._session.post(url, data=io.BytesIO(body)) as response:
            return response.status, await response.read(), dict(response.headers)

    async def told(self, request: ForgetRequest) -> ForgetReceipt:
        status, body, _ = await self.post(wire.encode(sign_forget(request, self.key)))
        assert status == 200, body
        return open_forgotten(wire.decode(body, SignedAnswer), self.release_key)

    async def refused(self, signed: SignedRequest) -> tuple[int, str]:
        status, body, _ = await self.post(wire.encode(signed))
        error = json.loads(body)["error"]
        assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
        return status, error["message"]


@pytest.fixture
async def world(vault: Vault, keys: ServerKeys, tmp_path: Path, add_device: Callable[..., str]) -> AsyncIterator[World]:
    folder = tmp_path / "tls"
    folder.mkdir()
    world = World(vault, keys, folder=folder, add_device=add_device)
    await world.start()
    yield world
    await world.stop()


def sent(vault: Vault, device: str, make_step: Make) -> str:
    step = make_step()
    vault.receive(device, [UploadItem(new_id(), "r", "steps", wire.encode(StepBatch([step])))])
    return str(step.step_id)


async def test_a_device_has_its_own_deleted_and_gets_it_in_writing(world: World, make_step: Make) -> None:
    name = sent(world.vault, world.device, make_step)
    request = world.asking(name, "unknown")
    receipt = await world.told(request)
    assert (receipt.request_id, receipt.device_id) == (request.request_id, world.device)
    assert (receipt.deleted, receipt.unknown, receipt.adapters) == (1, 1, [])
    assert world.vault.stats().steps == 0
    assert await world.told(request) == receipt
    assert await world.told(msgspec.structs.replace(request, at_ms=NOW_MS - 1000)) == receipt


async def test_nobody_else_can_ask_for_it(world: World, add_device: Callable[..., str], make_step: Make) -> None:
    name = sent(world.vault, world.device, make_step)
    other_key = signing.new_key()
    add_device(other_key)
    forged = [
        sign_forget(world.asking(name), other_key),
        sign_forget(world.asking(name, device_id=new_id()), world.key),
        SignedRequest(sign_forget(world.asking(name), world.key).payload, b""),
    ]
    answers = [await world.refused(signed) for signed in forged]
    assert {status for status, _ in answers} == {403}
    assert len({message for _, message in answers}) == 1, "which devices there are is told to nobody"
    assert world.vault.stats().steps == 1


@pytest.mark.parametrize("at_ms", [NOW_MS - 300_001, NOW_MS + 300_001])
async def test_an_old_request_is_not_taken_and_the_clock_is_named(world: World, at_ms: int) -> None:
    status, message = await world.refused(sign_forget(world.asking("x", at_ms=at_ms), world.key))
    assert status == 400
    assert "300 s ago" in message
    assert (await world.told(world.asking("x", at_ms=NOW_MS - 300_000))).unknown == 1


async def test_what_is_no_request_is_refused_with_its_reason(world: World) -> None:
    assert (await world.post(b"rubbish"))[0] == 400
    assert (await world.refused(SignedRequest(b"{}", b"")))[0] == 400
    assert (await world.refused(sign_forget(world.asking(), world.key)))[0] == 400
    payload = msgspec.json.encode({**msgspec.to_builtins(world.asking("x")), "record_ids": [7]})
    signature = signing.sign(world.key, "forget-request", payload=payload)
    assert (await world.refused(SignedRequest(payload, signature)))[0] == 400
    assert (await world.post(bytes(MAX_FORGET_BYTES + 1)))[0] == 413


async def test_a_request_id_stands_for_one_question(world: World) -> None:
    await world.told(world.asking("x", request_id="one"))
    status, message = await world.refused(sign_forget(world.asking("y", request_id="one"), world.key))
    assert (status, "give this one an id of its own" in message) == (409, True)


async def test_a_device_that_asks_too_often_waits_and_the_others_do_not(
    world: World, add_device: Callable[..., str]
) -> None:
    many = [f"{n}" for n in range(10_000)]
    for _ in range(2):
        await world.told(world.asking(*many))
    status, body, headers = await world.post(wire.encode(sign_forget(world.asking(*many), world.key)))
    assert (status, json.loads(body)["error"]["message"]) == (429, "too many forget requests of this device")
    world.device, world.key, first = add_device(key := signing.new_key()), key, (world.device, world.key)
    assert (await world.told(world.asking("x"))).unknown == 1
    world.device, world.key = first
    world.now_s += int(headers["Retry-After"])
    assert (await world.told(world.asking(*many))).unknown == 0 + len(many)


async def test_a_revoked_device_is_heard(world: World, make_step: Make) -> None:
    sent(world.vault, world.device, make_step)
    Devices(world.vault.database).revoke(world.device)
    assert (await world.told(world.asking(everything=True))).deleted == 1


async def test_of_a_deleted_device_it_is_signed_that_nothing_is_here(world: World, make_step: Make) -> None:
    sent(world.vault, world.device, make_step)
    Devices(world.vault.database).bury(world.device)
    receipt = await world.told(world.asking("x", "y"))
    assert (receipt.deleted, receipt.unknown, receipt.device_deleted) == (0, 2, True)
    assert world.vault.stats().steps == 0, "it is so before it is signed, also if the deletion ended halfway"
    assert (await world.refused(sign_forget(world.asking("x", at_ms=1), world.key)))[0] == 400


async def test_what_is_not_gone_from_the_disk_is_not_acknowledged(
    world: World, make_step: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = world.asking(sent(world.vault, world.device, make_step))

    def scrub() -> None:
        raise StorageError("the log could not be emptied")

    with monkeypatch.context() as broken:
        broken.setattr(world.vault.database, "scrub", scrub)
        status, body, headers = await world.post(wire.encode(sign_forget(request, world.key)))
    assert (status, headers["Retry-After"]) == (503, "10")
    assert b"could not be emptied" not in body
    assert (await world.told(request)).deleted == 1


def test_an_allowance_fills_up_again_and_never_over_its_brim() -> None:
    now_s = 0.0
    allowance = Allowance(6, clock=lambda: now_s)
    assert [allowance.take("a", 2) for _ in range(4)] == [0, 0, 0, 21]
    assert allowance.take("b", 6) == 0
    now_s = 20
    assert [allowance.take("a", 2) for _ in range(2)] == [0, 21]
    now_s = 10_000
    assert [allowance.take("a", 2) for _ in range(4)] == [0, 0, 0, 21]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


_SERVER = """
import asyncio, sys
from pathlib import Path
from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.home import open_home
from clawloop_server.hub.devices import Devices
from clawloop_server.hub.forget import ForgetDesk
from clawloop_server.hub.front import Front
from clawloop_server.release.keys import load_keys
from clawloop_server.vault.store import Vault

async def main():
    home = open_home(Path(sys.argv[1]))
    keys = load_keys(home)
    vault = Vault.open(home, keys.master)
    files = ensure_tls(home.keys)
    desk = ForgetDesk(vault, device=Devices(vault.database).get, release_key=keys.release, per_minute=1e9)
    front = Front("127.0.0.1:9", joining=desk, forgetting=desk, upstream_tls=client_context(files))
    print(await front.start("127.0.0.1", 0, tls=server_context(files)), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def sender() -> Iterator[ThreadPoolExecutor]:
    """A thread that sends while this one kills."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def asked(port: int, tls: ssl.SSLContext, body: bytes) -> bytes | None:
    """The answer's body; None if the server died over it."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=tls, timeout=30)
    try:
        connection.request("POST", FORGET_PATH, body)
        response = connection.getresponse()
        found = response.read()
        assert response.status == 200, found
        return found
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_kill_9_in_the_middle_of_requests_ends_in_the_same_answers_and_nothing_left(
    vault: Vault,
    home: Home,
    keys: ServerKeys,
    add_device: Callable[..., str],
    make_step: Make,
    sender: ThreadPoolExecutor,
) -> None:
    key, size, rng = signing.new_key(), 30, random.Random(5)
    device = add_device(key)
    tls = client_context(ensure_tls(home.keys))
    bodies: list[bytes] = []
    for _ in range(12):
        steps = [make_step() for _ in range(size)]
        vault.receive(device, [UploadItem(new_id(), "r", "steps", wire.encode(StepBatch(steps)))])
        request = ForgetRequest(
            request_id=new_id(), device_id=device, at_ms=now_ms(), record_ids=[s.step_id for s in steps]
        )
        bodies.append(wire.encode(sign_forget(request, key)))
    answers: dict[bytes, bytes] = {}
    while len(answers) < len(bodies):
        command = [sys.executable, "-c", _SERVER, str(home.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            port = int(server.stdout.readline())
            for done, body in enumerate(body for body in bodies if body not in answers):
                under_way = sender.submit(asked, port, tls, body)
                if done == 2:
                    time.sleep(rng.uniform(0, 0.02))  # the moment of the kill: anywhere in the request
                    os.kill(server.pid, signals.SIGKILL)
                found = under_way.result()
                if found is None:
                    break
                answers[body] = found
            server.kill()
        assert vault.stats().steps % size == 0
    assert vault.stats().steps == 0
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(home.folder)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        port = int(server.stdout.readline())
        assert {body: asked(port, tls, body) for body in bodies} == answers
        server.kill()
    receipts = [open_forgotten(wire.decode(one, SignedAnswer), keys.release_public) for one in answers.values()]
    assert [(r.deleted, r.unknown) for r in receipts] == [(size, 0)] * len(bodies)

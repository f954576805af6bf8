"""A server's real desks behind its real port, with a database and without Flower: for tests of joining and leaving."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clawloop_server.errors import FleetError
from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.home import create
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.forget import ForgetDesk
from clawloop_server.hub.front import Front
from clawloop_server.hub.invitations import Invitations
from clawloop_server.hub.join import JoinDesk
from clawloop_server.hub.members import HubMembers
from clawloop_server.hub.membership import MemberDesk
from clawloop_server.release.keys import ServerKeys, create_keys
from clawloop_server.vault.store import Vault
from clawloop_shared.membership import LEAVE_PATH, ROTATE_PATH, STANDING_PATH
from clawloop_shared.messages import FORGET_PATH, JOIN_PATH, Invitation, SignedAnswer, write_invitation
from clawloop_shared.model_line import ModelLine

T = TypeVar("T")
LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")


class MembersHub:
    """The hub, on a loop in a thread of its own. `lost`: paths whose answers do not arrive, though all is done;
    `held`: when set, answers are held back until `go`."""

    def __init__(self, folder: Path, *, line: ModelLine = LINE, approve: bool = False) -> None:
        self.home = create(folder)
        self.keys: ServerKeys = create_keys(self.home)
        self.tls = ensure_tls(self.home.keys)
        self.vault = Vault.open(self.home, self.keys.master)
        self.members = HubMembers(self.vault.database, line_id=line.line_id, approve=approve)
        self.devices = self.members.devices
        self.line, self.clock_off_ms = line, 0
        self.lost: set[str] = set()
        self.held: set[str] = set()
        self.done, self.go = threading.Event(), threading.Event()
        self.flower_up, self.calls = True, list[str]()
        self.port = self._numbers = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.clock_off_ms

    def invite(self) -> str:
        code = Invitations(self.vault.database).create()
        return write_invitation(Invitation(self.url, self.tls.ca.read_text(), self.keys.root_public, code))

    def statement(self) -> SignedAnswer:
        return self.keys.release_statement(now_ms=self.now_ms())

    async def register(self, device_id: str) -> int:
        if not self.flower_up:
            raise FleetError("away")
        self._numbers += 1
        self.devices.set_node(device_id, self._numbers)
        return self._numbers

    # running

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        found: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return found.result(60)

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self.call(self._start())

    def stop(self) -> None:
        """Go away; `start` comes back at the same port."""
        self.go.set()
        self.call(self._front.stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.vault.close()

    async def _start(self) -> None:
        join = JoinDesk(
            self.members,
            register=lambda _, device_id: self.register(device_id),
            line=self.line,
            release_key=self.keys.release_public,
            statement=self.statement,
        )
        member = MemberDesk(
            self.devices,
            register=self.register,
            release_key=self.keys.release,
            statement=self.statement,
            now_ms=self.now_ms,
            per_minute=1e6,
        )
        forget = ForgetDesk(
            self.vault, device=self.devices.get, release_key=self.keys.release, now_ms=self.now_ms, per_minute=1e6
        )
        desk = _Desk(self, join=join, member=member, forget=forget)
        upstream = client_context(self.tls)
        self._front = Front(
            "127.0.0.1:9", joining=desk, forgetting=desk.forgetting, upstream_tls=upstream, members=desk
        )
        self.port = await self._front.start("127.0.0.1", self.port, tls=server_context(self.tls))

    async def answered(self, path: str, work: Coroutine[Any, Any, DeskAnswer]) -> DeskAnswer:
        answer = await work
        self.calls.append(path)
        self.done.set()
        if path in self.held:
            await asyncio.to_thread(self.go.wait, 60)
        return DeskAnswer(503, message="lost") if path in self.lost else answer


class _Forgetting:
    def __init__(self, hub: MembersHub, desk: ForgetDesk) -> None:
        self._hub, self._desk = hub, desk

    async def answer(self, body: bytes) -> DeskAnswer:
        return await self._hub.answered(FORGET_PATH, self._desk.answer(body))


class _Desk:
    def __init__(self, hub: MembersHub, *, join: JoinDesk, member: MemberDesk, forget: ForgetDesk) -> None:
        self._hub, self._join, self._member = hub, join, member
        self.forgetting = _Forgetting(hub, forget)

    async def answer(self, body: bytes, *, peer: str) -> DeskAnswer:
        return await self._hub.answered(JOIN_PATH, self._join.answer(body, peer=peer))

    async def standing(self, body: bytes) -> DeskAnswer:
        return await self._hub.answered(STANDING_PATH, self._member.standing(body))

    async def rotate(self, body: bytes) -> DeskAnswer:
        return await self._hub.answered(ROTATE_PATH, self._member.rotate(body))

    async def leave(self, body: bytes) -> DeskAnswer:
        return await self._hub.answered(LEAVE_PATH, self._member.leave(body))


@contextmanager
def serving(folder: Path, *, line: ModelLine = LINE, approve: bool = False) -> Iterator[MembersHub]:
    """A hub that listens."""
    hub = MembersHub(folder, line=line, approve=approve)
    hub.start()
    try:
        yield hub
    finally:
        hub.close()

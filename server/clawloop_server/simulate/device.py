"""A device that is not there: it joins, polls, answers and takes adapters as the edge does, and has no model.

It uploads made-up steps, or says that it learned and uploads made-up deltas. It takes an adapter when the manifest's
signature and the files' hashes are right; the weights are looked at by nobody. How it waits between polls is the edge's
own rule (its node worker).
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable
from typing import Any

import msgspec

from clawloop_server.errors import FleetError
from clawloop_server.simulate.node import CallFailed, Node
from clawloop_shared import signing, wire
from clawloop_shared.deltas import DELTA_KIND, LearnReply, LearnTask
from clawloop_shared.errors import ClawloopError
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.manifest import check_files, open_manifest
from clawloop_shared.membership import RELEASE, open_statement, prove_join
from clawloop_shared.messages import (
    ADAPTER,
    LEARN,
    MAX_JOIN_BYTES,
    MAX_PAYLOAD_BYTES,
    SECURE,
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    JoinReply,
    JoinRequest,
    SecureReply,
    SecureRequest,
    StatusReply,
    UploadItem,
    UploadReply,
    UploadRequest,
)
from clawloop_shared.model_line import ModelLine
from clawloop_shared.receipts import open_item
from clawloop_shared.records import Policy, Sampling, Step, StepBatch

_QUICK_S, _JITTER, _RETRY_S, _MAX_RETRY_S = 0.02, 0.2, 0.5, 60.0
_HEARTBEAT_AT = (0.5, 0.8)
_APP = "simulated"


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """What every simulated device does. `items`: how many it makes in all, one each `item_every_s`, of `item_steps`
    steps with `step_tokens` tokens."""

    poll_s: float
    heartbeat_s: float
    keep_s: float
    items: int
    item_every_s: float
    item_steps: int
    step_tokens: int
    vocabulary: int


class PickUp(msgspec.Struct, frozen=True):
    """A device took an adapter."""

    version: int
    at_ms: int


class Account(msgspec.Struct, kw_only=True):
    """What one device lived through. `acknowledged`: its items of steps that the server says are on its disk,
    `waiting`: items that it has not."""

    device_id: str = ""
    active: bool = False
    """it has a connection"""
    answered: int = 0
    """messages of the server"""
    polls: int = 0
    calls: dict[str, int] = {}
    errors: dict[str, int] = {}
    pick_ups: list[PickUp] = []
    refused: list[str] = []
    acknowledged: list[str] = []
    deltas: list[str] = []
    """those of them that are deltas, by the same word"""
    waiting: int = 0
    version: int = 0


class Device:
    """One of many."""

    def __init__(
        self,
        node: Node,
        *,
        code: str,
        root_key: bytes,
        line: ModelLine,
        habits: Habits,
        learns: ModelShape | None = None,
    ) -> None:
        """`learns`: it is at level `deltas`, and says that it learns such a model; else it is at `full`."""
        self._node, self._code, self._root_key, self._line, self._habits = node, code, root_key, line, habits
        self._release_key = b""
        self._outbox: dict[str, UploadItem] = {}
        self._made, self._learns = 0, learns
        self._resting = False
        self._stopping = asyncio.Event()
        self.account = Account(calls=node.calls, errors={}, pick_ups=[], refused=[], acknowledged=[], deltas=[])

    @property
    def drained(self) -> bool:
        """Whether the server has told of every item that it has it."""
        return not self._outbox

    def rest(self) -> None:
        """Make no more items, and learn no more."""
        self._made, self._resting = self._habits.items, True

    async def live(self) -> None:
        """Join, then serve until `stop`."""
        if not await self._tried(self._join):
            await self._node.close()
            return
        others = [asyncio.create_task(self._make()), asyncio.create_task(self._beat())]
        try:
            while not self._stopping.is_set():
                if await self._tried(self._activate):
                    await self._serve()
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._goodbye()

    def stop(self) -> None:
        """Leave at the next opportunity."""
        self._stopping.set()

    # being there

    async def _tried(self, act: Any) -> bool:
        """Whether it worked before `stop`, however often it had to be tried."""
        wait_s = _RETRY_S
        while not self._stopping.is_set():
            try:
                await act()
                return True
            except CallFailed as error:
                self._failed(error)
            await self._sleep(wait_s)
            wait_s = min(wait_s * 2, _MAX_RETRY_S)
        return False

    async def _join(self) -> None:
        key = signing.new_key()
        request = JoinRequest(
            code=self._code,
            device_key=signing.public_key(key),
            node_key_pem=self._node.public_pem,
            line=self._line,
        )
        proven = wire.encode(prove_join(request, key))
        reply = wire.decode(await self._node.join(proven), JoinReply, max_bytes=MAX_JOIN_BYTES)
        now_ms = time.time_ns() // 1_000_000
        if open_statement(reply.statement, self._root_key, purpose=RELEASE, now_ms=now_ms).key != reply.release_key:
            raise FleetError("the server's root key does not vouch for its release key")
        self.account.device_id, self._release_key = reply.device_id, reply.release_key

    async def _activate(self) -> None:
        await self._node.activate()
        self.account.active = True

    async def _serve(self) -> None:
        """Poll and answer until something fails."""
        poll_s, wait_s = self._habits.poll_s, _QUICK_S
        try:
            while not self._stopping.is_set():
                self.account.polls += 1
                message = await self._node.receive()
                if message is None:
                    await self._sleep(wait_s)
                    wait_s = min(wait_s * 2, poll_s)
                    continue
                kind, payload, handle = message
                answer, eager = self._answer(kind, payload)
                await self._node.send(handle, wire.encode(answer))
                self.account.answered += 1
                wait_s = min(_QUICK_S, poll_s) if eager else poll_s
        except CallFailed as error:
            self._failed(error)
            await self._sleep(_RETRY_S)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._habits.heartbeat_s * random.uniform(*_HEARTBEAT_AT))
            if self.account.active:
                with self._counted():
                    await self._node.beat()

    async def _make(self) -> None:
        """Put items into the outbox, as somebody's work would."""
        if self._learns is not None:  # at its level steps stay where they are
            return
        await asyncio.sleep(random.uniform(0, self._habits.item_every_s))
        while self._made < self._habits.items:
            self._made += 1
            item = self._item()
            self._outbox[item.item_id] = item
            await asyncio.sleep(self._habits.item_every_s)

    async def _goodbye(self) -> None:
        with self._counted():
            await self._node.leave()
        self.account.waiting = len(self._outbox)

    async def _sleep(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s * random.uniform(1 - _JITTER, 1 + _JITTER)):
                await self._stopping.wait()

    @contextlib.contextmanager
    def _counted(self) -> Any:
        try:
            yield
        except CallFailed as error:
            self._failed(error)

    def _failed(self, error: CallFailed) -> None:
        self.account.errors[error.kind] = self.account.errors.get(error.kind, 0) + 1

    # answers

    def _answer(self, kind: str, payload: bytes) -> tuple[msgspec.Struct, bool]:
        """The answer, and whether another message is likely soon."""
        if kind == UPLOAD:
            upload = self._upload(wire.decode(payload, UploadRequest))
            return upload, upload.more
        if kind == STATUS:
            waiting = len(self._outbox)
            level = Level.FULL if self._learns is None else Level.DELTAS
            return StatusReply(level, self._line, self.account.version, waiting, _APP), True
        if kind == ADAPTER:
            return self._adapter(wire.decode(payload, AdapterOffer, max_bytes=MAX_PAYLOAD_BYTES)), True
        if kind == LEARN:
            return self._learn(wire.decode(payload, LearnTask)), True
        if kind == SECURE:
            asked = wire.decode(payload, SecureRequest)
            return SecureReply(asked.sum_id, asked.phase, refused="it has nothing to sum"), True
        raise FleetError(f"the server sent a message of type {kind!r:.60}, which no device knows")

    def _learn(self, task: LearnTask) -> LearnReply:
        if self._learns is None or self._resting:
            return LearnReply(task_id=task.task_id, accepted=False, reason="it has nothing to learn with")
        from clawloop_server.simulate.learning import made_delta

        item = UploadItem(new_id(), "simulated", DELTA_KIND, wire.encode(made_delta(task, self._learns)))
        self._outbox[item.item_id] = item
        return LearnReply(task_id=task.task_id, accepted=True)

    def _upload(self, request: UploadRequest) -> UploadReply:
        for receipt in request.receipts:
            received = open_item(receipt, self._release_key)
            if received.device_id == self.account.device_id and received.item_id in self._outbox:
                kind = self._outbox.pop(received.item_id).kind
                known = self.account.deltas if kind == DELTA_KIND else self.account.acknowledged
                known.append(received.item_id)
        items, size_bytes = list[UploadItem](), 0
        for item in self._outbox.values():
            size_bytes += len(item.body)
            if items and size_bytes > request.max_bytes:
                return UploadReply(items, True, self.account.version)
            items.append(item)
        return UploadReply(items, False, self.account.version)

    def _adapter(self, offer: AdapterOffer) -> AdapterReply:
        try:
            manifest = open_manifest(offer.manifest, self._release_key)
            check_files(manifest, offer.files)
        except ClawloopError as error:
            self.account.refused.append(str(error)[:200])
            return AdapterReply(self.account.version, installed=False, reason=type(error).__name__)
        self.account.version = manifest.version
        self.account.pick_ups.append(PickUp(manifest.version, time.time_ns() // 1_000_000))
        return AdapterReply(manifest.version, installed=True)

    def _item(self) -> UploadItem:
        run_id = new_id()
        steps = [self._step(run_id) for _ in range(self._habits.item_steps)]
        return UploadItem(new_id(), "simulated", "steps.v1", wire.encode(StepBatch(steps=steps)))

    def _step(self, run_id: str) -> Step:
        habits = self._habits
        response = max(1, habits.step_tokens // 4)
        ids = [random.randrange(habits.vocabulary) for _ in range(max(1, habits.step_tokens - response) + response)]
        return Step(
            step_id=new_step_id(),
            session_id=run_id,
            run_id=run_id,
            prompt_ids=ids[:-response],
            response_ids=ids[-response:],
            response_logprobs=[-random.random() for _ in range(response)],
            policy=Policy(line=self._line.line_id),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=time.time_ns() // 1_000_000,
        )


async def gathered(work: list[Awaitable[None]]) -> list[BaseException]:
    """Wait for all; what those that failed raised."""
    done = await asyncio.gather(*work, return_exceptions=True)
    return [error for error in done if isinstance(error, BaseException)]

"""What this device answers its server: how it is, what may leave, and whether it took an adapter.

Called in the node's thread. What needs the event loop (an adapter) is handed over to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.levels import Level
from clawloop_shared.messages import (
    MAX_PAYLOAD_BYTES,
    AdapterOffer,
    AdapterReply,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadReply,
    UploadRequest,
)

if TYPE_CHECKING:
    from clawloop_edge.adapters.activate import Activator
    from clawloop_edge.adapters.log import LogBook
    from clawloop_edge.engine.protocol import Engine, TextEngine
    from clawloop_edge.node.join import Membership
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.outbox import Outbox

ENVELOPE_BYTES = 1 << 20


class TaskDesk(Protocol):
    """Takes on tasks of learning at home."""

    def offered(self, task: LearnTask) -> LearnReply:
        """Keep the task for when there is time for it, or say why not."""
        ...

    def learning(self) -> str:
        """Where learning at home stands, in a word or two; empty at levels without it."""
        ...


class SumMember(Protocol):
    """Takes part in secure sums."""

    def asked(self, request: SecureRequest) -> SecureReply:
        """This device's part of one phase, or why there is none."""
        ...


class LargeDesk(Protocol):
    """What is too large for a message."""

    def send(self, above_bytes: int, max_bytes: int) -> None:
        """Begin to send an item of such a size."""
        ...

    def fetch(self, offer: AdapterOffer, *, serving: int) -> AdapterReply:
        """Begin to fetch the files of an offer, or say why not."""
        ...


class Handlers:
    """The edge's side of the fixed set of messages."""

    def __init__(
        self,
        engine: Engine | TextEngine,
        outbox: Outbox,
        *,
        consent: ConsentLog,
        member: Membership,
        activator: Activator,
        keep_cohort: Callable[[int], None],
        loop: asyncio.AbstractEventLoop,
        tasks: TaskDesk | None = None,
        sums: SumMember | None = None,
        large: LargeDesk | None = None,
        log: LogBook | None = None,
    ) -> None:
        """`keep_cohort` is told how many devices the server says that it learns from; without `tasks` nothing is
        learned here, without `sums` nothing is summed. `log`: the server's log of adapters, as far as it is known."""
        self._engine, self._outbox, self._consent, self._member = engine, outbox, consent, member
        self._activator, self._keep_cohort, self._loop = activator, keep_cohort, loop
        self._tasks, self._sums, self._large, self._log = tasks, sums, large, log
        self._cohort = 0

    def status(self, request: StatusRequest) -> StatusReply:
        """How this device is: counters and hashes, no content.

        Raises:
            ConsentError: the level is off, so not even that may leave.
        """
        if request.cohort > 0 and request.cohort != self._cohort:
            self._keep_cohort(request.cohort)
            self._cohort = request.cohort
        return StatusReply(
            level=self._allowed(),
            line=self._engine.line,
            adapter_version=self._engine.policy.version,
            outbox_items=self._outbox.waiting(),
            app_version=version("clawloop"),
            learning=self._tasks.learning() if self._tasks else "",
            log_size=self._log_size(),
        )

    def upload(self, request: UploadRequest) -> UploadReply:
        """Take the server's receipts for what it has on disk, and give the next items that may leave.

        Raises:
            ConsentError: the level is off, or was lowered this very moment.
            SignatureInvalid, ReceiptInvalid: a receipt is not the server's word for what it got from us.
        """
        self._allowed()
        member = self._member
        self._outbox.accept(request.receipts, device_id=member.device_id, release_key=member.release_key)
        limit = min(request.max_bytes, MAX_PAYLOAD_BYTES - ENVELOPE_BYTES)
        items, more = self._outbox.next_items(limit)
        self._outbox.mark_sent([item.item_id for item in items])
        if self._large is not None:
            self._large.send(limit, request.max_blob_bytes)
        return UploadReply(items=items, more=more, adapter_version=self._engine.policy.version)

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        """Check and install an adapter while calls go on; a bad one is refused with its reason. Raises ConsentError."""
        self._allowed()
        return msgspec.structs.replace(self._taken(offer), log_size=self._log_size())

    def _taken(self, offer: AdapterOffer) -> AdapterReply:
        if offer.links and self._large is not None:
            refusal = self._activator.refusal(offer)
            return refusal or self._large.fetch(offer, serving=self._engine.policy.version)
        return asyncio.run_coroutine_threadsafe(self._activator.install(offer), self._loop).result()

    def _log_size(self) -> int:
        return self._log.known.size if self._log else 0

    def learn(self, task: LearnTask) -> LearnReply:
        """Take on a task of learning at home, or say why not. Raises ConsentError."""
        self._allowed()
        if self._tasks is None:
            return LearnReply(task_id=task.task_id, accepted=False, reason="this device does not learn at home")
        return self._tasks.offered(task)

    def secure(self, request: SecureRequest) -> SecureReply:
        """Take part in a phase of a secure sum, or say why not. Raises ConsentError."""
        self._allowed()
        if self._sums is None:
            return SecureReply(request.sum_id, request.phase, refused="this device takes no part in secure sums")
        return self._sums.asked(request)

    def may_leave(self, item_ids: Sequence[str]) -> bool:
        """Whether these items may go out now; none: whether anything may."""
        return self._outbox.may_still_leave(item_ids)

    def stopped(self, item_ids: Sequence[str]) -> None:
        """The sending of these items was broken off."""
        self._outbox.mark_stopped(item_ids)

    def _allowed(self) -> Level:
        """The level, if it lets anything out: it may have been lowered since this message was taken."""
        level = self._consent.level()
        if level is Level.OFF:
            raise ConsentError("the level is off; nothing is answered")
        return level

"""What this device answers its server: how it is, what may leave, and whether it took an adapter.

Called in the node's thread. What needs the event loop (an adapter) is handed over to it.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING

from clawloop_edge.errors import ConsentError
from clawloop_shared.levels import Level
from clawloop_shared.messages import (
    MAX_PAYLOAD_BYTES,
    AdapterOffer,
    AdapterReply,
    StatusReply,
    UploadReply,
    UploadRequest,
)

if TYPE_CHECKING:
    from clawloop_edge.adapters.activate import Activator
    from clawloop_edge.engine.protocol import Engine, TextEngine
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.outbox import Outbox

ENVELOPE_BYTES = 1 << 20


class Handlers:
    """The edge's side of the fixed set of messages."""

    def __init__(
        self,
        engine: Engine | TextEngine,
        outbox: Outbox,
        *,
        consent: ConsentLog,
        activator: Activator,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._engine, self._outbox, self._consent = engine, outbox, consent
        self._activator, self._loop = activator, loop

    def status(self) -> StatusReply:
        """How this device is: counters and hashes, no content.

        Raises:
            ConsentError: the level is off, so not even that may leave.
        """
        return StatusReply(
            level=self._allowed(),
            line=self._engine.line,
            adapter_version=self._engine.policy.version,
            outbox_items=self._outbox.waiting(),
            app_version=version("clawloop"),
        )

    def upload(self, request: UploadRequest) -> UploadReply:
        """Forget what the server has on disk, and give the next items that may leave. Raises ConsentError."""
        self._allowed()
        self._outbox.mark_received(request.received)
        limit = min(request.max_bytes, MAX_PAYLOAD_BYTES - ENVELOPE_BYTES)
        items, more = self._outbox.next_items(limit)
        self._outbox.mark_sent([item.item_id for item in items])
        return UploadReply(items=items, more=more, adapter_version=self._engine.policy.version)

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        """Check and install an adapter while calls go on; a bad one is refused with its reason. Raises ConsentError."""
        self._allowed()
        return asyncio.run_coroutine_threadsafe(self._activator.install(offer), self._loop).result()

    def _allowed(self) -> Level:
        """The level, if it lets anything out: it may have been lowered since this message was taken."""
        level = self._consent.level()
        if level is Level.OFF:
            raise ConsentError("the level is off; nothing is answered")
        return level

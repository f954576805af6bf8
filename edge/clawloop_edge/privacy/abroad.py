"""What may be shown to a model on another machine that judges, and the record of it (`signals.asking.Border`).

The owner allowed the address itself in the configuration. Here their other words count: a session or an app that may
not send steps, or that a pause has touched, is not shown, nor one that was forgotten since it was read; below level
`full` what is shown is redacted, or it is not.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import ASKED, AuditLog
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.ladder import EVERYTHING
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level


class TextRedactor(Protocol):
    """Takes secrets out of a text (redacting.py)."""

    def text(self, text: str, *, session_id: str) -> str: ...


class Abroad:
    """The border of one pool. `redactor` gives what redacts, or None as long as there is nothing that can."""

    def __init__(self, pool: Pool, consent: ConsentLog, *, redactor: Callable[[], TextRedactor | None]) -> None:
        self._pool, self._consent, self._redactor = pool, consent, redactor
        self._audit = AuditLog(pool)

    async def cleared(self, texts: Sequence[str], *, session_id: str, app: str) -> list[str] | None:
        """The texts as they may be shown; None: they may not.

        Raises:
            RedactionError: they cannot be redacted now.
        """
        return await asyncio.to_thread(self._cleared, texts, session_id=session_id, app=app)

    async def crossed(self, host: str, body: bytes) -> None:
        """Write down that these bytes go to `host`. Waits for the disk: what is not written down does not go."""
        await asyncio.to_thread(self._audit.append, ASKED, len(body), sha256=sha256(body), item_id=host)

    def _cleared(self, texts: Sequence[str], *, session_id: str, app: str) -> list[str] | None:
        with self._pool.read() as database:
            if self._pool.tombstones.forgot(database, session=session_id):
                return None
            level = self._consent.state_in(database).level
            own = self._consent.within(database, supposed=EVERYTHING).ladder(session_id, app=app).latest
        if not own.sends_steps:
            return None
        if level is Level.FULL and own is Level.FULL:
            return list(texts)
        redactor = self._redactor()
        return None if redactor is None else [redactor.text(text, session_id=session_id) for text in texts]

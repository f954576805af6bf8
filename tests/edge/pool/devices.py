"""A device of which something left for a server."""

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog, Recipient, device_key
from clawloop_edge.privacy.forget import Done, Forgetter, Wanted
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared import signing
from clawloop_shared.levels import Level

from .conftest import MakeKept
from .hub import Hub


class Device:
    """A pool with sessions of which some things left for `hub`, and a clock that the test moves."""

    def __init__(self, pool: Pool, hub: Hub, *, make_kept: MakeKept) -> None:
        self.pool, self.hub, self.now_ms = pool, hub, 1_000_000
        self.make_kept = make_kept
        self.consent = ConsentLog(pool, clock=self.clock)
        self.consent.set_recipient(Recipient(hub.server.url, hub.root_key))
        self.consent.set_level(Level.FULL)
        self.outbox = Outbox(pool, self.consent, hold_s=0, clock=self.clock)
        self.servers = [hub.server]
        hub.device_key = signing.public_key(device_key(pool))

    def clock(self) -> int:
        """What time it is."""
        return self.now_ms

    @property
    def forgetter(self) -> Forgetter:
        """What forgets."""
        return Forgetter(self.pool, self.servers, clock=self.clock)

    def keep(self, session: str, *, app: str = "agent", at_ms: int = 2000) -> KeptStep:
        """A step, and what may leave of it put into the outbox."""
        kept = self.make_kept(session=session, app=app, started_ms=at_ms, finished_ms=at_ms, words=f"of {session}")
        self.pool.keep_step(kept).result()
        self.outbox.fill()
        return kept

    def send(self) -> None:
        """Let leave what waits."""
        self.outbox.mark_sent([item.item_id for item in self.outbox.list() if item.state is ItemState.QUEUED])

    def forget(self, *sessions: str, everything: bool = False, keep_remote: bool = False) -> Done:
        """Forget sessions and finish it."""
        forgetter = self.forgetter
        preview = forgetter.preview(Wanted(session_ids=sessions, everything=everything))
        done = forgetter.forget(preview, everything=everything, keep_remote=keep_remote)
        assert forgetter.finish() == []
        return done

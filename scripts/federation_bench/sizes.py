"""What leaves a device, beside the requests that it was made of: real items of a real outbox, of OpenClaw's requests.

The requests have the sizes and the order of real ones (`pool_bench.openclaw`): 49 KB of system prompt and 10 KB of
tools that never change, turns with loops of tool calls, and a message at the end that moves on with each call.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared.levels import Level
from pool_bench.measure import KEY, keep_all
from pool_bench.openclaw import Agent, raw_request
from pool_bench.steps import Words

_SESSION_CALLS = 50


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """`raw_bytes`: the request JSON of all steps; `upload_bytes`: the bodies of the items that leave, at `full`."""

    steps: int
    items: int
    raw_bytes: int
    upload_bytes: int

    @property
    def ratio(self) -> float:
        """Upload for each byte of request."""
        return self.upload_bytes / self.raw_bytes


def measure(folder: Path, *, steps: int, seed: int = 0) -> Sizes:
    """Keep so many steps in a pool, and let out all that may leave."""
    agent = Agent(Words(seed))
    sessions, rest = divmod(steps, _SESSION_CALLS)
    calls = [_SESSION_CALLS] * sessions + ([rest] if rest else [])
    raw_bytes = 0
    with Pool.open(folder, KEY, writer=True) as pool:
        consent = ConsentLog(pool)
        consent.set_level(Level.FULL)
        outbox = Outbox(pool, consent, hold_s=0)
        for count in calls:
            session = list(agent.session(count))
            raw_bytes += sum(len(raw_request(kept)) for kept in session)
            keep_all(pool, session)
        while outbox.fill():
            pass
        items = outbox.list()
    upload_bytes = sum(item.size_bytes for item in items)
    return Sizes(steps=steps, items=len(items), raw_bytes=raw_bytes, upload_bytes=upload_bytes)

"""Learning at home, put together: what answers the server's tasks, and the thread that does them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.adapters.store import kept_files
from clawloop_edge.learn.choosing import Chooser
from clawloop_edge.learn.desk import Desk
from clawloop_edge.learn.going import Place
from clawloop_edge.learn.masked import MaskedItems, PoolMembers
from clawloop_edge.learn.power import power
from clawloop_edge.learn.release import Releaser
from clawloop_edge.learn.runs import Runs
from clawloop_edge.learn.schedule import Schedule
from clawloop_edge.learn.sums import SumMember, SumRules
from clawloop_edge.privacy.ledger import Ledger
from clawloop_shared.model_line import read_shape
from clawloop_shared.rows import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from clawloop_edge.config import EdgeConfig
    from clawloop_edge.engine.protocol import Engine
    from clawloop_edge.home import EdgeHome
    from clawloop_edge.learn.job import Learner
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.outbox import Outbox


class HomeLearning:
    """The parts of learning at home on one device, for as long as it answers a server."""

    def __init__(
        self,
        home: EdgeHome,
        config: EdgeConfig,
        *,
        pool: Pool,
        consent: ConsentLog,
        outbox: Outbox,
        engine: Engine,
        model: Path,
        learner: Learner,
        idle_s: Callable[[], float],
        done: Callable[[], None],
        device_key: Callable[[], bytes] | None = None,
        server: bytes = b"",
    ) -> None:
        """`idle_s`: how long nobody has called; `done` is called when something new may leave; `device_key`: what this
        device signs with now; without it, it takes no part in secure sums; `server`: the key of the one it answers."""
        shape, settings, runs = read_shape(model), config.learn, Runs(pool)
        runs.belong_to(server)
        ledger = Ledger(pool, epsilon=config.privacy.epsilon)
        releaser = Releaser(pool, consent, ledger, shape=shape, settings=settings, hold_ms=outbox.hold_ms)
        limits = Limits(engine.line.line_id, shape.vocab_size, settings.max_sample_tokens, rules=config.reward)
        place = Place(
            idle_s=idle_s,
            power=power,
            free_bytes=lambda: shutil.disk_usage(home.folder).free,
            served=lambda: engine.policy,
            adapter=lambda policy: kept_files(home.adapters, policy),
            model=model,
            floor_bytes=config.retention.free_floor_bytes,
        )
        chooser = Chooser(pool, consent, limits=limits)
        self.schedule = Schedule(runs, consent, chooser, releaser, learner, place=place, settings=settings, done=done)
        self.sums: SumMember | None = None
        if device_key is not None:
            rules = SumRules(min_members=settings.secure_min_members, max_new=settings.secure_new_members)
            self.sums = SumMember(MaskedItems(pool, consent), PoolMembers(pool), device_key=device_key, rules=rules)
        self.desk = Desk(
            runs,
            consent,
            releaser,
            shape=shape,
            settings=settings,
            served=lambda: engine.policy,
            poke=self.schedule.poke,
            state=lambda: self.schedule.status.state,
            sums=device_key is not None,
        )

    def report(self) -> dict[str, object]:
        """How it stands, as JSON values."""
        found: dict[str, object] = msgspec.to_builtins(self.schedule.status)
        return found

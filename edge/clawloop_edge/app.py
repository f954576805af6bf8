"""`serve`: wires the parts of the edge and runs them until SIGTERM.

One process: the event loop answers agents; the engine, the pool's writer and the node each have a thread of their own.
What other commands change (level, membership, wanted adapter) is read from the pool by one small watcher.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

from clawloop_edge import state
from clawloop_edge.adapters.activate import Activator
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.adapters.verify import AdapterLimits
from clawloop_edge.config import EdgeConfig
from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.errors import RedactionError
from clawloop_edge.gateway.app import DRAIN, DROPPER, METRICS, STATS, make_app, make_runner
from clawloop_edge.gateway.drain import Drain
from clawloop_edge.handlers import Handlers
from clawloop_edge.home import EdgeHome
from clawloop_edge.node import leaving, leftovers, rotating
from clawloop_edge.node.deleting import ask_due
from clawloop_edge.node.join import Membership
from clawloop_edge.node.large import Large
from clawloop_edge.node.standing import MemberTransport, new_instance, waiting_words
from clawloop_edge.node.transport import Transport
from clawloop_edge.node.worker import NodeSettings, NodeWorker
from clawloop_edge.opening import model_folder, open_engine, open_pool, open_redactor, own_learner
from clawloop_edge.pool import finishing
from clawloop_edge.pool.crypt import encryption
from clawloop_edge.pool.retention import Retention
from clawloop_edge.pool.search import SearchIndex
from clawloop_edge.privacy.abroad import Abroad
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.deletions import Deletions
from clawloop_edge.privacy.ledger import keep_cohort
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.waiting import waiting_sessions
from clawloop_edge.process import Stop, allow_connections, check_port, dump_no_core, listen
from clawloop_edge.scoring import check_scorers, open_reward, open_worker
from clawloop_edge.signals.registry import Deps
from clawloop_edge.signals.watch import HealthWatch
from clawloop_shared.database import encrypts
from clawloop_shared.errors import ClawloopError, ConfigError
from clawloop_shared.levels import Level
from clawloop_shared.model_line import read_shape

if TYPE_CHECKING:
    from clawloop_edge.learn.home import HomeLearning
    from clawloop_edge.learn.job import Learner
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.redacting import Redactor
    from clawloop_edge.signals.worker import SignalWorker

_log = logging.getLogger(__name__)

WATCH_S = 0.5
ANCHOR_S = 60.0
INDEX_S = 2.0
"""how often a bite of what was kept goes into the search index"""
RETAIN_S = 10.0
"""how soon a disk that fills is noticed"""
DELETIONS_S = 5.0
DELETION_TIMEOUT_S = 10.0
LEARN_STOP_S = 10.0
"""how long what learns is waited for when it is to stop"""
ROTATION_MS = 15_000
"""how long the command that rotates keys has it for itself, before the edge finishes what it left"""
FINISH_S = 60.0
"""how long before what could not be finished of a forgetting is tried again"""


class Edge:
    """The running edge: its parts, and the tasks that tie them together."""

    def __init__(self, home: EdgeHome, config: EdgeConfig, *, pool: Pool, engine: Engine | TextEngine) -> None:
        """Before a server of texts there is nothing to learn: then no server is answered, and no adapter taken."""
        self.home, self.config, self.pool, self.engine = home, config, pool, engine
        self._exact = None if isinstance(engine, TextEngine) else engine
        self.consent = ConsentLog(pool)
        self.outbox = Outbox(
            pool,
            self.consent,
            hold_s=config.privacy.hold_s,
            hold_redacted_s=config.privacy.hold_redacted_s,
            keep_received_days=config.privacy.keep_received_days,
        )
        self.deletions = Deletions(pool)
        self.retention = Retention(
            pool,
            config.retention,
            waiting=lambda database: waiting_sessions(database, pool=pool, consent=self.consent),
            clock_ms=wall_clock_ms,
            free_bytes=lambda: shutil.disk_usage(home.folder).free,
        )
        self.redactor: Redactor | None = None
        self._redaction = ""
        self.drop_forgotten: Callable[[], Awaitable[None]] = _nothing
        self._forgotten, self._finish_at_s = "", 0.0
        self.search, self.health = SearchIndex(pool), HealthWatch(pool)
        self.signals: SignalWorker | None = None
        self.node: NodeWorker | None = None
        self.member: Membership | None = None
        self._large: Large | None = None
        self._instance = new_instance()
        self._transport: MemberTransport | None = None
        self.activator: Activator | None = None
        self.learner: Learner | None = None
        self.learning: HomeLearning | None = None
        self.idle_s: Callable[[], float] = lambda: math.inf
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Restore the adapter that was in use, and begin to watch."""
        await asyncio.to_thread(self._open_redactor, asyncio.get_running_loop())
        await asyncio.to_thread(leftovers.clear, self.home.folder)
        await self._follow_membership()
        if self.signals is not None:
            await self.signals.start()
        self._tasks = [
            asyncio.create_task(self._every(WATCH_S, self._watch)),
            asyncio.create_task(self._every(self.config.privacy.fill_every_s, self._fill)),
            asyncio.create_task(self._every(ANCHOR_S, self._anchor)),
            asyncio.create_task(self._every(INDEX_S, self._index)),
            asyncio.create_task(self._every(INDEX_S, self._count_signals)),
            asyncio.create_task(self._every(WATCH_S, self._follow_forgetting)),
            asyncio.create_task(self._every(DELETIONS_S, self._ask_deletions)),
            asyncio.create_task(self._every(RETAIN_S, self._retain)),
        ]

    async def stop(self) -> None:
        """End what `start` began, and say goodbye to the server."""
        self.outbox.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.signals is not None:
            await self.signals.stop()
        if self.redactor is not None:
            await asyncio.to_thread(self.redactor.close)
        await self._stop_node(silent=await asyncio.to_thread(self._is_silent))

    async def status(self, request: web.Request) -> web.Response:
        """GET /v1/status: facts for `clawloop-edge status`."""
        stats = await asyncio.to_thread(self.pool.stats)
        sent = await asyncio.to_thread(self.outbox.totals)
        consent = await asyncio.to_thread(self.consent.state)
        health = self.engine.health()
        return web.json_response(
            {
                "level": str(consent.level),
                "level_reason": consent.reason,
                "model_line": self.engine.line.line_id,
                "adapter_version": self.engine.policy.version,
                "adapter_log": await asyncio.to_thread(state.log_words, self.pool, self.member),
                "engine_alive": health.alive,
                "calls_in_flight": health.in_flight,
                "versions_loaded": health.versions,
                "sessions": stats.sessions,
                "steps": stats.steps,
                "encryption": stats.encryption,
                "trainable": stats.trainable,
                "signals": stats.signals,
                "scorers": self.signals.counts.status() if self.signals else {},
                "refused_by_pool": stats.refused,
                "keeps_nothing": self.pool.gate.closed,
                "not_kept": request.app[STATS]().keep_failures,
                "outbox_waiting": sent.waiting,
                "outbox_unacknowledged": sent.unacknowledged,
                "left_out": await asyncio.to_thread(self.outbox.left_out),
                "deletions_waiting": await asyncio.to_thread(self.deletions.count_waiting),
                "redaction": self._redaction,
                "sent_items": sent.items,
                "sent_bytes": sent.bytes,
                "server": self.member.url if self.member else "",
                "server_state": self._server_state(),
                "server_detail": await asyncio.to_thread(self._server_detail),
                "goodbyes_waiting": len(await asyncio.to_thread(leaving.goodbyes, self.pool)),
                "rewards": self.health.report(),
                "learning": self.learning.report() if self.learning else {},
            }
        )

    def _server_state(self) -> str:
        if self.member is None:
            return "not joined"
        if self._exact is None:
            return "silent (the upstream server gives no token ids)"
        return str(self.node.status.state) if self.node else "silent (level off)"

    def _server_detail(self) -> str:
        """Why it is so, and what to do; empty if there is nothing to say."""
        if self.member is None or self._exact is None:
            return ""
        if self.node is None:
            return waiting_words(self.member) if state.waits(self.pool, self.member) else ""
        return self.node.status.detail or (self._transport.warning if self._transport else "")

    async def _every(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except ClawloopError as error:
                _log.warning("%s; trying again", error)
            except Exception as error:  # noqa: BLE001 - a watcher that ends would leave a lowered level unnoticed
                where = traceback.extract_tb(error.__traceback__)[-1]
                _log.error("%s at %s:%s; trying again", type(error).__name__, where.filename, where.lineno)
            await asyncio.sleep(period_s)

    async def _fill(self) -> None:
        await asyncio.to_thread(self.outbox.tidy)
        try:
            filled = await asyncio.to_thread(self.outbox.fill)
        except RedactionError as error:
            self._redaction = str(error)
            raise
        if self.redactor is not None:
            self._redaction = ""
        if filled and self.node:
            self.node.poke()

    def _open_redactor(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self.redactor = open_redactor(self.home, self.config, engine=self.engine, loop=loop)
        except ConfigError as error:
            self._redaction = f"nothing can be redacted, so at level redacted no step leaves: {error}"
        if self.redactor is not None:
            self.outbox.redact_with(LineRedactor(self.engine.line.line_id, self.redactor))

    async def _index(self) -> None:
        await asyncio.to_thread(self.search.catch_up)

    async def _count_signals(self) -> None:
        await asyncio.to_thread(self.health.catch_up)

    async def _anchor(self) -> None:
        await asyncio.to_thread(self.pool.anchor)

    async def _retain(self) -> None:
        await asyncio.to_thread(self.retention.tick)

    async def _ask_deletions(self) -> None:
        await asyncio.to_thread(ask_due, self.deletions, timeout_s=DELETION_TIMEOUT_S)
        await asyncio.to_thread(leaving.say_due, self.pool, timeout_s=DELETION_TIMEOUT_S)
        if self.member is not None:
            await asyncio.to_thread(rotating.finish, self.pool, self.member, after_ms=ROTATION_MS)

    async def _follow_forgetting(self) -> None:
        """Let memory go of what any process has forgotten, and finish what a crash has left of that."""
        found = await asyncio.to_thread(finishing.latest, self.pool)
        if found.note_id != self._forgotten:
            await self.drop_forgotten()
            if self.learning is not None and self.learning.sums is not None:
                await asyncio.to_thread(self.learning.sums.drop_values)
            self._forgotten = found.note_id
        if found.parts and time.monotonic() >= self._finish_at_s:
            self._finish_at_s = time.monotonic() + FINISH_S
            await asyncio.to_thread(finishing.resume, self.pool)

    async def _watch(self) -> None:
        await self._follow_membership()
        wish = await asyncio.to_thread(state.wanted_adapter, self.pool)
        if wish is None or self.activator is None:
            return
        try:
            await (self.activator.rollback() if wish.version < 0 else self.activator.use(wish.version))
        except ClawloopError as error:
            serving = self.engine.policy.version
            _log.warning("the adapter asked for by command is not used, %d goes on serving: %s", serving, error)
        await asyncio.to_thread(state.done_wanting, self.pool, wish)

    async def _follow_membership(self) -> None:
        """Take up a server that was joined, and let go of one that was left; at level `off` stay silent altogether."""
        member = await asyncio.to_thread(state.membership, self.pool)
        silent = await asyncio.to_thread(self._is_silent)
        if silent or member != self.member:
            await self._stop_node(silent=silent)
        if member is not None and member.same_as(self.member):
            self.member = member  # perhaps with other keys: what the server gave us stays
        elif member != self.member:
            if self.member is not None and self._exact is not None:
                await _drop_adapters(self._exact)
            self.member, self.activator = member, None
            if member is not None and self._exact is not None:
                self.activator = await asyncio.to_thread(self._make_activator, self._exact, member)
                await self.activator.restore()
        if silent or member is None or self.activator is None or self.node is not None:
            return
        if await asyncio.to_thread(self._has_stopped_learning):
            known_id = await asyncio.to_thread(state.node_id, self.pool)
            await asyncio.to_thread(self._learn_at_home, member)
            self.node = self._make_node(member, self.activator, node_id=known_id)
            self.node.start()

    def _is_silent(self) -> bool:
        """Whether nothing may leave at all; so it is as well if the consent cannot be checked."""
        try:
            return self.consent.level() is Level.OFF
        except ClawloopError as error:
            if self.node is not None:
                _log.error("nothing leaves any more: %s", error)
            return True

    def _make_activator(self, engine: Engine, member: Membership) -> Activator:
        limits = self.config.adapters
        return Activator(
            engine,
            AdapterStore.of_key(self.home.adapters, member.release_key, keep=limits.keep),
            release_key=member.release_key,
            shape=read_shape(model_folder(self.config.model.path)),
            limits=AdapterLimits(max_bytes=limits.max_bytes, max_rank=limits.max_rank),
            probe_tolerance=limits.probe_tolerance,
            log=state.log_book(self.pool, member),
        )

    def _make_node(self, member: Membership, activator: Activator, *, node_id: int) -> NodeWorker:
        loop = asyncio.get_running_loop()
        self._large = Large(
            member,
            self.outbox,
            install=lambda offer: asyncio.run_coroutine_threadsafe(activator.install(offer), loop).result(),
            folder=self.home.folder / leftovers.FETCHED,
            max_adapter_bytes=self.config.adapters.max_bytes,
            floor_bytes=self.config.retention.free_floor_bytes,
        )
        handlers = Handlers(
            self.engine,
            self.outbox,
            consent=self.consent,
            member=member,
            activator=activator,
            keep_cohort=lambda devices: keep_cohort(self.pool, devices),
            loop=loop,
            tasks=self.learning.desk if self.learning else None,
            sums=self.learning.sums if self.learning else None,
            large=self._large,
            log=activator.log,
        )
        self._transport = transport = MemberTransport(
            self._make_transport(member, node_id=node_id),
            member,
            instance=self._instance,
            note=lambda found: state.keep_stand(self.pool, found.device_id, found.state),
        )
        return NodeWorker(transport, handlers, settings=NodeSettings(poll_s=self.config.node.poll_s))

    def _make_transport(self, member: Membership, *, node_id: int) -> Transport:
        remember = partial(state.keep_node_id, self.pool)
        if self.config.node.driver == "stock":
            from clawloop_edge.node.stock import StockTransport

            return StockTransport(member, folder=self.home.folder / leftovers.NODE, remember=remember)
        from clawloop_edge.node.flower import FlowerTransport

        return FlowerTransport(member, node_id=node_id, remember=remember)

    def _learn_at_home(self, member: Membership) -> None:
        """Begin to learn when it is time, if anything can be learned here. Waits for the disk."""
        from clawloop_edge.learn.home import HomeLearning

        if self.learner is None or self._exact is None or self.learning is not None:
            return
        self.learning = HomeLearning(
            self.home,
            self.config,
            pool=self.pool,
            consent=self.consent,
            outbox=self.outbox,
            engine=self._exact,
            model=model_folder(self.config.model.path),
            learner=self.learner,
            idle_s=lambda: self.idle_s(),
            done=self._poke_node,
            device_key=lambda: self.member.device_key if self.member else b"",
            server=member.root_key,
        )
        self.learning.schedule.start()

    def _poke_node(self) -> None:
        if self.node is not None:
            self.node.poke()

    async def _stop_node(self, *, silent: bool) -> None:
        """`silent`: nothing may leave any more, not even a goodbye or the rest of what is being sent: that is cut at
        once, whatever learning does meanwhile."""
        ends: list[Awaitable[object]] = []
        if self.node is not None:
            ends.append(asyncio.to_thread(self.node.stop, silent=silent))
            if self._large is not None:
                ends.append(asyncio.to_thread(self._large.stop))
        self.node = None
        await asyncio.gather(*ends, asyncio.to_thread(self._has_stopped_learning, timeout_s=LEARN_STOP_S))

    def _has_stopped_learning(self, timeout_s: float = 0.0) -> bool:
        """Whether nothing learns here any more, asked to stop; as long as it does, it is not begun beside itself."""
        if self.learning is not None and self.learning.schedule.stop(timeout_s):
            self.learning = None
        return self.learning is None


async def _nothing() -> None:
    """Before there is a gateway, memory holds nothing."""


async def _drop_adapters(engine: Engine) -> None:
    """Serve the base again: the next server's adapters have the same numbers as those of the one that was left."""
    await engine.use(0)
    for version in engine.health().versions:
        if version:
            await engine.unload(version)


async def serve(home: EdgeHome, config: EdgeConfig, *, pool: Pool) -> int:
    """Run the edge until SIGTERM or SIGINT, then finish the calls in flight; how many of them were cut.

    Until the model is loaded, a signal ends the process as any other.
    """
    await check_port(config.gateway)
    for problem in filter(None, check_scorers(config.signals, folder=home.folder, port=config.gateway.port).values()):
        raise ConfigError(problem)
    engine = await _loaded(config)
    stop = Stop()
    edge = Edge(home, config, pool=pool, engine=engine)
    border = Abroad(pool, edge.consent, redactor=lambda: edge.redactor)
    deps = Deps(settings=config.signals, engine=engine, folder=home.folder, border=border, port=config.gateway.port)
    scorer = open_reward(deps)
    app = make_app(engine, pool, settings=config.gateway, token=home.token(), scorer=scorer, rules=config.reward)
    app.router.add_get("/v1/status", edge.status)
    edge.signals = open_worker(pool, deps, busy=lambda: app[DRAIN].in_flight)
    app[METRICS].watch(edge.signals.counts)
    edge.drop_forgotten = app[DROPPER]
    edge.learner, edge.idle_s = own_learner(), lambda: app[DRAIN].idle_s
    app[METRICS].watch(edge.health)
    runner = make_runner(app)
    try:
        await runner.setup()
        await edge.start()
        await listen(runner, config.gateway)
        _log.info("serving on http://%s:%d/v1, token in %s", config.gateway.host, config.gateway.port, home.token_file)
        await stop.asked.wait()
        return await _finish(app[DRAIN], stop, within_s=config.gateway.drain_s)
    finally:
        await asyncio.gather(edge.stop(), runner.cleanup(), *([scorer.close()] if scorer else []))
        await engine.close()


async def _loaded(config: EdgeConfig) -> Engine | TextEngine:
    """The engine, and in the log what is waited for."""
    started, upstream = time.monotonic(), config.model.kind == "upstream"
    _log.info("loading %s ...", f"what {config.upstream.url} has" if upstream else config.model.path)
    engine = await open_engine(config)
    kind = "" if not upstream else "text, " if isinstance(engine, TextEngine) else "exact, "
    _log.info("model ready in %.1f s, %sline %s", time.monotonic() - started, kind, engine.line.line_id)
    return engine


async def _finish(drain: Drain, stop: Stop, *, within_s: float) -> int:
    """Wait for the calls in flight until they end, the time is up, or a signal comes; how many are still there."""
    _log.info("stopping: %s to finish within %g s; a second signal cuts", _calls(drain.in_flight), within_s)
    waits = {asyncio.create_task(drain()), asyncio.create_task(stop.at_once.wait())}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return drain.in_flight


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def run(home: EdgeHome) -> None:
    """Open what the home holds, serve, and close it again."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = home.load_config()
    dump_no_core()
    allow_connections(config.engine.max_queue)
    pool = open_pool(home, writer=True)
    if not encrypts():
        _log.warning("the pool's encryption: %s; pip install sqlcipher3", encryption())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # makes streams cheaper
            cut = runner.run(serve(home, config, pool=pool))
    finally:
        pool.close()
    _log.info("stopped, %s cut", _calls(cut))

"""`serve`: wires the parts of the edge and runs them until SIGTERM.

One process: the event loop answers agents; the engine, the pool's writer and the node each have a thread of their own.
What other commands change (level, membership, wanted adapter) is read from the pool by one small watcher.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

from clawloop_edge import state
from clawloop_edge.adapters.activate import Activator
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.adapters.verify import AdapterLimits
from clawloop_edge.config import EdgeConfig
from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.gateway.app import DRAIN, STATS, make_app, make_runner
from clawloop_edge.gateway.drain import Drain
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.handlers import Handlers
from clawloop_edge.home import EdgeHome
from clawloop_edge.node.join import Membership
from clawloop_edge.node.worker import NodeSettings, NodeWorker
from clawloop_edge.opening import model_folder, open_engine, open_pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared.errors import ClawloopError, ConfigError
from clawloop_shared.levels import Level
from clawloop_shared.model_line import read_shape

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

_log = logging.getLogger(__name__)

WATCH_S = 0.5


class Edge:
    """The running edge: its parts, and the tasks that tie them together."""

    def __init__(self, home: EdgeHome, config: EdgeConfig, *, pool: Pool, engine: Engine | TextEngine) -> None:
        """Before a server of texts there is nothing to learn: then no server is answered, and no adapter taken."""
        self.home, self.config, self.pool, self.engine = home, config, pool, engine
        self._exact = None if isinstance(engine, TextEngine) else engine
        self.consent = ConsentLog(pool)
        self.outbox = Outbox(pool, self.consent, hold_s=config.privacy.hold_s)
        self.node: NodeWorker | None = None
        self.member: Membership | None = None
        self.activator: Activator | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Restore the adapter that was in use, and begin to watch."""
        await self._follow_membership()
        self._tasks = [
            asyncio.create_task(self._every(WATCH_S, self._watch)),
            asyncio.create_task(self._every(self.config.privacy.fill_every_s, self._fill)),
        ]

    async def stop(self) -> None:
        """End what `start` began, and say goodbye to the server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stop_node()

    async def status(self, request: web.Request) -> web.Response:
        """GET /v1/status: facts for `clawloop-edge status`."""
        stats = await asyncio.to_thread(self.pool.stats)
        sent = await asyncio.to_thread(self.outbox.totals)
        health = self.engine.health()
        return web.json_response(
            {
                "level": str(await asyncio.to_thread(self.consent.level)),
                "model_line": self.engine.line.line_id,
                "adapter_version": self.engine.policy.version,
                "engine_alive": health.alive,
                "calls_in_flight": health.in_flight,
                "versions_loaded": health.versions,
                "sessions": stats.sessions,
                "steps": stats.steps,
                "trainable": stats.trainable,
                "signals": stats.signals,
                "refused_by_pool": stats.refused,
                "not_kept": request.app[STATS]().keep_failures,
                "outbox_waiting": sent.waiting,
                "sent_items": sent.items,
                "sent_bytes": sent.bytes,
                "server": self.member.url if self.member else "",
                "server_state": self._server_state(),
            }
        )

    def _server_state(self) -> str:
        if self.member is None:
            return "not joined"
        if self._exact is None:
            return "silent (the upstream server gives no token ids)"
        return str(self.node.status.state) if self.node else "silent (level off)"

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
        filled = await asyncio.to_thread(self.outbox.fill)
        if filled and self.node:
            self.node.poke()

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
        if member != self.member:
            await self._stop_node()
            if self.member is not None and self._exact is not None:
                await _drop_adapters(self._exact)
            self.member, self.activator = member, None
            if member is not None and self._exact is not None:
                self.activator = await asyncio.to_thread(self._make_activator, self._exact, member)
                await self.activator.restore()
        silent = await asyncio.to_thread(self.consent.level) is Level.OFF
        if self.node is not None and silent:
            await self._stop_node()
        if self.node is None and not silent and member is not None and self.activator is not None:
            known_id = await asyncio.to_thread(state.node_id, self.pool)
            self.node = self._make_node(member, self.activator, node_id=known_id)
            self.node.start()

    def _make_activator(self, engine: Engine, member: Membership) -> Activator:
        limits = self.config.adapters
        return Activator(
            engine,
            AdapterStore.of_key(self.home.adapters, member.release_key, keep=limits.keep),
            release_key=member.release_key,
            shape=read_shape(model_folder(self.config.model.path)),
            limits=AdapterLimits(max_bytes=limits.max_bytes, max_rank=limits.max_rank),
            probe_tolerance=limits.probe_tolerance,
        )

    def _make_node(self, member: Membership, activator: Activator, *, node_id: int) -> NodeWorker:
        from clawloop_edge.node.flower import FlowerTransport

        handlers = Handlers(
            self.engine, self.outbox, consent=self.consent, activator=activator, loop=asyncio.get_running_loop()
        )
        transport = FlowerTransport(
            member, node_id=node_id, remember=lambda number: state.keep_node_id(self.pool, number)
        )
        return NodeWorker(transport, handlers, settings=NodeSettings(poll_s=self.config.node.poll_s))

    async def _stop_node(self) -> None:
        if self.node is not None:
            await asyncio.to_thread(self.node.stop)
            self.node = None


async def _drop_adapters(engine: Engine) -> None:
    """Serve the base again: the next server's adapters have the same numbers as those of the one that was left."""
    await engine.use(0)
    for version in engine.health().versions:
        if version:
            await engine.unload(version)


class Stop:
    """SIGTERM and SIGINT: the first asks to finish the calls in flight, the next to cut them."""

    def __init__(self) -> None:
        self.asked, self.at_once = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


async def serve(home: EdgeHome, config: EdgeConfig, *, pool: Pool) -> int:
    """Run the edge until SIGTERM or SIGINT, then finish the calls in flight; how many of them were cut.

    Until the model is loaded, a signal ends the process as any other.
    """
    await _check_port(config.gateway)
    engine = await _loaded(config)
    stop = Stop()
    edge = Edge(home, config, pool=pool, engine=engine)
    app = make_app(engine, pool, settings=config.gateway, token=home.token())
    app.router.add_get("/v1/status", edge.status)
    runner = make_runner(app)
    try:
        await runner.setup()
        await edge.start()
        await _listen(runner, config.gateway)
        _log.info("serving on http://%s:%d/v1, token in %s", config.gateway.host, config.gateway.port, home.token_file)
        await stop.asked.wait()
        return await _finish(app[DRAIN], stop, within_s=config.gateway.drain_s)
    finally:
        await asyncio.gather(edge.stop(), runner.cleanup())
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


async def _check_port(settings: GatewaySettings) -> None:
    """Tell before the model is loaded what `_listen` would tell after it. Raises ConfigError."""
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(asyncio.Protocol, settings.host, settings.port, start_serving=False)
    except OSError as error:
        raise _no_port(settings, error) from error
    server.close()
    await server.wait_closed()


async def _listen(runner: web.AppRunner, settings: GatewaySettings) -> None:
    """Raises ConfigError: the address is taken, or is not one of this machine."""
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
    except OSError as error:
        raise _no_port(settings, error) from error


def _no_port(settings: GatewaySettings, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; stop the program that has this port, "
        "or set another [gateway] port"
    )


def _allow_connections(calls: int) -> None:
    """Let the process have as many connections at once as calls may wait; macOS gives it 256 files by itself."""
    import resource

    wanted = 2 * calls + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:
        _log.warning("only %d connections at once: the system does not allow %d: %s", soft, most, error)


def run(home: EdgeHome) -> None:
    """Open what the home holds, serve, and close it again."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = home.load_config()
    _allow_connections(config.engine.max_queue)
    pool = open_pool(home, writer=True)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # makes streams cheaper
            cut = runner.run(serve(home, config, pool=pool))
    finally:
        pool.close()
    _log.info("stopped, %s cut", _calls(cut))

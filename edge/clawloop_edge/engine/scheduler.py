"""What the engine's thread does between commands: admit waiting calls, step every lane, hand tokens over.

Everything here runs in that one thread. An error ends the calls that it belongs to, never the thread.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Iterable

from clawloop_edge.engine.lanes import Call, Finished, Lane
from clawloop_edge.engine.prefix_cache import PrefixCache
from clawloop_edge.engine.protocol import Token
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.engine.stream import Item, TokenStream, deliver
from clawloop_edge.engine.versions import Versions
from clawloop_edge.errors import EngineError
from clawloop_shared.records import Policy, Sampling

log = logging.getLogger(__name__)
LaneKey = tuple[Policy, Sampling, int]


class Scheduler:
    """Calls that wait, calls that run, and what they share."""

    def __init__(self, versions: Versions, *, settings: EngineSettings, stop_ids: frozenset[int]) -> None:
        self._versions, self._settings, self._stop_ids = versions, settings, stop_ids
        self._cache = PrefixCache(entries=settings.cache_entries, size_bytes=settings.cache_bytes)
        self._waiting: deque[Call] = deque()
        self._lanes: dict[LaneKey, Lane] = {}
        self._out: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Item]]] = defaultdict(list)
        self.last_error = ""

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._lanes)

    def submit(self, call: Call) -> None:
        """Take a call; it starts as soon as a row is free."""
        self._waiting.append(call)

    def cancel(self, call: Call) -> None:
        """Forget a call; nothing more is delivered to it."""
        if call.over:
            return
        if call.lane is None:
            self._waiting.remove(call)
        else:
            self._take_out(call, call.lane)
        self._end(call)
        self._close_idle_lanes()

    def forget(self, dropped: Iterable[Policy]) -> None:
        """Free what belongs to versions that are no longer loaded."""
        for policy in dropped:
            self._cache.drop(policy)

    def turn(self) -> None:
        """One step of everything."""
        self._admit()
        for key, lane in list(self._lanes.items()):
            try:
                tokens, finished = lane.step()
            except Exception as error:  # noqa: BLE001 - whatever MLX raises ends these calls, and not the thread
                self._fail_lane(key, error)
                continue
            for call, token in tokens:
                self._put(call, token)
            for row in finished:
                self._finish(row)
        self._close_idle_lanes()
        self._flush()

    def fail_all(self, error: BaseException) -> None:
        """End every call with `error`."""
        for call in [*self._waiting, *(call for lane in self._lanes.values() for call in lane.calls())]:
            self._put(call, error)
            self._end(call)
        self._waiting.clear()
        for key in list(self._lanes):
            self._lanes.pop(key).close()
        self._flush()

    def _admit(self) -> None:
        running = sum(map(len, self._lanes.values()))
        while self._waiting and running < self._settings.completion_batch_size:
            call = self._waiting.popleft()
            try:
                self._start(call)
                running += 1
            except Exception as error:  # noqa: BLE001 - one call that cannot start must not stop the others
                self._fail(call, error)

    def _start(self, call: Call) -> None:
        cache, cached = self._cache.take(call.policy, call.request.prompt_ids)
        self._lane_for(call).add(call, cache=cache, cached=cached)

    def _lane_for(self, call: Call) -> Lane:
        sampling = call.request.sampling
        if sampling.temperature == 0:
            sampling = Sampling(temperature=0.0)
        alone = id(call) if sampling.seed is not None else 0
        key = (call.policy, sampling, alone)
        lane = self._lanes.get(key)
        if lane is None:
            model = self._versions.model_of(call.policy.version)
            lane = Lane(model, sampling, settings=self._settings, stop_ids=self._stop_ids)
            self._lanes[key] = lane
        return lane

    def _finish(self, row: Finished) -> None:
        try:
            self._cache.put(row.call.policy, row.token_ids, row.cache)
        except Exception as error:  # noqa: BLE001 - the answer is whole; only the next turn will be slower
            self._note(error)
        self._end(row.call)

    def _end(self, call: Call) -> None:
        call.over, call.lane = True, None
        self.forget(self._versions.unpin(call.policy))

    def _fail(self, call: Call, error: Exception) -> None:
        self._note(error)
        known = isinstance(error, EngineError)
        self._put(call, error if known else _engine_error(error))
        self._end(call)

    def _note(self, error: Exception) -> None:
        self.last_error = type(error).__name__
        log.error("the engine goes on after an error: %s", self.last_error, exc_info=error)

    def _take_out(self, call: Call, lane: Lane) -> None:
        try:
            lane.remove(call)
        except Exception as error:  # noqa: BLE001 - the batch is broken; its other calls end, and not the thread
            self._fail_lane(next(key for key, other in self._lanes.items() if other is lane), error)

    def _fail_lane(self, key: LaneKey, error: Exception) -> None:
        lane = self._lanes.pop(key)
        for call in lane.calls():
            self._fail(call, error)
        lane.close()

    def _close_idle_lanes(self) -> None:
        for key in [key for key, lane in self._lanes.items() if not len(lane)]:
            self._lanes.pop(key).close()

    def _put(self, call: Call, item: Token | BaseException) -> None:
        self._out[call.stream.loop].append((call.stream, item))

    def _flush(self) -> None:
        for loop, items in self._out.items():
            try:
                loop.call_soon_threadsafe(deliver, items)
            except RuntimeError:
                log.warning("the event loop of %d tokens is closed; they are dropped", len(items))
        self._out.clear()


def _engine_error(error: Exception) -> EngineError:
    wrapped = EngineError(f"the model failed on this call ({type(error).__name__}); see the log, and try again")
    wrapped.__cause__ = error
    return wrapped

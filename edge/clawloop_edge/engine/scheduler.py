"""What the engine's thread does between commands: admit waiting calls, step every lane, hand tokens over, do chores.

Everything here runs in that one thread. An error ends the calls that it belongs to, never the thread. Calls start in
the order in which they came: none overtakes one that waits for memory, so none waits for ever.
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator

from clawloop_edge.engine.chores import Chores
from clawloop_edge.engine.lanes import Call, Finished, Lane, let_arrays_go
from clawloop_edge.engine.memory import MemoryPlan, batch_tokens
from clawloop_edge.engine.prefix_cache import PrefixCache
from clawloop_edge.engine.protocol import Token
from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.engine.stream import Item, TokenStream, deliver
from clawloop_edge.engine.versions import Versions
from clawloop_edge.errors import EngineBusy, EngineError, PromptTooLong
from clawloop_shared.records import Policy, Sampling

log = logging.getLogger(__name__)
LaneKey = tuple[Policy, Sampling, int]
_LANE_BYTES = 256 << 20
"""what stepping one more lane costs at least, told in bytes read: a millisecond or two"""


class Scheduler:
    """Calls that wait, calls that run, and what they share."""

    def __init__(
        self, versions: Versions, *, settings: EngineSettings, stop_ids: frozenset[int], plan: MemoryPlan
    ) -> None:
        self._versions, self._settings, self._stop_ids, self._plan = versions, settings, stop_ids, plan
        self._cache = PrefixCache(entries=settings.cache_entries, size_bytes=settings.cache_bytes)
        self._waiting: deque[Call] = deque()
        self._lanes: dict[LaneKey, list[Lane]] = {}
        self._out: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Item]]] = defaultdict(list)
        self._started_s = 0.0  # when a call last got a row
        self.chores = Chores()
        self.last_error = ""
        self.memory_bytes = self.cache_bytes = 0
        self._measure()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._lanes or self.chores)

    @property
    def waiting(self) -> int:
        """Calls that have no row yet."""
        return len(self._waiting)

    def submit(self, call: Call) -> None:
        """Take a call; it starts as soon as there is a row and memory for it, and none before it waits."""
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
        self._measure()

    def forget_prompts(self) -> None:
        """Let go of all kept attention caches."""
        self._cache.clear()
        self._measure()

    def forget(self, dropped: Iterable[Policy]) -> None:
        """Free what belongs to versions that are no longer loaded."""
        for policy in dropped:
            self._cache.drop(policy)
        self._measure()

    def turn(self) -> None:
        """One step of everything."""
        self._refuse_late()
        self._admit()
        for lane in list(self._all_lanes()):
            self._step(lane)
            self._flush()
        self.chores.turn(fits=self._fits_now)
        self._close_idle_lanes()
        self._measure()
        self._flush()

    def fail_all(self, error: BaseException) -> None:
        """End every call with `error`."""
        for call in [*self._waiting, *(call for lane in self._all_lanes() for call in lane.calls())]:
            self._put(call, error)
            self._end(call)
        self._waiting.clear()
        for lane in self._all_lanes():
            lane.close()
        self._lanes.clear()
        self.chores.fail(error)
        self._measure()
        self._flush()

    def close(self) -> None:
        """Let go of every array, in this thread. Nothing can be served any more."""
        self._cache.clear()
        self._versions.release()
        let_arrays_go()

    def _refuse_late(self) -> None:
        limit_s = self._settings.queue_timeout_s
        late_s = time.monotonic() - limit_s
        while self._waiting and max(self._waiting[0].since_s, self._started_s) < late_s:
            call = self._waiting.popleft()
            self._put(call, EngineBusy(f"the call waited {limit_s:g} s and more for a place; try again later"))
            self._end(call)

    def _admit(self) -> None:
        running = sum(map(len, self._all_lanes()))
        while self._waiting and running < self._settings.completion_batch_size:
            call = self._waiting[0]
            try:
                if not self._start(call):
                    return
                running, self._started_s = running + 1, time.monotonic()
            except Exception as error:  # noqa: BLE001 - one call that cannot start must not stop the others
                self._fail(call, error)
            self._waiting.popleft()

    def _start(self, call: Call) -> bool:
        """Give a call a row; False if it must wait for memory."""
        key = self._key(call)
        free = self._free()
        found = self._place(call, self._lanes.get(key, []), free=free)
        if found is None:
            if self._lanes or self.chores:
                return False
            raise PromptTooLong(  # since it came, adapters were loaded beside the model
                f"{call.tokens} tokens do not fit the memory left beside the adapters, which holds "
                f"{self._plan.most_tokens(self._versions.adapter_bytes)}"
            )
        lane, need = found
        cache, cached = self._cache.take(call.policy, call.request.prompt_ids)
        self._cache.shrink(free - need)
        if lane is None:
            model = self._versions.model_of(call.policy.version)
            lane = Lane(model, key[1], settings=self._settings, stop_ids=self._stop_ids)
            self._lanes.setdefault(key, []).append(lane)
        lane.add(call, cache=cache, cached=cached)
        return True

    def _place(self, call: Call, lanes: Iterable[Lane], *, free: int) -> tuple[Lane | None, int] | None:
        """The lane (None: a new one) in which a call makes steps least slower, and the bytes it needs there.

        A batch is as long as its longest row, so a short call beside a long one costs as much as that one; a lane of
        its own costs one more reading of the weights a step.
        """
        own = batch_tokens([call.tokens]) * self._plan.token
        places: list[tuple[int, int, Lane | None]] = [(max(self._plan.weights, _LANE_BYTES), own, None)]
        for lane in lanes:
            need = lane.growth(call) * self._plan.token
            places.append((need - own, need, lane))
        return next(((lane, need) for _, need, lane in sorted(places, key=lambda p: p[0]) if need <= free), None)

    def _free(self) -> int:
        """Bytes that no call needs; what is kept for later turns gives way."""
        running = sum(lane.kv_tokens for lane in self._all_lanes()) * self._plan.token
        return self._plan.free(self._versions.adapter_bytes) - running - self.chores.kv_bytes

    def _fits_now(self, size_bytes: int) -> bool:
        free = self._free() - size_bytes
        if free < 0 and self._lanes:
            return False
        self._cache.shrink(max(free, 0))
        return True

    def _measure(self) -> None:
        plan, adapters = self._plan, self._versions.adapter_bytes
        self.cache_bytes = self._cache.size_bytes
        used = plan.free(adapters) - self._free()
        self.memory_bytes = plan.weights + adapters + used + self.cache_bytes

    def _key(self, call: Call) -> LaneKey:
        sampling = call.request.sampling
        if sampling.temperature == 0:
            sampling = Sampling(temperature=0.0)
        return call.policy, sampling, id(call) if sampling.seed is not None else 0

    def _all_lanes(self) -> Iterator[Lane]:
        return (lane for lanes in self._lanes.values() for lane in lanes)

    def _step(self, lane: Lane) -> None:
        try:
            tokens, finished = lane.step()
        except Exception as error:  # noqa: BLE001 - whatever MLX raises ends these calls, and not the thread
            self._fail_lane(lane, error)
            return
        for call, token in tokens:
            self._put(call, token)
        for row in finished:
            self._finish(row)
        if finished:
            self._measure()  # before the last token is handed over, so that whoever has it sees the truth
        for call in lane.stuck():
            reason = call.constraint.error if call.constraint else ""
            self._take_out(call, lane)
            self._fail(call, EngineError(f"the grammar cannot go on: {reason}; simplify the schema"))

    def _finish(self, row: Finished) -> None:
        try:
            self._cache.put(row.call.policy, row.token_ids, row.cache)
            self._cache.shrink(max(min(self._free(), self._settings.cache_bytes), 0))
        except Exception as error:  # noqa: BLE001 - the answer is whole; only the next turn will be slower
            self._note(error)
        self._end(row.call)

    def _end(self, call: Call) -> None:
        call.over, call.lane = True, None
        dropped = self._versions.unpin(call.policy)
        if dropped:
            self.forget(dropped)

    def _fail(self, call: Call, error: Exception) -> None:
        if call.over:
            return
        known = isinstance(error, EngineError)
        if not known:
            self._note(error)
        self._put(call, error if known else _engine_error(error))
        self._end(call)

    def _note(self, error: Exception) -> None:
        self.last_error = type(error).__name__
        log.error("the engine goes on after an error: %s", self.last_error, exc_info=error)

    def _take_out(self, call: Call, lane: Lane) -> None:
        try:
            lane.remove(call)
        except Exception as error:  # noqa: BLE001 - the batch is broken; its other calls end, and not the thread
            self._fail_lane(lane, error)

    def _fail_lane(self, lane: Lane, error: Exception) -> None:
        self._drop([lane])
        for call in lane.calls():
            self._fail(call, error)

    def _close_idle_lanes(self) -> None:
        self._drop([lane for lane in self._all_lanes() if not len(lane)])

    def _drop(self, gone: list[Lane]) -> None:
        for lane in gone:
            lane.close()
        if gone:
            left = {key: [lane for lane in lanes if lane not in gone] for key, lanes in self._lanes.items()}
            self._lanes = {key: lanes for key, lanes in left.items() if lanes}

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

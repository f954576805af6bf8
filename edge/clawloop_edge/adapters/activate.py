"""Taking an adapter into use: verify, load, probe, keep, use; the old one serves until the last step has worked.

Knows the engine by its Protocol and the disk by the store. What a server offers can be refused; it cannot stop serving.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf, isnan

import msgspec

from clawloop_edge.adapters.errors import OldVersion, ProbeFailed
from clawloop_edge.adapters.log import LogBook
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.adapters.verify import AdapterLimits, VerifiedAdapter, verify_offer
from clawloop_edge.engine.protocol import Engine
from clawloop_edge.errors import EngineError
from clawloop_shared.errors import ClawloopError, InvalidError
from clawloop_shared.lora import ModelShape
from clawloop_shared.messages import AdapterOffer, AdapterReply
from clawloop_shared.records import Policy

_log = logging.getLogger(__name__)
PROBE_TOKENS = 512
"""of a longer probe only the beginning is computed: a wrong adapter is wrong from the first token on"""


class Restored(msgspec.Struct, frozen=True):
    """What serves after a start, and why newer adapters on the disk do not."""

    policy: Policy
    refused: list[str]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Activator:
    """Installs adapters one at a time. `release_key` is the one pinned at joining."""

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        *,
        release_key: bytes,
        shape: ModelShape,
        limits: AdapterLimits | None = None,
        log: LogBook | None = None,
        probe_tolerance: float = 0.05,
        now_ms: Callable[[], int] = _now_ms,
    ) -> None:
        """`probe_tolerance` is in nats, per token of the probe; `log` is what every offered adapter must be in."""
        self._engine, self._store, self.log = engine, store, log
        self._release_key, self._shape = release_key, shape
        self._limits, self._tolerance, self._now_ms = limits or AdapterLimits(), probe_tolerance, now_ms
        self._lock = asyncio.Lock()

    async def install(self, offer: AdapterOffer) -> AdapterReply:
        """Take an offered adapter into use, or say why not; then the one before goes on serving.

        Offering again what is in use already is answered with yes, so that a lost reply does no harm.
        """
        async with self._lock:
            try:
                version = await self._install(offer)
            except ClawloopError as error:
                serving = self._engine.policy.version
                _log.warning("adapter refused, %d goes on serving: %s", serving, error)
                return AdapterReply(serving, installed=False, reason=_told(error))
            _log.info("adapter %d is in use", version)
            return AdapterReply(version, installed=True)

    def refusal(self, offer: AdapterOffer) -> AdapterReply | None:
        """Why the adapter of which the files would have to be fetched is not in the log; None if it is. Blocks."""
        try:
            if self.log is not None:
                self.log.take(offer)
        except ClawloopError as error:
            _log.warning("adapter refused before its files are fetched: %s", error)
            return AdapterReply(self._engine.policy.version, installed=False, reason=_told(error))
        return None

    async def use(self, version: int) -> Policy:
        """Switch to a kept version (0: the base).

        Raises:
            ClawloopError: it is not kept, or what is on the disk no longer verifies.
        """
        async with self._lock:
            return await self._use(version)

    async def rollback(self) -> Policy:
        """Switch to the newest kept version below the current one, or to the base.

        Raises:
            ClawloopError: what is on the disk no longer verifies.
        """
        async with self._lock:
            current = self._engine.policy.version
            return await self._use(max((v for v in self._store.versions() if v < current), default=0))

    async def restore(self) -> Restored:
        """At start: verify and load the version that was in use; if it is damaged, an older one, at last the base."""
        async with self._lock:
            await asyncio.to_thread(self._store.sweep_drafts)
            wanted = self._store.pointer().version
            refused: list[str] = []
            for version in sorted((v for v in self._store.versions() if v <= wanted), reverse=True):
                try:
                    await self._load_kept(version)
                    return Restored(await self._engine.use(version), refused)
                except ClawloopError as error:
                    _log.error("kept adapter %d is not used: %s", version, error)
                    refused.append(f"adapter {version}: {error}")
            if wanted and not refused:
                refused.append(f"adapter {wanted} is no longer on the disk")
            return Restored(await self._engine.use(0), refused)

    async def _install(self, offer: AdapterOffer) -> int:
        pointer = await asyncio.to_thread(self._store.pointer)
        try:
            adapter = await self._verify(offer, seen_version=pointer.seen, now_ms=self._now_ms())
        except OldVersion:
            if await self._is_serving(offer):
                return self._engine.policy.version
            raise
        if self.log is not None:
            await asyncio.to_thread(self.log.take, offer)
        await self._load(adapter)
        version = adapter.manifest.version
        try:
            await asyncio.to_thread(self._store.publish, version, offer)
            await self._switch(version)
        except ClawloopError:
            await self._engine.unload(version)
            raise
        return version

    async def _is_serving(self, offer: AdapterOffer) -> bool:
        version = self._engine.policy.version
        if version not in self._store.versions():
            return False
        kept = await asyncio.to_thread(self._store.read, version)
        return kept.manifest == offer.manifest

    async def _use(self, version: int) -> Policy:
        if version and version not in self._engine.health().versions:
            await self._load_kept(version)
        return await self._switch(version)

    async def _switch(self, version: int) -> Policy:
        """The pointer first: after a crash between the two, the start loads what the pointer names."""
        before = self._engine.policy.version
        await asyncio.to_thread(self._store.point, version)
        try:
            return await self._engine.use(version)
        except ClawloopError:
            await asyncio.to_thread(self._store.point, before)
            raise

    async def _load_kept(self, version: int) -> None:
        offer = await asyncio.to_thread(self._store.read, version)
        await self._load(await self._verify(offer, seen_version=version - 1, now_ms=None))

    async def _verify(self, offer: AdapterOffer, *, seen_version: int, now_ms: int | None) -> VerifiedAdapter:
        return await asyncio.to_thread(  # hashing a large adapter takes longer than a token may wait
            verify_offer,
            offer,
            release_key=self._release_key,
            line=self._engine.line,
            shape=self._shape,
            seen_version=seen_version,
            now_ms=now_ms,
            limits=self._limits,
        )

    async def _load(self, adapter: VerifiedAdapter) -> None:
        await self._engine.load(adapter.policy, adapter.files)
        try:
            await self._probe(adapter)
        except ClawloopError:
            await self._engine.unload(adapter.manifest.version)
            raise

    async def _probe(self, adapter: VerifiedAdapter) -> None:
        """Raises ProbeFailed: a wrong scale or a matrix that was not transposed loads without a word."""
        probe, version = adapter.manifest.probe, adapter.manifest.version
        ids, logprobs = probe.ids[:PROBE_TOKENS], probe.logprobs[: PROBE_TOKENS - 1]
        found = await self._engine.score(ids[:1], ids[1:], version=version, exact=True)
        off = [abs(got - wanted) for got, wanted in zip(found, logprobs, strict=True)]
        worst = max(off, key=lambda nats: inf if isnan(nats) else nats)  # `max` alone passes NaN by
        if not worst <= self._tolerance:
            raise ProbeFailed(f"adapter {version}: its probe is off by {worst:.3f} nats, more than {self._tolerance}")


def _told(error: ClawloopError) -> str:
    """What the server is told: what is wrong with its adapter, but of a trouble of this device's only the kind."""
    return str(error) if isinstance(error, InvalidError | EngineError) else type(error).__name__

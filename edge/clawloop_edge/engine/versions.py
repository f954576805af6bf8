"""Which adapter versions are loaded, which is current, and how many calls each one still serves.

Any thread may ask and pin; a version with a pinned call is never dropped. Knows no tensor: a model is just an object of
a size.
"""

import threading
from dataclasses import dataclass
from typing import Any

from clawloop_edge.errors import EngineError, UnknownVersion
from clawloop_shared.records import Policy


@dataclass(eq=False)
class _Loaded:
    policy: Policy
    model: Any
    used: int
    size_bytes: int = 0
    pins: int = 0
    leaving: bool = False


class Versions:
    """Version 0, the base, is always there. Beside it stay the `keep` versions loaded or used last."""

    def __init__(self, base: Policy, model: Any, *, keep: int) -> None:
        self._lock = threading.Lock()
        self._keep, self._base = keep, base.version
        self._current = _Loaded(base, model, used=0)
        self._loaded = {base.version: self._current}
        self._clock = 0
        self._pins = 0

    @property
    def current(self) -> Policy:
        """The policy of a call that asks for no version."""
        return self._current.policy

    @property
    def pins(self) -> int:
        """Calls in flight over all versions."""
        return self._pins

    @property
    def adapter_bytes(self) -> int:
        """Memory of all adapters loaded."""
        with self._lock:
            return sum(entry.size_bytes for entry in self._loaded.values())

    def numbers(self) -> list[int]:
        """The versions that may be asked for, rising."""
        with self._lock:
            return sorted(number for number, entry in self._loaded.items() if not entry.leaving)

    def policy(self, version: int) -> Policy:
        """The policy of a loaded version. Raises UnknownVersion."""
        with self._lock:
            return self._find(version).policy

    def model_of(self, version: int) -> Any:
        """The model of a loaded version, leaving or not. Raises UnknownVersion."""
        with self._lock:
            if version not in self._loaded:
                raise self._unknown(version)
            return self._loaded[version].model

    def pin(self, version: int | None) -> Policy:
        """Keep a version (None: the current one) loaded until `unpin`. Raises UnknownVersion."""
        with self._lock:
            entry = self._current if version is None else self._find(version)
            entry.pins += 1
            self._pins += 1
            return entry.policy

    def unpin(self, policy: Policy) -> list[Policy]:
        """Give a pin back; returns the versions that were dropped because nothing needs them any more."""
        with self._lock:
            entry = self._loaded[policy.version]
            entry.pins -= 1
            self._pins -= 1
            return self._trim()

    def add(self, policy: Policy, model: Any, *, size_bytes: int = 0) -> list[Policy]:
        """Put a version beside the others; returns those that were dropped for it.

        Raises:
            EngineError: its number is taken by other weights.
        """
        with self._lock:
            known = self._loaded.get(policy.version)
            if known is not None and (known.leaving or known.policy != policy):
                raise EngineError(f"version {policy.version} is still loaded with other weights; unload it first")
            if known is None:
                self._loaded[policy.version] = known = _Loaded(policy, model, used=0, size_bytes=size_bytes)
            known.used = self._tick()
            return self._trim()

    def use(self, version: int) -> list[Policy]:
        """Make a loaded version the current one; returns those that were dropped. Raises UnknownVersion."""
        with self._lock:
            self._current.used = self._tick()
            self._current = self._find(version)
            self._current.used = self._tick()
            return self._trim()

    def unload(self, version: int) -> list[Policy]:
        """Let a version go when its last call is done.

        Raises:
            UnknownVersion: it is not loaded.
            EngineError: it is the current one, or the base.
        """
        with self._lock:
            entry = self._find(version)
            if entry is self._current or version == self._base:
                raise EngineError(f"version {version} serves; use another one before unloading it")
            entry.leaving = True
            return self._trim()

    def release(self) -> None:
        """Let all models go; nothing can be served any more."""
        with self._lock:
            for entry in self._loaded.values():
                entry.model = None

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _find(self, version: int) -> _Loaded:
        entry = self._loaded.get(version)
        if entry is None or entry.leaving:
            raise self._unknown(version)
        return entry

    def _unknown(self, version: int) -> UnknownVersion:
        known = [number for number, entry in self._loaded.items() if not entry.leaving]
        return UnknownVersion(f"adapter version {version} is not loaded; loaded are {sorted(known)}")

    def _trim(self) -> list[Policy]:
        adapters = [entry for number, entry in self._loaded.items() if number != self._base]
        newest = sorted(adapters, key=lambda entry: -entry.used)[: self._keep]
        dropped = []
        for entry in adapters:
            wanted = entry is self._current or (entry in newest and not entry.leaving)
            if not wanted and entry.pins == 0:
                del self._loaded[entry.policy.version]
                dropped.append(entry.policy)
        return dropped

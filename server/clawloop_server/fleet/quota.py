"""How much of one device is taken in an hour, so that one that sends without end holds up nobody else.

What is over it is not refused for ever: it is not acknowledged, so its device keeps it and sends it again. Kept in
memory: a server that starts anew begins to count anew.
"""

from collections.abc import Callable, Sequence

import msgspec

from clawloop_shared.messages import UploadItem

_HOUR_S = 3600.0


class QuotaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What one device may send in an hour; 0: as much as it likes."""

    items_per_hour: int = 20_000
    mib_per_hour: float = 512.0


class Quota:
    """What each device has left. What was not used is saved up to an hour's worth."""

    def __init__(self, settings: QuotaSettings, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._items = _Buckets(settings.items_per_hour, clock)
        self._bytes = _Buckets(settings.mib_per_hour * (1 << 20), clock)
        self._settings = settings
        self._over: dict[str, tuple[str, float]] = {}

    def admit(self, device_id: str, items: Sequence[UploadItem]) -> int:
        """How many of these items, from the first on, are to be taken now. They are counted as taken."""
        for number, item in enumerate(items):
            if not self._take(device_id, len(item.body)):
                return number
        if items:
            self._over.pop(device_id, None)
        return len(items)

    def admit_large(self, device_id: str, size_bytes: int) -> float:
        """Count an item that comes in parts as taken; or in how many seconds there is room for it."""
        if self._take(device_id, size_bytes):
            self._over.pop(device_id, None)
            return 0.0
        return self.wait_s(device_id)

    def _take(self, device_id: str, size_bytes: int) -> bool:
        limits = self._settings
        waits = {
            f"[fleet] items_per_hour = {limits.items_per_hour}": self._items.wait_s(device_id, 1),
            f"[fleet] mib_per_hour = {limits.mib_per_hour:g}": self._bytes.wait_s(device_id, size_bytes),
        }
        reason, wait_s = max(waits.items(), key=lambda pair: pair[1])
        if wait_s > 0:
            self._over[device_id] = (reason, self._clock() + wait_s)
            return False
        self._items.use(device_id, 1)
        self._bytes.use(device_id, size_bytes)
        return True

    def give_back(self, device_id: str, items: Sequence[UploadItem]) -> None:
        """These were counted, and could not be kept."""
        self._items.use(device_id, -len(items))
        self._bytes.use(device_id, -sum(len(item.body) for item in items))

    def wait_s(self, device_id: str) -> float:
        """How long until more of the device is taken."""
        return max(0.0, self._over[device_id][1] - self._clock()) if device_id in self._over else 0.0

    @property
    def over(self) -> dict[str, str]:
        """The devices of which nothing more is taken now, and why."""
        now_s = self._clock()
        return {
            device_id: f"sends more than {reason}; what is over it stays there, and is taken in {until_s - now_s:.0f} s"
            for device_id, (reason, until_s) in self._over.items()
            if until_s > now_s
        }


class _Buckets:
    """One for each device, full at first. A single item that is larger than a full one leaves it in debt."""

    def __init__(self, per_hour: float, clock: Callable[[], float]) -> None:
        self._per_hour, self._clock = float(per_hour), clock
        self._left: dict[str, tuple[float, float]] = {}

    def wait_s(self, device_id: str, cost: float) -> float:
        if not self._per_hour:
            return 0.0
        missing = min(cost, self._per_hour) - self._now(device_id)
        return missing / self._per_hour * _HOUR_S if missing > 1e-6 else 0.0

    def use(self, device_id: str, cost: float) -> None:
        if self._per_hour:
            self._left[device_id] = (self._now(device_id) - cost, self._clock())

    def _now(self, device_id: str) -> float:
        left, at_s = self._left.get(device_id, (self._per_hour, self._clock()))
        return min(self._per_hour, left + (self._clock() - at_s) / _HOUR_S * self._per_hour)

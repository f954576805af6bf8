"""How often somebody may ask: so many a minute for each name, saved up to one minute's worth. Bounded in memory."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

_MAX_COUNTED = 10_000


class Allowance:
    """So many requests a minute for each name; what was not used is saved up to one minute's worth."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, cost: float) -> int:
        """Take `cost`; 0, or how many seconds to wait until there is enough."""
        left, now_s = self._now(name)
        missing = cost - left
        self._keep(name, left if missing > 0 else left - cost, now_s)
        return int(missing * 60 / self._per_minute) + 1 if missing > 0 else 0

    def give_back(self, name: str, cost: float) -> None:
        """What was taken was not used."""
        left, now_s = self._now(name)
        self._keep(name, min(self._per_minute, left + cost), now_s)

    def _now(self, name: str) -> tuple[float, float]:
        now_s = self._clock()
        left, then_s = self._left.pop(name, (self._per_minute, now_s))
        return min(self._per_minute, left + (now_s - then_s) * self._per_minute / 60), now_s

    def _keep(self, name: str, left: float, now_s: float) -> None:
        self._left[name] = (left, now_s)
        if len(self._left) > _MAX_COUNTED:
            self._left.popitem(last=False)


class WrongCodes:
    """How many wrong codes may come: a minute from one address, and from all together. An address is of one caller:
    of IPv6 the first 64 bits, since whoever has one has all of these."""

    def __init__(self, per_minute: int, total_per_minute: int, *, clock: Callable[[], float]) -> None:
        self._each = Allowance(max(per_minute, 1), clock=clock)
        self._all = Allowance(max(total_per_minute, 1), clock=clock)

    def take(self, peer: str) -> int:
        """Count a try of a caller as wrong, before it is looked at: so that many at once are not all let through.
        0, or how many seconds to wait before the next."""
        wait_s = self._each.take(_caller(peer), 1)
        if wait_s:
            return wait_s
        wait_s = self._all.take("", 1)
        if wait_s:
            self._each.give_back(_caller(peer), 1)
        return wait_s

    def give_back(self, peer: str) -> None:
        """The try was not a wrong code."""
        self._each.give_back(_caller(peer), 1)
        self._all.give_back("", 1)


def _caller(peer: str) -> str:
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer[:64]
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if mapped is not None or isinstance(address, ipaddress.IPv4Address):
        return str(mapped or address)
    return str(ipaddress.ip_network((address, 64), strict=False))

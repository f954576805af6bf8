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
        wait_s = self.wait_s(name, cost)
        if not wait_s:
            left, now_s = self._now(name)
            self._keep(name, left - cost, now_s)
        return wait_s

    def wait_s(self, name: str, cost: float) -> int:
        """What `take` would say; nothing is taken."""
        left, now_s = self._now(name)
        self._keep(name, left, now_s)
        missing = cost - left
        return int(missing * 60 / self._per_minute) + 1 if missing > 0 else 0

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

    def wait_s(self, peer: str) -> int:
        """0, or how many seconds until a caller may try again."""
        return self._each.wait_s(_caller(peer), 1) or self._all.wait_s("", 1)

    def count(self, peer: str) -> None:
        """A caller gave a wrong code. Those that were tried at the same time may be a few more than allowed: so many
        honest devices can join at once from one address."""
        self._each.take(_caller(peer), 1)
        self._all.take("", 1)


def _caller(peer: str) -> str:
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer[:64]
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if mapped is not None or isinstance(address, ipaddress.IPv4Address):
        return str(mapped or address)
    return str(ipaddress.ip_network((address, 64), strict=False))

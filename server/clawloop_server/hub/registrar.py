"""Keeps Flower's list of node keys the same as the table of devices: those that may sync, each with its latest key.

The table is the truth. Whatever was cut short (a join, an approval, new keys, a revocation) is finished at the next
look.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from clawloop_server.errors import FleetError
from clawloop_server.hub.members import HubMembers

_log = logging.getLogger(__name__)

_AGAIN_S = 30.0
"""until a key that Flower did not take is tried again"""


class NodeKeys(Protocol):
    """Flower's list."""

    async def admit(self, device_id: str, key_pem: str) -> int:
        """Let this key of a device in, and no other; its node id. Raises FleetError."""
        ...

    async def expel(self, device_id: str) -> None:
        """Let no key of a device in. Raises FleetError."""
        ...


class Registrar:
    """Registers one device at a time."""

    def __init__(self, fleet: NodeKeys, members: HubMembers, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet, self._members, self._clock = fleet, members, clock
        self._one = asyncio.Lock()
        self._again_s: dict[str, float] = {}

    async def register(self, device_id: str) -> int:
        """Let the key that this device has now in, and no other; its node id, which is noted.

        Raises:
            FleetError: Flower does not answer, or does not take the key.
        """
        async with self._one:  # and the key is read in here: it may have been replaced while another was registered
            device = await asyncio.to_thread(self._members.devices.get, device_id)
            node_id = await self._fleet.admit(device_id, device.node_key_pem)
            await asyncio.to_thread(self._members.set_node, device_id, node_id)
        return node_id

    async def settle(self) -> None:
        """Let in who may sync, put out who may not.

        Raises:
            FleetError: Flower does not answer.
        """
        for device in await asyncio.to_thread(self._members.registered_in_vain):
            async with self._one:
                await self._fleet.expel(device.device_id)
            await asyncio.to_thread(self._members.devices.set_node, device.device_id, None)
            _log.info("device %s (%s) may sync no more", device.device_id, device.state)
        for device in await asyncio.to_thread(self._members.unregistered):
            if self._again_s.get(device.device_id, float("-inf")) <= self._clock():
                await self._let_in(device.device_id)

    async def _let_in(self, device_id: str) -> None:
        try:
            node_id = await self.register(device_id)
        except FleetError as error:  # of this one device: it must not hold up the others
            self._again_s[device_id] = self._clock() + _AGAIN_S
            _log.warning("device %s cannot be registered, tried again in %.0f s: %s", device_id, _AGAIN_S, error)
            return
        self._again_s.pop(device_id, None)
        _log.info("device %s may sync as node %d", device_id, node_id)

"""Letting a device in: the code is redeemed, the node key registered at the SuperLink, the answer is what it must keep.

Wrong codes are counted: after too many, joining pauses for all, since a code is 128 random bits and nobody honest
types it wrong often. Knows no HTTP beyond the status that an answer should have.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from clawloop_server.errors import DeviceError, FleetError, InvitationError
from clawloop_server.hub.desk import DeskAnswer
from clawloop_shared import wire
from clawloop_shared.errors import ClawloopError, WireError
from clawloop_shared.messages import MAX_JOIN_BYTES, JoinReply, JoinRequest
from clawloop_shared.model_line import ModelLine

_log = logging.getLogger(__name__)

_MINUTE_S = 60.0


class Admitted(Protocol):
    """A device that was let in."""

    @property
    def device_id(self) -> str:
        """Its name here."""
        ...


class Admission(Protocol):
    """Invitations and devices, as joining needs them."""

    def redeem(self, request: JoinRequest) -> Admitted:
        """Use the code up and note the device. Asking again with the same keys gives the same device.

        The code is compared by its hash, so that the time it takes tells nothing of it.

        Raises:
            InvitationError: the code is unknown, used or expired, or the device is not one for this server.
            DeviceError: its keys are another device's.
        """
        ...

    def set_node(self, device_id: str, node_id: int) -> None:
        """Note the device's number in Flower."""
        ...


class JoinDesk:
    """Answers join requests."""

    def __init__(
        self,
        admission: Admission,
        *,
        register: Callable[[str, str], Awaitable[int]],
        line: ModelLine,
        release_key: bytes,
        wrong_per_minute: int = 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission, self._register = admission, register
        self._line, self._release_key = line, release_key
        self._wrong: deque[float] = deque(maxlen=max(wrong_per_minute, 1))
        self._clock = clock

    async def answer(self, body: bytes) -> DeskAnswer:
        """The answer to one request."""
        paused_s = self._paused_s()
        if paused_s > 0:
            return DeskAnswer(429, message="too many wrong invitations; try again later", retry_after_s=paused_s)
        try:
            request = wire.decode(body, JoinRequest, max_bytes=MAX_JOIN_BYTES)
        except (WireError, RecursionError) as error:
            return DeskAnswer(400, message=str(error))
        try:
            return DeskAnswer(200, wire.encode(await self._admit(request)))
        except InvitationError as error:
            self._wrong.append(self._clock())
            return DeskAnswer(403, message=str(error))
        except DeviceError as error:
            return DeskAnswer(409, message=str(error))
        except FleetError as error:
            _log.warning("a device could not be registered: %s", error)
            return DeskAnswer(503, message="the server cannot register devices now; try again", retry_after_s=2)
        except ClawloopError as error:
            _log.error("a device could not join: %s", error)
            return DeskAnswer(503, message="the server cannot let devices in now; ask its operator", retry_after_s=60)

    async def _admit(self, request: JoinRequest) -> JoinReply:
        device = await asyncio.to_thread(self._admission.redeem, request)
        node_id = await self._register(request.node_key_pem, device.device_id)
        await asyncio.to_thread(self._admission.set_node, device.device_id, node_id)
        _log.info("device %s joined as node %d", device.device_id, node_id)
        return JoinReply(device_id=device.device_id, release_key=self._release_key, line=self._line, node_id=node_id)

    def _paused_s(self) -> int:
        """How long joining pauses still: as long as the oldest of the last N wrong codes is younger than a minute."""
        if len(self._wrong) < (self._wrong.maxlen or 0):
            return 0
        left_s = _MINUTE_S - (self._clock() - self._wrong[0])
        return max(0, int(left_s) + 1) if left_s > 0 else 0

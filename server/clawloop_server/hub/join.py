"""Letting a device in: the code is redeemed, the node key registered at the SuperLink, the answer is what it must keep.

Wrong codes are counted, by address and together: after too many, joining pauses for that address, or for all. A code is
128 random bits, so nobody guesses one; nobody honest types one wrong often. Knows no HTTP beyond the status that an
answer should have.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from clawloop_server.errors import DeviceError, FleetError, InvitationError
from clawloop_server.hub.allowance import WrongCodes
from clawloop_server.hub.desk import DeskAnswer
from clawloop_shared import wire
from clawloop_shared.errors import ClawloopError, KeyMissing, SignatureInvalid, WireError
from clawloop_shared.membership import check_join
from clawloop_shared.messages import MAX_JOIN_BYTES, JoinReply, JoinRequest, SignedAnswer
from clawloop_shared.model_line import ModelLine

_log = logging.getLogger(__name__)


class Admitted(Protocol):
    """A device that was let in."""

    @property
    def device_id(self) -> str:
        """Its name here."""
        ...

    @property
    def waiting(self) -> bool:
        """Whether the operator must approve it first: until then Flower does not know it."""
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
        statement: Callable[[], SignedAnswer],
        wrong_per_minute: int = 30,
        wrong_per_minute_total: int = 3000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`statement`: the root key's word for the release key, made anew for each device."""
        self._admission, self._register = admission, register
        self._line, self._release_key, self._statement = line, release_key, statement
        self._wrong = WrongCodes(wrong_per_minute, wrong_per_minute_total, clock=clock)

    async def answer(self, body: bytes, *, peer: str = "") -> DeskAnswer:
        """The answer to one request; `peer` is the address that it came from."""
        wait_s = self._wrong.wait_s(peer)
        if wait_s:
            return DeskAnswer(429, message="too many wrong invitations; try again later", retry_after_s=wait_s)
        answer = await self._answer(body)
        if answer.status == 403:
            self._wrong.count(peer)
        return answer

    async def _answer(self, body: bytes) -> DeskAnswer:
        try:
            request = wire.decode(body, JoinRequest, max_bytes=MAX_JOIN_BYTES)
            check_join(request)
            return DeskAnswer(200, wire.encode(await self._admit(request)))
        except (WireError, RecursionError) as error:
            return DeskAnswer(400, message=str(error))
        except (SignatureInvalid, KeyMissing):
            return DeskAnswer(403, message="the device does not prove that its key is its own; update the device")
        except InvitationError as error:
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
        node_id = 0
        if device.waiting:
            _log.info("device %s joined and waits to be approved", device.device_id)
        else:
            node_id = await self._register(request.node_key_pem, device.device_id)
            await asyncio.to_thread(self._admission.set_node, device.device_id, node_id)
            _log.info("device %s joined as node %d", device.device_id, node_id)
        return JoinReply(
            device_id=device.device_id,
            release_key=self._release_key,
            line=self._line,
            node_id=node_id,
            statement=self._statement(),
            waiting=device.waiting,
        )

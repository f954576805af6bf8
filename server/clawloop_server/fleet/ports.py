"""What the dispatcher asks of the rest of the hub: small interfaces, one for each of its parts."""

from __future__ import annotations

from typing import Protocol

from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.messages import (
    AdapterOffer,
    ItemReceived,
    SecureReply,
    SecureRequest,
    StatusReply,
    UploadItem,
)


class Vault(Protocol):
    """Where what devices send is kept."""

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        """Keep the items; what can be said of each that is on disk now."""
        ...


class Releases(Protocol):
    """Which adapter devices should have."""

    def current_version(self) -> int:
        """The released version; 0 if there is none."""
        ...

    def offer(self, version: int) -> AdapterOffer:
        """That version with its manifest and files."""
        ...


class Members(Protocol):
    """Which nodes are devices that may sync."""

    def device_of(self, node_id: int) -> str | None:
        """The device id of a node, or None if it may not sync (unknown, revoked, deleted)."""
        ...

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        """A device answered."""
        ...

    def cohort(self) -> int:
        """How many devices may sync."""
        ...


class Tasks(Protocol):
    """What devices are asked to learn at home. Called in threads."""

    def due(self, device_id: str, *, adapter_version: int) -> LearnTask | None:
        """What that device should be asked to learn now; None: nothing, or it has answered."""
        ...

    def answered(self, device_id: str, reply: LearnReply) -> None:
        """Keep whether it will."""
        ...


class Sums(Protocol):
    """Secure sums that are under way. Called in threads."""

    def due(self, device_id: str) -> SecureRequest | None:
        """What that device is to be asked now; None: nothing, or it has answered."""
        ...

    def answered(self, device_id: str, reply: SecureReply) -> None:
        """Keep its part.

        Raises:
            ClawloopError: it is none.
        """
        ...


class NoTasks:
    """No learning at home, no secure sums."""

    def due(self, device_id: str, *, adapter_version: int = 0) -> None:
        """Nothing, ever."""

    def answered(self, device_id: str, reply: LearnReply | SecureReply) -> None:
        """Nobody was asked."""

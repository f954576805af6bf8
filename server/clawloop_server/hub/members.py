"""Devices, invitations and releases as the join desk and the dispatcher ask for them.

Thin: each call is one of `Devices`, `Invitations` or `Registry`. Safe to call from any thread.
"""

from __future__ import annotations

from clawloop_server.hub.devices import Device, Devices, DeviceState
from clawloop_server.hub.invitations import Invitations
from clawloop_server.release.registry import Registry
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared.levels import Level
from clawloop_shared.messages import AdapterOffer, JoinRequest, StatusReply


class HubMembers:
    """Who may join, and who may sync."""

    def __init__(self, database: ServerDatabase, *, line_id: str, approve: bool = False) -> None:
        """`approve`: a device that joins waits until the operator has approved it."""
        self._approve = approve
        self.devices = Devices(database)
        self._invitations = Invitations(database)
        self._line_id = line_id

    def redeem(self, request: JoinRequest) -> Device:
        """Let a device in, or have it wait; see `Invitations.redeem`.

        Raises:
            InvitationError: the code is unknown, used or expired, or the device is not one for this server.
            DeviceError: its keys are another device's.
        """
        return self._invitations.redeem(request, lines={self._line_id}, approve=self._approve)

    def set_node(self, device_id: str, node_id: int) -> None:
        """Note the device's number in Flower."""
        self.devices.set_node(device_id, node_id)

    def device_of(self, node_id: int) -> str | None:
        """The device id of a node, or None if it may not sync."""
        device = self.devices.by_node(node_id)
        joined = device is not None and device.state is DeviceState.JOINED and device.line_id == self._line_id
        return device.device_id if device is not None and joined else None

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        """A device answered."""
        level = status.level if status is not None and status.level in set(Level) else ""
        self.devices.mark_seen(device_id, adapter_version, level=level)

    def cohort(self) -> int:
        """How many devices of this model line may sync."""
        return self.devices.count_joined(self._line_id)

    def node_keys(self) -> dict[str, str]:
        """The node key of every device that may sync, by device id."""
        joined = (device for device in self.devices.all() if device.state is DeviceState.JOINED)
        return {device.device_id: device.node_key_pem for device in joined}

    def unregistered(self) -> list[Device]:
        """Devices that may sync and that Flower does not know: just approved, or with new keys."""
        return [d for d in self.devices.all() if d.state is DeviceState.JOINED and d.node_id is None]

    def registered_in_vain(self) -> list[Device]:
        """Devices that Flower still knows although they may sync no more."""
        return [d for d in self.devices.all() if d.state is not DeviceState.JOINED and d.node_id is not None]


class HubReleases:
    """Which adapter devices should have."""

    def __init__(self, registry: Registry, devices: Devices, *, line_id: str) -> None:
        self._registry, self._devices, self._line_id = registry, devices, line_id

    def current_version(self, cohort: str = "") -> int:
        """The version that is released for a cohort; 0 if there is none."""
        current = self._registry.current(self._line_id, cohort=cohort)
        return current.version if current else 0

    def versions(self) -> dict[str, int]:
        """The version that is released for each cohort."""
        return {cohort: self.current_version(cohort) for cohort in {"", *self._registry.cohorts(self._line_id)}}

    def apart(self) -> dict[str, int]:
        """The devices that are in a cohort, each with the version that it should have."""
        found = self._devices.apart(self._line_id)
        versions = {cohort: self.current_version(cohort) for cohort in set(found.values())}
        return {device_id: versions[cohort] for device_id, cohort in found.items()}

    def offer(self, version: int) -> AdapterOffer:
        """That version with its manifest and files.

        Raises:
            ReleaseError: it was never released.
            StorageError: a file is missing or was changed.
        """
        return self._registry.offer(version)

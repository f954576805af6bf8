"""The server's own errors; they grow from clawloop_shared.errors.

ClawloopError
├── HomeError                the server's folder is missing, foreign, or not private enough
├── DeviceError              a device is not known, or may not do this
│   └── InvitationError      an invitation is unknown, used, expired, or for another model
├── VaultError               the vault refuses (a trajectory was consumed twice, a device is gone)
├── ReleaseError             an adapter cannot be released, held or rolled back
├── TrainerError             a round cannot run
└── FleetError               the SuperLink, the bridge or the front does not run
"""

from clawloop_shared.errors import ClawloopError, InvalidError, UncheckedError


class HomeError(UncheckedError):
    """The server's folder is missing, foreign, or not private enough."""


class DeviceError(InvalidError):
    """A device is not known, or may not do this."""


class InvitationError(DeviceError):
    """An invitation is unknown, used, expired, or for another model."""


class VaultError(InvalidError):
    """The vault refuses."""


class ReleaseError(InvalidError):
    """An adapter cannot be released, held or rolled back."""


class TrainerError(ClawloopError):
    """A round cannot run."""


class FleetError(ClawloopError):
    """The SuperLink, the bridge or the front does not run."""

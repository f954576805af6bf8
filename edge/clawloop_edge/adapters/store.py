"""The adapters on this device: one folder a version, published whole and never changed, and a pointer to the current.

    adapters/<key id>/<version>/{adapter_config.json, adapter_model.safetensors, manifest.bin}
    adapters/<key id>/current.json    {"version": the one in use, 0 is the base, "seen": the newest ever taken}

A store is one `<key id>`: each release key counts its versions by itself, so that one server's do not stand in the way
of another's.

Whoever reads must verify again: this module only keeps bytes. Knows no engine.
"""

import os
import secrets
import shutil
from pathlib import Path

import msgspec

from clawloop_shared import wire
from clawloop_shared.errors import StorageError
from clawloop_shared.files import private_folder, publish, sha256, sync_folder
from clawloop_shared.lora import FILES, WEIGHTS_FILE
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.records import Policy
from clawloop_shared.signing import key_id

MANIFEST_FILE = "manifest.bin"
POINTER_FILE = "current.json"
_DRAFT = ".draft-"


class Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which version is in use, and the newest ever taken (older ones are refused from then on)."""

    version: int = 0
    seen: int = 0


class AdapterStore:
    """Adapters under one folder, which it makes (0700)."""

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        """`keep` is how many versions stay; the current one always does."""
        self._folder, self._keep = private_folder(folder), keep

    @classmethod
    def of_key(cls, adapters: Path, release_key: bytes, *, keep: int = 3) -> "AdapterStore":
        """The store of one server below a home's `adapters`, by the key that signs what it releases."""
        return cls(private_folder(adapters) / key_id(release_key), keep=keep)

    def sweep_drafts(self) -> None:
        """Remove what a crash left half written. Only for the process that serves: others may see its live drafts."""
        for draft in self._folder.glob(f"{_DRAFT}*"):
            shutil.rmtree(draft, ignore_errors=True)

    def publish(self, version: int, offer: AdapterOffer) -> None:
        """Keep an adapter: it is there whole or not at all. What a crash left of this version gives way.

        Raises:
            StorageError: the disk is full or not writable.
        """
        target = self._folder / str(version)
        if not (self._folder / POINTER_FILE).exists():
            self._write(self.pointer())  # else a crash before `point` would make this version look taken for ever
        if target.exists():
            self._remove(version)
        draft = self._folder / f"{_DRAFT}{version}-{secrets.token_hex(4)}"
        try:
            draft.mkdir(mode=0o700)
            for name in FILES:
                publish(draft / name, offer.files[name], mode=0o600)
            publish(draft / MANIFEST_FILE, wire.encode(offer.manifest), mode=0o600)
            draft.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise StorageError(f"cannot keep adapter {version} in {self._folder}: {error.strerror}") from error

    def read(self, version: int) -> AdapterOffer:
        """The bytes of a kept adapter, not verified.

        Raises:
            StorageError: it is not there, or cannot be read.
            WireError: its manifest is damaged.
        """
        folder = self._folder / str(version)
        try:
            files = {name: (folder / name).read_bytes() for name in FILES}
            signed = wire.decode((folder / MANIFEST_FILE).read_bytes(), SignedManifest)
        except OSError as error:
            raise StorageError(f"adapter {version} cannot be read from {folder}: {error.strerror}") from error
        return AdapterOffer(signed, files)

    def versions(self) -> list[int]:
        """The kept versions, rising."""
        return sorted(int(entry.name) for entry in self._folder.iterdir() if entry.name.isdecimal() and entry.is_dir())

    def pointer(self) -> Pointer:
        """The current and the newest seen version; both 0 at first.

        Raises:
            StorageError: the pointer file is damaged.
        """
        path = self._folder / POINTER_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=Pointer)
        except FileNotFoundError:
            return Pointer(seen=max(self.versions(), default=0))
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"{path} cannot be read: {error}; remove it to start from the base model") from error

    def point(self, version: int) -> None:
        """Make `version` the current one, durably, and let old ones go. Raises StorageError."""
        self._write(Pointer(version, max(version, self.pointer().seen)))
        self._sweep(version)

    def _write(self, pointer: Pointer) -> None:
        publish(self._folder / POINTER_FILE, msgspec.json.encode(pointer), mode=0o600)

    def _sweep(self, current: int) -> None:
        for version in self.versions()[: -self._keep or None]:
            if version == current:
                continue
            self._remove(version)

    def _remove(self, version: int) -> None:
        gone = self._folder / f"{_DRAFT}gone-{version}-{secrets.token_hex(4)}"
        os.replace(self._folder / str(version), gone)  # no reader ever sees half a folder
        shutil.rmtree(gone)


def kept_files(adapters: Path, policy: Policy) -> dict[str, bytes]:
    """The files of the adapter that `policy` names, whichever server it came from; not verified but for their hash.

    Raises:
        StorageError: it is not kept on this device any more.
    """
    for folder in sorted(adapters.glob(f"*/{policy.version}")):
        found = AdapterStore(folder.parent).read(policy.version).files
        if sha256(found[WEIGHTS_FILE]) == policy.adapter_sha256:
            return found
    raise StorageError(f"adapter {policy.version} ({policy.adapter_sha256[:16]}) is kept in {adapters} no more")

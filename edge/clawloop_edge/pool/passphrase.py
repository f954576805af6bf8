"""Sealing keys by a passphrase: Argon2id (RFC 9106) makes a key of it, AES-256-GCM seals with that.

The strength against who has the file is the passphrase's own; Argon2id makes each guess cost 64 MiB and about half a
second. Format: docs/formats/pool.md. Knows no pool, and nobody to ask.
"""

import os
import unicodedata
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import msgspec
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from msgspec import Meta

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.keys import KeyBundle, anchor_file
from clawloop_edge.pool.places import FilePlace
from clawloop_shared.envelope import KEY_BYTES, unwrap_key, wrap_key
from clawloop_shared.errors import KeyMissing, StorageError

MIN_CHARS = 8
_SALT_BYTES = 16
_AAD = b"clawloop sealed keys v1"


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a guess costs; the bounds keep a changed file from asking for all of the memory."""

    memory_kib: Annotated[int, Meta(ge=64, le=1 << 20)] = 64 << 10
    passes: Annotated[int, Meta(ge=1, le=16)] = 3
    lanes: Annotated[int, Meta(ge=1, le=16)] = 4


class Sealed(msgspec.Struct, frozen=True, tag_field="is", tag="clawloop-sealed-keys.v1", forbid_unknown_fields=True):
    """Keys that a passphrase opens, as they are written: binary fields in base64."""

    salt: bytes
    cost: Cost
    keys: bytes


class Ask(Protocol):
    """Gets the passphrase of a person; a `new` one is one that they choose now."""

    def __call__(self, *, new: bool) -> str:
        """Raises ClawloopError: there is nobody to ask."""
        ...


def stretch(passphrase: str, salt: bytes, *, cost: Cost) -> bytes:
    """The 32-byte key of a passphrase. However its letters were typed (Unicode NFC), it is the same."""
    text = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogateescape")
    deriving = Argon2id(
        salt=salt, length=KEY_BYTES, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    )
    return deriving.derive(text)


def seal_keys(bundle: KeyBundle, passphrase: str, *, cost: Cost | None = None) -> bytes:
    """The keys, readable with the passphrase alone. One line of JSON.

    Raises:
        PoolError: the passphrase is shorter than `MIN_CHARS`.
    """
    return _seal(bundle, _choose(passphrase, cost or Cost()))


def open_keys_of(data: bytes, passphrase: str, *, where: str) -> KeyBundle:
    """What `seal_keys` was given; `where` names the data to a person.

    Raises:
        PoolError: another passphrase, or the data is damaged.
    """
    sealed = read_sealed(data, where=where)
    return _open(sealed, _Opener.of(passphrase, sealed), where=where)


def read_sealed(data: bytes, *, where: str) -> Sealed:
    """Raises PoolError: these are no sealed keys."""
    try:
        found = msgspec.json.decode(data, type=Sealed)
    except msgspec.DecodeError:
        raise PoolError(f"{where} holds no keys that a passphrase sealed; is it damaged, or of another kind?") from None
    if len(found.salt) != _SALT_BYTES:
        raise PoolError(f"{where} is damaged: its salt has {len(found.salt)} bytes; restore it from a copy")
    return found


class _Opener(NamedTuple):
    """A stretched passphrase, so that it need not be asked for and stretched again."""

    salt: bytes
    cost: Cost
    key: bytes

    @classmethod
    def of(cls, passphrase: str, sealed: Sealed) -> "_Opener":
        return cls(sealed.salt, sealed.cost, stretch(passphrase, sealed.salt, cost=sealed.cost))


def _choose(passphrase: str, cost: Cost) -> _Opener:
    if len(passphrase) < MIN_CHARS:
        raise PoolError(f"the passphrase has {len(passphrase)} characters; choose one of at least {MIN_CHARS}")
    salt = os.urandom(_SALT_BYTES)
    return _Opener(salt, cost, stretch(passphrase, salt, cost=cost))


def _seal(bundle: KeyBundle, opener: _Opener) -> bytes:
    keys = wrap_key(opener.key, bundle.encode(), aad=_AAD)
    return msgspec.json.encode(Sealed(salt=opener.salt, cost=opener.cost, keys=keys)) + b"\n"


def _open(sealed: Sealed, opener: _Opener, *, where: str) -> KeyBundle:
    try:
        plain = unwrap_key(opener.key, sealed.keys, aad=_AAD)
    except StorageError:
        raise PoolError(f"the passphrase does not open {where}; try it again (or the file was changed)") from None
    return KeyBundle.decode(plain, where=where)


class PassphraseKeyStore:
    """Keys in a file of the user's own (0600) that a passphrase opens. It is asked for once; the anchor lies beside."""

    def __init__(self, path: Path, ask: Ask, *, cost: Cost | None = None) -> None:
        """`cost` is for new keys; what is there says its own."""
        self.path, self.anchor = path, anchor_file(path)
        self._place, self._ask, self._cost = FilePlace(path, "sealed key file"), ask, cost or Cost()
        self._opener: _Opener | None = None

    @property
    def name(self) -> str:
        return self._place.name

    def load(self) -> KeyBundle:
        data = self._place.read()
        if data is None:
            raise KeyMissing(f"there is no {self.name}; restore it from where you keep it")
        sealed = read_sealed(data, where=self.name)
        opener = self._opener
        if opener is None or (opener.salt, opener.cost) != (sealed.salt, sealed.cost):
            opener = _Opener.of(self._ask(new=False), sealed)
        bundle = _open(sealed, opener, where=self.name)
        self._opener = opener
        return bundle

    @property
    def holds(self) -> bool:
        return self._place.read() is not None

    def create(self) -> KeyBundle:
        bundle = KeyBundle.new()
        self.put(bundle)
        return bundle

    def put(self, bundle: KeyBundle) -> None:
        opener = _choose(self._ask(new=True), self._cost)
        self._place.create(_seal(bundle, opener))
        self._opener = opener

    def remove(self) -> None:
        self._place.remove()
        self.anchor.remove()

    def change(self, passphrase: str) -> None:
        """Have another passphrase open these keys from now on: after a crash it is the one or the other.

        Raises:
            KeyMissing, PoolError: the keys cannot be opened, or the new passphrase is too short.
            StorageError: the file cannot be written.
        """
        bundle, opener = self.load(), _choose(passphrase, self._cost)
        self._place.replace(_seal(bundle, opener))
        self._opener = opener

    def replace(self, bundle: KeyBundle) -> None:
        if self._opener is None:
            self.load()
        assert self._opener is not None
        self._place.replace(_seal(bundle, self._opener))

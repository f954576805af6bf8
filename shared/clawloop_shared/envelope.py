"""Sealing bytes at rest: zstd, then AES-256-GCM under a random 96-bit nonce, bound to where they belong by AAD.

    version (1 byte) | nonce (12 bytes) | ciphertext and tag

One data key a session (or device) keeps the number of messages a key far below the limit of random nonces, and lets
that session be shredded by destroying one small key. Format: docs/formats/pool.md. Knows no database.
"""

import os
import threading
from functools import cached_property

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from clawloop_shared.errors import StorageError, WireError

VERSION = b"\x01"
KEY_BYTES = 32
NONCE_BYTES = 12
_TAG_BYTES = 16
_SKIPPABLE = b"\x50\x2a\x4d\x18"
_FRAME_BYTES = 8
MAX_PLAIN_BYTES = 256 << 20
_LEVEL = 3
_SMALL_LEVEL, _SMALL_BYTES = 1, 8 << 10
"""the faster level makes small records no larger (measured: 2 % less to 2 % more), in two thirds of the time"""


class _OfThread(threading.local):
    """Making a compressor takes as long as compressing some KiB, and only one thread at a time may use it."""

    def __init__(self) -> None:
        self.small = zstandard.ZstdCompressor(level=_SMALL_LEVEL, write_content_size=True)
        self.large = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_OF_THREAD = _OfThread()

Key = bytes | AESGCM
"""a 256-bit key, or the cipher made of it: making one takes longer than sealing a few KiB"""


class Dictionary:
    """Bytes that what is sealed has much in common with. For one thread at a time."""

    def __init__(self, common: bytes) -> None:
        self._common = zstandard.ZstdCompressionDict(common, dict_type=zstandard.DICT_TYPE_RAWCONTENT)

    @cached_property
    def compressor(self) -> zstandard.ZstdCompressor:
        """Refers to `common` where it can."""
        self._common.precompute_compress(level=_SMALL_LEVEL)
        return zstandard.ZstdCompressor(level=_SMALL_LEVEL, dict_data=self._common, write_content_size=True)

    @cached_property
    def decompressor(self) -> zstandard.ZstdDecompressor:
        """Undoes what `compressor` did, and nothing else."""
        return zstandard.ZstdDecompressor(dict_data=self._common)


def new_data_key() -> bytes:
    """A fresh 256-bit key."""
    return AESGCM.generate_key(bit_length=256)


def derive_key(key: bytes, purpose: str, *, salt: bytes = b"") -> bytes:
    """A 256-bit key for one purpose from a master key (HKDF-SHA256, RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt or None, info=purpose.encode()).derive(key)


def seal(key: Key, plain: bytes, *, aad: bytes, bucket_bytes: int = 0, dictionary: Dictionary | None = None) -> bytes:
    """`plain` compressed and encrypted, readable only with the same `aad` (and the same `dictionary`).

    With `bucket_bytes` its size tells no more than how many buckets it fills.
    """
    nonce = os.urandom(NONCE_BYTES)
    if dictionary:
        packed = dictionary.compressor.compress(plain)
    else:
        packed = (_OF_THREAD.small if len(plain) <= _SMALL_BYTES else _OF_THREAD.large).compress(plain)
    if bucket_bytes:
        packed += _filling(len(packed), bucket_bytes)
    return VERSION + nonce + _cipher(key).encrypt(nonce, packed, aad)


def unseal(key: Key, sealed: bytes, *, aad: bytes, dictionary: Dictionary | None = None) -> bytes:
    """What `seal` was given.

    Raises:
        StorageError: another key, another place (AAD), changed bytes, or an unknown version.
    """
    if sealed[:1] != VERSION:
        raise StorageError(f"sealed bytes of version {sealed[:1]!r}; this clawloop reads {VERSION!r}")
    try:
        packed = _decrypt(key, sealed[1:], aad=aad)
    except InvalidTag as error:
        raise StorageError(
            f"cannot open sealed bytes of {aad.decode(errors='replace')}: wrong key or changed"
        ) from error
    try:
        decompressor = dictionary.decompressor if dictionary else _OF_THREAD.decompressor
        return decompressor.decompress(packed, max_output_size=MAX_PLAIN_BYTES)
    except zstandard.ZstdError as error:
        raise WireError(f"sealed bytes of {aad.decode(errors='replace')} do not unpack: {error}") from error


def _filling(size: int, bucket_bytes: int) -> bytes:
    """A skippable frame (RFC 8878, 3.1.2) that brings `size` bytes to whole buckets; it unpacks to nothing."""
    empty = -(size + _FRAME_BYTES) % bucket_bytes
    return _SKIPPABLE + empty.to_bytes(4, "little") + bytes(empty)


def wrap_key(master: bytes, key: bytes, *, aad: bytes) -> bytes:
    """A data key encrypted under a master key."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(master).encrypt(nonce, key, aad)


def unwrap_key(master: bytes, wrapped: bytes, *, aad: bytes) -> bytes:
    """The data key that `wrap_key` was given.

    Raises:
        StorageError: another master key, or another place.
    """
    try:
        return _decrypt(master, wrapped, aad=aad)
    except InvalidTag as error:
        raise StorageError(f"cannot unwrap the key of {aad.decode(errors='replace')}: wrong master key") from error


def _cipher(key: Key) -> AESGCM:
    return AESGCM(key) if isinstance(key, bytes) else key


def _decrypt(key: Key, data: bytes, *, aad: bytes) -> bytes:
    """Nonce, ciphertext and tag opened; bytes too short to hold them are refused like changed ones."""
    if len(data) < NONCE_BYTES + _TAG_BYTES:
        raise InvalidTag
    return _cipher(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], aad)

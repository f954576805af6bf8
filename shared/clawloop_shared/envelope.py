"""Sealing bytes at rest: zstd, then AES-256-GCM under a random 96-bit nonce, bound to where they belong by AAD.

    version (1 byte) | nonce (12 bytes) | ciphertext and tag

One data key a session (or device) keeps the number of messages a key far below the limit of random nonces, and lets
that session be shredded by destroying one small key. Format: docs/formats/pool.md. Knows no database.
"""

import os

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
MAX_PLAIN_BYTES = 256 << 20


def new_data_key() -> bytes:
    """A fresh 256-bit key."""
    return AESGCM.generate_key(bit_length=256)


def derive_key(key: bytes, purpose: str, *, salt: bytes = b"") -> bytes:
    """A 256-bit key for one purpose from a master key (HKDF-SHA256, RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt or None, info=purpose.encode()).derive(key)


def seal(key: bytes, plain: bytes, *, aad: bytes) -> bytes:
    """`plain` compressed and encrypted, readable only with the same `aad`."""
    nonce = os.urandom(NONCE_BYTES)
    packed = zstandard.ZstdCompressor(level=3, write_content_size=True).compress(plain)
    return VERSION + nonce + AESGCM(key).encrypt(nonce, packed, aad)


def unseal(key: bytes, sealed: bytes, *, aad: bytes) -> bytes:
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
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=MAX_PLAIN_BYTES)
    except zstandard.ZstdError as error:
        raise WireError(f"sealed bytes of {aad.decode(errors='replace')} do not unpack: {error}") from error


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


def _decrypt(key: bytes, data: bytes, *, aad: bytes) -> bytes:
    """Nonce, ciphertext and tag opened; bytes too short to hold them are refused like changed ones."""
    if len(data) < NONCE_BYTES + _TAG_BYTES:
        raise InvalidTag
    return AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], aad)

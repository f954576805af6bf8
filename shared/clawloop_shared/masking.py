"""Masks that only two members of a sum can compute, and that vanish from the sum of both: X25519, HKDF-SHA256, AES-CTR.

    key      = HKDF-SHA256(X25519(mine, theirs), salt = the roster's hash, info = purpose, sum, both public keys)
    mask     = AES-256-CTR(key, counter from 0), as little-endian numbers of 32 bits
    masked   = values + own mask + (masks of members with a later place) - (masks of those with an earlier), mod 2^32

After Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning". Each key masks one
vector of one sum: keys are made anew for each, and the salt names the roster. Knows no message and no member list.
"""

import secrets
from collections.abc import Iterable

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from clawloop_shared.errors import SumError
from clawloop_shared.fixed_point import Ring

KEY_BYTES = 32
_NONCE_BYTES = 12
_BLOCK = 1 << 18
"""numbers that are masked at a time: they stay in a core's cache"""


def new_secret() -> bytes:
    """32 random bytes: an X25519 private key, or the seed of an own mask."""
    return secrets.token_bytes(KEY_BYTES)


def public_of(private: bytes) -> bytes:
    """The X25519 public key of a private one."""
    key = X25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def agree(private: bytes, public: bytes) -> bytes:
    """What the holders of two X25519 keys alone can compute; not a key yet: `derive` one for each purpose.

    Raises:
        SumError: `public` is no key that anything secret can be agreed with.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SumError(f"nothing can be agreed with key {public.hex()[:16]}: {error}") from error


def derive(secret: bytes, *, purpose: str, sum_id: str, roster: bytes, parties: tuple[bytes, ...]) -> bytes:
    """A key of 32 bytes for one purpose in one sum. `roster` is the roster's SHA-256, `parties` the public keys of
    those that share the secret, in the order that the purpose says."""
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (purpose.encode(), sum_id.encode(), *parties))
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=roster, info=info).derive(secret)


def add_masks(values: Ring, *, plus: Iterable[bytes], minus: Iterable[bytes] = ()) -> Ring:
    """`values` with the masks of these keys added and subtracted, modulo 2^32; a new array."""
    streams = [(_stream(key), True) for key in plus] + [(_stream(key), False) for key in minus]
    masked, zeros = values.copy(), bytes(4 * _BLOCK)
    buffer = bytearray(4 * _BLOCK + 15)
    for start in range(0, len(masked), _BLOCK):
        block = masked[start : start + _BLOCK]
        size = 4 * len(block)
        for stream, is_added in streams:
            stream.update_into(memoryview(zeros)[:size], buffer)
            mask = np.frombuffer(buffer, "<u4", count=len(block))
            (np.add if is_added else np.subtract)(block, mask, out=block)
    return masked


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()


def seal(key: bytes, plain: bytes, *, bound_to: bytes) -> bytes:
    """AES-256-GCM under a key of two members, with a random nonce before it; it opens only with the same `bound_to`."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, bound_to)


def unseal(key: bytes, sealed: bytes, *, bound_to: bytes) -> bytes:
    """What `seal` was given.

    Raises:
        SumError: it was not sealed under this key for this, or was changed.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound_to)
    except (InvalidTag, ValueError) as error:
        raise SumError("sealed shares do not open: they were changed, or are for another member or sum") from error

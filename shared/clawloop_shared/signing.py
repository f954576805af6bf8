"""Ed25519 signatures over length-prefixed, domain-separated bytes. Verify, then parse.

The prefix keeps a signature of one kind of thing from being shown as a signature of another
(the idea of DSSE's pre-authentication encoding, https://github.com/secure-systems-lab/dsse).
"""

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from clawloop_shared.errors import KeyMissing, SignatureInvalid

_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aiou"


def new_key() -> bytes:
    """A fresh private key: 32 raw bytes."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )


def public_key(private: bytes) -> bytes:
    """The public key (32 raw bytes) of a private one."""
    key = Ed25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def key_id(public: bytes) -> str:
    """The short name of a public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def key_words(public: bytes) -> str:
    """Six pronounceable words (96 bits) for two people to compare (proquints, https://arxiv.org/abs/0901.4016)."""
    digest = hashlib.sha256(b"clawloop key words\0" + public).digest()
    return " ".join(_proquint(int.from_bytes(digest[i : i + 2], "big")) for i in range(0, 12, 2))


def _proquint(number: int) -> str:
    return (
        _CONSONANTS[number >> 12]
        + _VOWELS[number >> 10 & 3]
        + _CONSONANTS[number >> 6 & 15]
        + _VOWELS[number >> 4 & 3]
        + _CONSONANTS[number & 15]
    )


def framed(domain: str, payload: bytes) -> bytes:
    """What is really signed: version, domain and payload, the last two with their lengths before them."""
    name = domain.encode()
    return b"clawloop-signed-v1" + len(name).to_bytes(4, "big") + name + len(payload).to_bytes(8, "big") + payload


def sign(private: bytes, domain: str, *, payload: bytes) -> bytes:
    """The signature (64 bytes) of `payload` for use as `domain`."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(framed(domain, payload))


def verify(public: bytes, domain: str, *, payload: bytes, signature: bytes) -> None:
    """Return if `signature` was made over these bytes for this domain by the holder of `public`.

    Raises:
        SignatureInvalid: it was not.
        KeyMissing: `public` is no key, so nothing could be checked.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
    except ValueError as error:
        raise KeyMissing(f"cannot check a signature: the public key has {len(public)} bytes, not 32") from error
    try:
        key.verify(signature, framed(domain, payload))
    except InvalidSignature as error:
        raise SignatureInvalid(f"the signature of this {domain} was not made by key {key_id(public)}") from error

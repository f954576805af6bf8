"""The factor A that all devices share while they learn B alone (FFA-LoRA, https://arxiv.org/abs/2403.12313).

It is never sent: everybody draws it from the task's seed, bit for bit the same on every machine. The bits are those of
AES-256-CTR under a key that SHA-256 makes of the names; each number of them is one whole number of 24 bits, and one
multiplication of float32, which IEEE 754 rounds in one way. Format: docs/formats/secure.md.
"""

import hashlib
import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_DOMAIN = b"clawloop-frozen-a-v1"
_BITS = 24
"""of each number: as many as a float32 holds"""


def frozen_a(seed: int, path: str, *, rank: int, inputs: int) -> bytes:
    """A of the linear layer at `path`, (rank, inputs), float32, little-endian, row after row.

    Uniform over (-1/sqrt(inputs), 1/sqrt(inputs)), as PEFT begins A: `kaiming_uniform_(a=sqrt(5))`, whose bound is
    sqrt(3) * sqrt(2 / (1 + 5)) / sqrt(inputs). The first rows of a larger rank are those of a smaller one, so that
    devices of different ranks still share what both have.

    Raises:
        ValueError: `seed` is not in 0..2^63-1, or a size is below 1.
    """
    if not 0 <= seed < 1 << 63 or rank < 1 or inputs < 1:
        raise ValueError(f"a frozen factor of seed {seed}, rank {rank}, {inputs} inputs cannot be drawn")
    name = path.encode()
    key = hashlib.sha256(
        _DOMAIN + seed.to_bytes(8, "big") + inputs.to_bytes(8, "big") + len(name).to_bytes(4, "big") + name
    ).digest()
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * rank * inputs))
    whole = np.frombuffer(stream, "<u4") >> np.uint32(32 - _BITS)
    odd = 2 * whole.astype(np.int64) + 1 - (1 << _BITS)
    bound = np.float32(1.0 / math.sqrt(inputs)) * np.float32(2.0**-_BITS)
    return (odd.astype(np.float32) * bound).astype("<f4").tobytes()

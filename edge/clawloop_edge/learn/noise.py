"""Clipping a delta and hiding it in Gaussian noise. Pure but for the key, which is given.

The noise comes from a stream cipher under a fresh secret key, never from a simulation's generator: who could guess the
generator's state could take the noise out again. Sums in floating point leak in their low bits what was added to the
noise (Mironov 2012, "On significance of the least significant bits for differential privacy"), so what leaves is on a
grid that is coarse against what float64 can tell apart and fine against the noise.
"""

import math
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Factors = Mapping[str, NDArray[np.float32]]
KEY_BYTES = 32
GRID = 2.0**-10
"""times the noise's standard deviation, rounded down to a power of two: how far apart the values are that may leave"""
_AT_ONCE = 1 << 20
_UNIT = 2.0**-53


def norm_of(factors: Mapping[str, NDArray[np.floating]]) -> float:
    """The L2 norm over all of them together."""
    return math.sqrt(sum(float(np.sum(np.square(each, dtype=np.float64))) for each in factors.values()))


def clipped(factors: Factors, clip: float) -> dict[str, NDArray[np.float64]]:
    """The factors scaled down together so that their L2 norm is at most `clip`."""
    norm = norm_of(factors)
    scale = min(1.0, clip / norm) if norm else 1.0
    return {name: each.astype(np.float64) * scale for name, each in factors.items()}


def hidden(factors: Factors, *, clip: float, sigma: float, key: bytes) -> dict[str, NDArray[np.float32]]:
    """The factors cut to the norm `clip`, with Gaussian noise of standard deviation `sigma * clip` on each value.

    `key`: 32 secret bytes that were never used before; each factor has its own part of the stream.

    Raises:
        ValueError: a size that hides nothing, or a key of another length.
    """
    deviation = sigma * clip
    if not (0 < deviation < math.inf and clip > 0) or len(key) != KEY_BYTES:
        raise ValueError(f"noise of {sigma} x {clip} with a key of {len(key)} bytes hides nothing")
    grid = 2.0 ** math.floor(math.log2(deviation * GRID))
    stream = _Stream(key)
    found = {}
    for name, each in sorted(clipped(factors, clip).items()):
        noised = each + deviation * stream.gaussian(each.size).reshape(each.shape)
        found[name] = (np.rint(noised / grid) * grid).astype(np.float32)
    return {name: found[name] for name in factors}


class _Stream:
    """Gaussian values from the keystream of AES-256-CTR."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """`count` independent values of N(0, 1), by Box and Muller.

        With 53 bits a value reaches no further than 8.6, beyond which a true one would lie once in 10^17.
        """
        found = np.empty(count)
        for start in range(0, count, _AT_ONCE):
            size = min(_AT_ONCE, count - start)
            pairs = (size + 1) // 2
            uniform = self._uniform(2 * pairs)
            radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
            angle = 2.0 * math.pi * uniform[pairs:]
            both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
            found[start : start + size] = both[:size]
        return found

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """Values in (0, 1], multiples of 2^-53."""
        words = np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 1.0) * _UNIT

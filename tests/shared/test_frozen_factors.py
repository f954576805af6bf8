"""The factor that nobody sends is the same everywhere."""

import hashlib
import math
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from clawloop_shared.frozen_factors import frozen_a

PATH = "model.layers.0.self_attn.q_proj"


def numbers(seed: int, path: str = PATH, *, rank: int = 16, inputs: int = 512) -> np.ndarray:
    return np.frombuffer(frozen_a(seed, path, rank=rank, inputs=inputs), "<f4").reshape(rank, inputs)


def test_the_bytes_are_what_they_were_on_every_machine() -> None:
    drawn = frozen_a(7, PATH, rank=8, inputs=640)
    assert hashlib.sha256(drawn).hexdigest() == "8ac3acf9fcee8277fa7d401f04cee1fdf65ba25a7519a9612cd2688dcfed5a72"
    assert drawn == drawn_by_hand(7, PATH, rank=8, inputs=640)


def drawn_by_hand(seed: int, path: str, *, rank: int, inputs: int) -> bytes:
    """The format's own words, with whole numbers and one rounding each."""
    names = struct.pack(">QQI", seed, inputs, len(path)) + path.encode()
    key = hashlib.sha256(b"clawloop-frozen-a-v1" + names).digest()
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * rank * inputs))
    (bound,) = struct.unpack("<f", struct.pack("<f", 1 / math.sqrt(inputs)))
    odd = (2 * (whole >> 8) + 1 - (1 << 24) for (whole,) in struct.iter_unpack("<I", stream))
    return b"".join(struct.pack("<f", number * bound / (1 << 24)) for number in odd)


def test_it_is_uniform_within_the_bound_of_peft() -> None:
    drawn = numbers(1, rank=64, inputs=4096).astype(np.float64) * 4096**0.5
    assert np.abs(drawn).max() < 1
    assert abs(drawn.mean()) < 0.005
    assert abs(drawn.var() - 1 / 3) < 0.005
    counts, _ = np.histogram(drawn, bins=64, range=(-1, 1))
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 20 < chi_square < 120


def test_seed_path_and_width_each_give_another() -> None:
    first = numbers(1)
    for other in (numbers(2), numbers(1, PATH.replace("q_", "k_")), numbers(1, inputs=513)[:, :512]):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05


def test_the_first_rows_do_not_depend_on_the_rank() -> None:
    assert np.array_equal(numbers(3, rank=16)[:4], numbers(3, rank=4))


@pytest.mark.parametrize(("seed", "rank", "inputs"), [(-1, 8, 8), (1 << 63, 8, 8), (0, 0, 8), (0, 8, 0)])
def test_what_cannot_be_drawn_is_refused(seed: int, rank: int, inputs: int) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        frozen_a(seed, PATH, rank=rank, inputs=inputs)

"""Numbers as bytes: little-endian, behind one letter for their width and order. Pure.

In planes, the first byte of every number comes first, then the second of every number: what is alike in all of them
(the high bytes of ids) lies together, and compresses.
"""

import sys
from array import array
from collections.abc import Sequence
from typing import TypeVar

_FEW_BYTES = 512 * 4
"""planes make a tenth less of 100 ids, and a fifth more of 13,000: of many, what comes again is found in order"""
Number = TypeVar("Number", int, float)

_PLANES = {b"4": b"I", b"8": b"q"}
"""the letter of what lies in planes, and that of the same numbers one by one"""


def pack_ints(values: Sequence[int]) -> bytes:
    """Whole numbers one by one. The same numbers always give the same bytes.

    Raises:
        OverflowError: a number has more than 64 bits.
    """
    for code in "HI":
        try:
            return _packed(code, array(code, values))
        except OverflowError:
            continue
    return _packed("q", array("q", values))


def pack_ids(values: Sequence[int]) -> bytes:
    """Token ids one by one, 32 bits each, without a letter.

    Raises:
        OverflowError: a number has more bits, or is negative.
    """
    return _packed("I", array("I", values))[1:]


def ids_to_seal(packed: bytes) -> bytes:
    """What `pack_ids` gave, or some of it, as it compresses best: few in planes, many one by one."""
    return _in_planes(b"4", packed, 4) if len(packed) <= _FEW_BYTES else b"I" + packed


def wide_to_seal(values: Sequence[int]) -> bytes:
    """Whole numbers of up to 64 bits in planes.

    Raises:
        OverflowError: a number has more.
    """
    return _in_planes(b"8", _packed("q", array("q", values))[1:], 8)


def pack_floats(values: Sequence[float]) -> bytes:
    """Floats one by one: 32 bits each where that is exact (what an engine gives), else 64. Planes save nothing."""
    narrow = array("f", values)
    return _packed("f", narrow) if narrow.tolist() == values else _packed("d", array("d", values))


def unpack_ints(data: bytes) -> list[int]:
    """What one of these was given."""
    code, body = _one_by_one(data)
    codes: dict[bytes, array[int]] = {b"H": array("H"), b"I": array("I"), b"q": array("q")}
    return _unpacked(body, codes[code])


def unpack_floats(data: bytes) -> list[float]:
    """What `pack_floats` was given, bit for bit."""
    return _unpacked(data[1:], array("f" if data[:1] == b"f" else "d"))


def _packed(code: str, values: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return code.encode() + values.tobytes()


def _in_planes(letter: bytes, packed: bytes, size: int) -> bytes:
    return letter + b"".join([packed[plane::size] for plane in range(size)])


def _one_by_one(data: bytes) -> tuple[bytes, bytes]:
    """The letter and the bytes of numbers that lie one by one."""
    code = _PLANES.get(data[:1])
    if code is None:
        return data[:1], data[1:]
    size = 4 if code == b"I" else 8
    count = (len(data) - 1) // size
    body = bytearray(count * size)
    for plane in range(size):
        body[plane::size] = data[1 + plane * count : 1 + (plane + 1) * count]
    return code, bytes(body)


def _unpacked(data: bytes, values: "array[Number]") -> list[Number]:
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()

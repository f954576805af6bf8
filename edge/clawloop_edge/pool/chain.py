"""Lists that share their beginnings, stored as (base, shared length, own tail), and how to get them back exactly.

An agent's prompt is mostly its last prompt again, so a session costs what is new in it, not calls x length.
Pure: knows no database and no encryption.
"""

import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Link(Generic[T]):
    """One stored list: the first `shared` entries of the base's list, then `own()`."""

    base_id: str | None
    shared: int
    own: Callable[[], list[T]]


def shared_length(one: Sequence[T], other: Sequence[T]) -> int:
    """How many entries the two have in common from their start. O(n), by slices rather than entry by entry."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def prefix(start: str, length: int, *, link: Callable[[str], Link[T]], known: dict[str, list[T]]) -> list[T]:
    """The first `length` entries of the list named `start`.

    Ancestors that give nothing of their own to this prefix are passed by without opening them; `known` holds lists
    that are at hand already. Takes O(length + ancestors).
    """
    pieces: list[list[T]] = []
    name: str | None = start
    while length > 0 and name is not None:
        if name in known:
            pieces.append(known[name][:length])
            break
        here = link(name)
        if length > here.shared:
            pieces.append(here.own()[: length - here.shared])
            length = here.shared
        name = here.base_id
    return pieces[0] if len(pieces) == 1 else list(chain.from_iterable(reversed(pieces)))


def pack_ints(values: Sequence[int]) -> bytes:
    """Whole numbers as little-endian bytes behind one letter for their width.

    Raises:
        OverflowError: a number has more than 64 bits.
    """
    for code in "HI":
        try:
            return _packed(code, array(code, values))
        except OverflowError:
            continue
    return _packed("q", array("q", values))


def pack_floats(values: Sequence[float]) -> bytes:
    """Floats as little-endian bytes: 32 bits each where that is exact (what an engine gives), else 64."""
    wide, narrow = array("d", values), array("f", values)
    return _packed("f", narrow) if array("d", narrow) == wide else _packed("d", wide)


def unpack_ints(data: bytes) -> list[int]:
    """What `pack_ints` was given."""
    codes: dict[bytes, array[int]] = {b"H": array("H"), b"I": array("I"), b"q": array("q")}
    return _unpacked(data, codes[data[:1]])


def unpack_floats(data: bytes) -> list[float]:
    """What `pack_floats` was given, bit for bit."""
    return _unpacked(data, array("f" if data[:1] == b"f" else "d"))


def _packed(code: str, values: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return code.encode() + values.tobytes()


def _unpacked(data: bytes, values: "array[Number]") -> list[Number]:
    values.frombytes(data[1:])
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()

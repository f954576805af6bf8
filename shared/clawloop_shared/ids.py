"""Identifiers: ULIDs, sortable by the millisecond they were made in, 26 characters of Crockford base32.

A step's id is the completion id that the client got: the API's prefix and a ULID (`chatcmpl-01J...`).
Source: https://github.com/ulid/spec. Our own lines, because a call makes three and the library took 22 µs for each.
"""

import os
import time

_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _LETTERS for low in _LETTERS]
_SHIFTS = range(120, -1, -10)


def new_id() -> str:
    """A fresh ULID: 48 bits of milliseconds since 1970, 80 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    return "".join([_PAIRS[value >> shift & 1023] for shift in _SHIFTS])


def new_step_id(prefix: str = "chatcmpl") -> str:
    """A fresh completion id, e.g. `chatcmpl-01JD...`."""
    return f"{prefix}-{new_id()}"

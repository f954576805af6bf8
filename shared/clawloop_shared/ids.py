"""Identifiers: ULIDs, sortable by the time they were made, 26 characters of Crockford base32.

A step's id is the completion id that the client got: the API's prefix and a ULID (`chatcmpl-01J...`).
Source: https://github.com/ulid/spec.
"""

from ulid import ULID


def new_id() -> str:
    """A fresh ULID."""
    return str(ULID())


def new_step_id(prefix: str = "chatcmpl") -> str:
    """A fresh completion id, e.g. `chatcmpl-01JD...`."""
    return f"{prefix}-{ULID()}"

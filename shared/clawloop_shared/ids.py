"""Identifiers: ULIDs, sortable by the time they were made, 26 characters of Crockford base32.

A step's id is the completion id that the client got: the API's prefix and a ULID (`chatcmpl-01J...`).
Source: https://github.com/ulid/spec.
"""

import re

from ulid import ULID

_ULID = re.compile(r"\A[0-7][0-9A-HJKMNP-TV-Z]{25}\Z")
_STEP = re.compile(r"\A[a-z]{2,16}[-_][0-7][0-9A-HJKMNP-TV-Z]{25}\Z")


def new_id() -> str:
    """A fresh ULID."""
    return str(ULID())


def new_step_id(prefix: str = "chatcmpl") -> str:
    """A fresh completion id, e.g. `chatcmpl-01JD...`."""
    return f"{prefix}-{ULID()}"


def is_id(text: str) -> bool:
    """Whether `text` is a ULID."""
    return bool(_ULID.match(text))


def is_step_id(text: str) -> bool:
    """Whether `text` is a completion id of ours."""
    return bool(_STEP.match(text))

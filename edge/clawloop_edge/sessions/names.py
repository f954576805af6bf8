"""What callers call their sessions and trajectories, turned into ids that tell nothing of it.

A caller's name may say what nobody should read in a database or send to a server (an account, a phone number). So only
ids that are random by their shape are kept as they are; any other name is kept as a keyed hash of it.
"""

import re
from collections.abc import Callable

_RANDOM = re.compile(
    r"(?:s-)?[0-9a-f]{32,64}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|[0-9A-HJKMNP-TV-Z]{26}", re.ASCII
)
"""hex of 128 bits or more, UUID, ULID"""
_PREFIX = "s-"
_TAG_BYTES = 16


class SessionNames:
    """Names of one pool's sessions. `tag` is the pool's blind index (`Pool.tag`)."""

    def __init__(self, tag: Callable[[str, bytes], bytes]) -> None:
        self._tag = tag

    def id_of(self, name: str) -> str:
        """The id under which what is called `name` is kept; that of an id is itself, that of no name none."""
        if not name or _RANDOM.fullmatch(name):
            return name
        return _PREFIX + self._tag("session name", name.encode("utf-8", "surrogatepass"))[:_TAG_BYTES].hex()

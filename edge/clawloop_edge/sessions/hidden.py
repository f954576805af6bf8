"""What was said incognito, as hashes and in memory only, so that no later call brings it into the pool as its history.

Lives on the event loop. A restart forgets it.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

K = TypeVar("K", bytes, str)
_MAX_HASHES = 1 << 16
_MAX_SESSIONS = 1 << 12


class Hidden:
    """The conversations of incognito calls, each by the hash of what was sent, and the sessions that they were in."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, None] = OrderedDict()
        self._sessions: OrderedDict[str, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def add(self, conversation: bytes, *, session_id: str) -> None:
        """Hide a conversation, and with it all that continues it."""
        _put(self._hashes, conversation, limit=_MAX_HASHES)
        _put(self._sessions, session_id, limit=_MAX_SESSIONS)

    def holds(self, hashes: Iterable[bytes]) -> bool:
        """Whether one of these is the hash of a hidden conversation."""
        return any(conversation in self._hashes for conversation in hashes)

    def touches(self, session_id: str) -> bool:
        """Whether something of this session is hidden."""
        return session_id in self._sessions


def _put(entries: "OrderedDict[K, None]", key: K, *, limit: int) -> None:
    entries[key] = None
    entries.move_to_end(key)
    if len(entries) > limit:
        entries.popitem(last=False)

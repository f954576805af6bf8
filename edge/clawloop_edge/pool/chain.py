"""Lists that have much in common with another, stored as what is their own, and how to get them back exactly.

An agent's prompt is mostly its last prompt again, so a session costs what is new in it, not calls x length. What moves
on from one prompt to the next (a message about the state of the moment) is found again as well.
Pure: knows no database and no encryption.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)

Copy = tuple[int, int, int]
"""(at, start, count): before the own entry number `at` come the base's entries from `start` to `start + count`"""
ID_BYTES = 4
"""ids that are compared lie in bytes, 32 bits each: compared at once, and a ninth of the memory of a list"""
_ANCHOR = 8 * ID_BYTES
"""so many ids at least must be found again together: a copy takes about as many bytes as four ids"""


@dataclass(frozen=True)
class Tail(Generic[T]):
    """What a list has beyond the first `shared` entries of its base: its own entries, and copies of the base's."""

    shared: int
    own: list[T]
    copies: list[Copy]

    @property
    def reach(self) -> int:
        """How many of the base's entries it needs."""
        return max(self.shared, *(start + count for _, start, count in self.copies), 0)

    def grow(self, base: list[T]) -> None:
        """Make the base's list (its first `reach` entries at least) into this one."""
        grown, upto = list[T](), 0
        for at, start, count in self.copies:
            grown += self.own[upto:at]
            grown += base[start : start + count]
            upto = at
        del base[self.shared :]
        base += grown
        base += self.own[upto:]


@dataclass(frozen=True)
class IdsTail:
    """What the ids of a prompt have beyond the first `shared` of the base's: their own, packed, and copies."""

    shared: int
    own: bytes
    copies: list[Copy]


@dataclass(frozen=True)
class Link(Generic[Name, T]):
    """One stored list: the first `shared` entries of the base's list, then what `tail()` gives."""

    base: Name | None
    shared: int
    tail: Callable[[], Tail[T]]


def shared_length(one: Sequence[T], other: Sequence[T]) -> int:
    """How many entries the two have in common from their start. O(that many), by slices rather than entry by entry."""
    most = min(len(one), len(other))
    low, high = 0, min(8, most)
    while one[low:high] == other[low:high]:
        if high == most:
            return most
        low, high = high, min(8 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def texts_tail(base: Sequence[T], texts: Sequence[T]) -> Tail[T]:
    """What `texts` has beyond `base`: an entry that the base has anywhere is a copy."""
    shared = shared_length(base, texts)
    places = {text: place for place, text in enumerate(base[shared:], shared)}
    own: list[T] = []
    copies: list[Copy] = []
    for text in texts[shared:]:
        place = places.get(text)
        if place is None:
            own.append(text)
        elif copies and copies[-1][0] == len(own) and place == copies[-1][1] + copies[-1][2]:
            copies[-1] = (len(own), copies[-1][1], copies[-1][2] + 1)
        else:
            copies.append((len(own), place, 1))
    return Tail(shared, own, copies)


def ids_tail(base: bytes, ids: bytes, *, reply_at: int) -> IdsTail:
    """What the prompt `ids` has beyond `base`, a prompt and from id `reply_at` on the reply to it.

    Two stretches of the base are looked for: what it told last, which may have moved to the end; and its reply.
    """
    shared = shared_length(base, ids) // ID_BYTES * ID_BYTES
    found: list[tuple[int, int, int]] = []
    for start in {shared: None, max(shared, reply_at * ID_BYTES): None}:
        place = _find(ids, base[start : start + _ANCHOR], after=shared)
        if place is not None:
            found.append((place, start, shared_length(base[start:], ids[place:]) // ID_BYTES * ID_BYTES))
    own, upto = b"", shared
    copies: list[Copy] = []
    for place, start, count in sorted(found):
        if place >= upto:
            own += ids[upto:place]
            copies.append((len(own) // ID_BYTES, start // ID_BYTES, count // ID_BYTES))
            upto = place + count
    return IdsTail(shared // ID_BYTES, own + ids[upto:], copies)


def _find(ids: bytes, anchor: bytes, *, after: int) -> int | None:
    if len(anchor) < _ANCHOR:
        return None
    place = ids.find(anchor, after)
    while place >= 0 and place % ID_BYTES:
        place = ids.find(anchor, place + 1)
    return place if place >= 0 else None


def rebuild(
    start: Name | None, length: int, *, link: Callable[[Name], Link[Name, T]], known: Mapping[Name, list[T]]
) -> list[T]:
    """The first `length` entries of the list named `start` (None: the empty one).

    Ancestors that give nothing of their own to what is wanted are passed by without opening them; `known` holds lists
    that are at hand already. Takes O(length + ancestors + what they add).
    """
    tails: list[Tail[T]] = []
    found: list[T] = []
    name, wanted = start, length
    while wanted > 0 and name is not None:
        if name in known:
            found = known[name][:wanted]
            break
        here = link(name)
        if wanted > here.shared:
            tails.append(here.tail())
            wanted = tails[-1].reach
        name = here.base
    for tail in reversed(tails):
        tail.grow(found)
    del found[length:]
    return found

"""Merkle trees over a list that only grows, as RFC 6962 section 2.1 and RFC 9162 section 2.1 define them.

Whoever keeps a list keeps the hash of every complete subtree, named by (level, position): level 0 are the leaves, and
(l, p) covers the leaves from p * 2^l on, 2^l of them. From those every root and every proof takes O(log n) reads and
hashes. Pure: knows no file and no key, and not what a leaf stands for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from clawloop_shared.errors import ProofInvalid

HASH_BYTES = 32
MAX_SIZE = 1 << 62
"""a list of this many leaves or more is none; keeps a size from the network from being worked on"""
EMPTY_ROOT = hashlib.sha256(b"").digest()
"""the root of a list without leaves"""

Read = Callable[[int, int], bytes]
"""the hash of the complete subtree at (level, position)"""
Node = tuple[int, int, bytes]
"""level, position and hash of a complete subtree"""


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry): no leaf can pass for an inner node."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


def appended(size: int, leaf: bytes, read: Read) -> list[Node]:
    """The complete subtrees that come to be when a leaf (its hash) is put after `size` others, the leaf first."""
    nodes = [(0, size, leaf)]
    level, position = 0, size
    while position & 1:
        left, right = read(level, position - 1), nodes[-1][2]
        level, position = level + 1, position >> 1
        nodes.append((level, position, node_hash(left, right)))
    return nodes


def root(size: int, read: Read) -> bytes:
    """The Merkle tree hash of the first `size` leaves."""
    return _range_hash(0, size, read) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, read: Read) -> list[bytes]:
    """PATH(index, D[size]) of RFC 9162 section 2.1.3.1: the siblings on the way from a leaf to the root, lowest first.

    Raises:
        ProofInvalid: there is no such leaf.
    """
    if not 0 <= index < size:
        raise ProofInvalid(f"no entry {index} in a log of {size}")
    proof, start, end = list[bytes](), 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            proof.append(_range_hash(middle, end, read))
            end = middle
        else:
            proof.append(_range_hash(start, middle, read))
            start = middle
    return proof[::-1]


def consistency_proof(old_size: int, new_size: int, read: Read) -> list[bytes]:
    """PROOF(old_size, D[new_size]) of RFC 9162 section 2.1.4.1: that the list of `new_size` begins with the older one.
    Empty where there is nothing to prove (sizes alike, or nothing before).

    Raises:
        ProofInvalid: the older list is the longer one.
    """
    if not 0 <= old_size <= new_size:
        raise ProofInvalid(f"a log of {new_size} entries cannot go on from one of {old_size}")
    if old_size in (0, new_size):
        return []
    proof, start, end = list[bytes](), 0, new_size
    while old_size < end:
        middle = start + _split(end - start)
        if old_size <= middle:
            proof.append(_range_hash(middle, end, read))
            end = middle
        else:
            proof.append(_range_hash(start, middle, read))
            start = middle
    if start:  # else the old root is itself that subtree, and whoever checks has it
        proof.append(_range_hash(start, end, read))
    return proof[::-1]


def check_inclusion(leaf: bytes, index: int, *, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Return if the tree of `size` leaves with this root has `leaf` (its hash) at `index` (RFC 9162 section 2.1.3.2).

    Raises:
        ProofInvalid: that is not what the proof shows.
    """
    if not 0 <= index < size < MAX_SIZE:
        raise ProofInvalid(f"no entry {index} in a log of {size}")
    _check_hashes(proof)
    at, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ProofInvalid(f"the proof of entry {index} of {size} has {len(proof)} hashes, more than it needs")
        if at & 1 or at == last:
            found = node_hash(sibling, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        at, last = at >> 1, last >> 1
    if last != 0 or found != root:
        raise ProofInvalid(f"the proof of entry {index} of {size} does not lead to the log's root")


def check_consistency(
    old_size: int, old_root: bytes, *, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Return if the tree of `new_size` leaves begins with all of the older one (RFC 9162 section 2.1.4.2).

    Raises:
        ProofInvalid: that is not what the proof shows.
    """
    if not 0 <= old_size <= new_size < MAX_SIZE:
        raise ProofInvalid(f"a log of {new_size} entries cannot go on from one of {old_size}")
    _check_hashes(proof)
    if old_size in (0, new_size):
        if proof or old_root != (new_root if old_size else EMPTY_ROOT):
            raise ProofInvalid(f"a log of {new_size} entries is not the one of {old_size} that was seen before")
        return
    path = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    at, last = old_size - 1, new_size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    if not path:
        raise ProofInvalid(f"nothing proves that the log of {new_size} entries goes on from that of {old_size}")
    if _both_roots(path, at, last) != (old_root, new_root):
        raise ProofInvalid(f"the log of {new_size} entries does not go on from that of {old_size}: it is another")


def _both_roots(path: Sequence[bytes], at: int, last: int) -> tuple[bytes, bytes]:
    """The roots of the older and of the newer tree that a consistency proof leads to."""
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise ProofInvalid(f"the proof has {len(path)} hashes, more than it needs")
        if at & 1 or at == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        at, last = at >> 1, last >> 1
    if last != 0:
        raise ProofInvalid(f"the proof has {len(path)} hashes, fewer than it needs")
    return old, new


def _check_hashes(proof: Sequence[bytes]) -> None:
    if any(len(part) != HASH_BYTES for part in proof):
        raise ProofInvalid(f"a proof is of hashes of {HASH_BYTES} bytes")


def _split(size: int) -> int:
    """The largest power of two below `size` (at least 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def _range_hash(start: int, end: int, read: Read) -> bytes:
    """The Merkle tree hash of the leaves [start, end), `start` being where a split can fall: the complete subtrees of
    falling size that it is made of, joined from the right."""
    parts = [read(level, position) for level, position in _complete(start, end)]
    found = parts.pop()
    while parts:
        found = node_hash(parts.pop(), found)
    return found


def _complete(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        level = (end - start).bit_length() - 1
        yield level, start >> level
        start += 1 << level

"""Prefix-tree packing: what several calls share is laid out, and computed, once.

The calls of a row form a trie of token ids, laid out in depth-first pre-order. A node's subtree is then the range
[j, end[j]), so that one rule says who sees whom: node i attends to node j iff `j <= i < end[j]`. A position is the
depth in the trie. A row of one call is plain causal attention; calls that share nothing are several roots; a history
that was rewritten is a fork. Losses hang on (predictor, target) pairs, so that one node may predict several targets.

Knows token ids and the numbers that travel with them; no model, no loss.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clawloop_shared.rows import Sample

Ids = np.ndarray[tuple[int], np.dtype[np.uint32]]
Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class PackedRow:
    """T trie nodes, P trained tokens, U units (a unit is what a row holds of one trajectory), S samples.

    predictor_P: node whose output predicts the token; target_P: the token; unit_P: whose token it is.
    trajectory_U: the trajectory's number in the update. members_S: which of the samples that were packed are here, in
    the order of their tokens in P; counts_S: how many tokens each has there.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    end_T: Tensor
    predictor_P: Tensor
    target_P: Tensor
    behaviour_P: Tensor
    advantage_P: Tensor
    temperature_P: Tensor
    unit_P: Tensor
    weight_U: Tensor
    trajectory_U: Tensor
    members_S: tuple[int, ...]
    counts_S: tuple[int, ...]

    @property
    def is_causal(self) -> bool:
        """Whether nothing forks, so that plain causal attention is the same."""
        return bool((self.end_T == len(self.end_T)).all())

    def sees_TT(self) -> Tensor:
        """The dense mask: [i, j] is True where node i attends to node j."""
        node = torch.arange(len(self.end_T), device=self.end_T.device)
        return (node[None, :] <= node[:, None]) & (node[:, None] < self.end_T[None, :])

    def to(self, device: torch.device) -> "PackedRow":
        """The same row on another device."""
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def pack(
    samples: Sequence[Sample],
    *,
    row_tokens: int,
    join_tokens: int | None = None,
    fill: bool = False,
    min_shared: int = 16,
) -> list[PackedRow]:
    """Rows of at most `row_tokens` nodes, each of whole trajectories that share at least `min_shared` tokens.

    A trajectory is split between rows only if it does not fit one by itself, and a sample never is. Several
    trajectories have at most `join_tokens` nodes in a row (by default as many as one): where the mask is dense, what
    they share soon costs more than it saves. With `fill`, rows that share nothing are put together as long as they
    fit, the largest first and each where it leaves least: right where the mask is sparse, wrong where it is dense.
    """
    forest = _Forest(samples)
    drafts: list[_Draft] = []
    for group in _by_prefix(samples, forest):
        _place(drafts, group, forest, row_tokens=row_tokens, join_tokens=join_tokens or row_tokens, least=min_shared)
    if fill:
        drafts = _filled(drafts, row_tokens)
    return [_lay_out(draft, forest, samples) for draft in drafts]


class _Forest:
    """The samples in the order of their ids, each with a rank in it, and how many tokens any two share."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        keys = [_key(sample) for sample in samples]
        self.members = sorted(range(len(keys)), key=keys.__getitem__)
        self.ranks = {member: rank for rank, member in enumerate(self.members)}
        self.keys = [keys[member] for member in self.members]
        # Between two ranks the fewest tokens that neighbours share; of 2^k neighbours in level k.
        self._levels = [np.array([0, *map(_shared, self.keys, self.keys[1:])], dtype=np.int64)]
        for level in range(1, len(keys).bit_length()):
            last, step = self._levels[-1], 1 << (level - 1)
            self._levels.append(np.minimum(last[:-step], last[step:]))

    def shared(self, one: int, other: int) -> int:
        """How many tokens two ranks begin with together, the smaller rank first."""
        if one == other:
            return len(self.keys[one]) // 4
        level = (other - one).bit_length() - 1
        found = self._levels[level]
        return int(min(found[one + 1], found[other + 1 - (1 << level)]))


@dataclass
class _Draft:
    """A row being filled: the ranks of its samples, sorted, and how many nodes they need."""

    ranks: list[int] = field(default_factory=list)
    size: int = 0

    def most_shared(self, rank: int, forest: _Forest) -> int:
        """How many tokens of a sample are there already."""
        at = bisect_left(self.ranks, rank)
        before = (forest.shared(self.ranks[at - 1], rank),) if at else ()
        after = (forest.shared(rank, self.ranks[at]),) if at < len(self.ranks) else ()
        return max((*before, *after), default=0)

    def add(self, ranks: Sequence[int], forest: _Forest, *, most: int) -> bool:
        """Take all of `ranks`, or none if the row then had more than `most` nodes."""
        size = self.size
        for count, rank in enumerate(ranks):
            self.size += len(forest.keys[rank]) // 4 - self.most_shared(rank, forest)
            insort(self.ranks, rank)
            if self.size > most:
                for other in ranks[: count + 1]:
                    del self.ranks[bisect_left(self.ranks, other)]
                self.size = size
                return False
        return True


def _key(sample: Sample) -> bytes:
    """The ids as big-endian bytes: they compare like the lists of ids, but at the speed of memcmp."""
    ids = sample.token_ids
    known = np.frombuffer(array("I", ids), dtype=np.uint32) if isinstance(ids, list) else np.asarray(ids)
    return known.astype(">u4").tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """The length of the common prefix, in tokens."""
    size = min(len(one), len(other)) // 4
    differs = np.frombuffer(one, dtype=">u4", count=size) != np.frombuffer(other, dtype=">u4", count=size)
    return int(differs.argmax()) if differs.any() else size


def _by_prefix(samples: Sequence[Sample], forest: _Forest) -> list[list[int]]:
    """The ranks of each trajectory's samples, trajectories with a common prefix side by side."""
    groups: dict[int, list[int]] = {}
    for member, sample in enumerate(samples):
        groups.setdefault(sample.trajectory, []).append(forest.ranks[member])
    return sorted(groups.values(), key=lambda group: group[0])


def _place(
    drafts: list[_Draft], group: list[int], forest: _Forest, *, row_tokens: int, join_tokens: int, least: int
) -> None:
    """Put a trajectory into the last row if it fits and belongs there, else into new ones."""
    if (
        drafts
        and drafts[-1].most_shared(group[0], forest) >= least
        and drafts[-1].add(group, forest, most=min(row_tokens, join_tokens))
    ):
        return
    drafts.append(_Draft())
    for rank in group:
        if not drafts[-1].add([rank], forest, most=row_tokens if drafts[-1].ranks else 1 << 62):
            drafts.append(_Draft())
            drafts[-1].add([rank], forest, most=1 << 62)


def _filled(drafts: Sequence[_Draft], row_tokens: int) -> list[_Draft]:
    """The drafts put together into as few rows as best-fit finds, the largest first; in the order of their ids."""
    rows: list[_Draft] = []
    room: list[tuple[int, int]] = []  # what is left in which row, sorted
    for draft in sorted(drafts, key=lambda one: -one.size):
        at = bisect_left(room, (draft.size, 0))
        if at == len(room):
            rows.append(_Draft())
            left, row = row_tokens, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].ranks += draft.ranks
        rows[row].size += draft.size
        insort(room, (left - draft.size, row))
    for filled in rows:
        filled.ranks.sort()
    return sorted(rows, key=lambda one: one.ranks[0])


@dataclass(frozen=True)
class _Trie:
    """Nodes in depth-first pre-order, and for each sample the nodes that predict its trained tokens."""

    token_ids: Numbers
    depth: Numbers
    end: Numbers
    predictors: list[Numbers]


def _trie(ranks: Sequence[int], forest: _Forest, trained: Sequence[Numbers]) -> _Trie:
    """The trie of sorted keys: each adds, after what it shares with the one before, new nodes in pre-order."""
    path = np.zeros(max(len(forest.keys[rank]) for rank in ranks) // 4, dtype=np.int64)
    end = np.zeros(sum(len(forest.keys[rank]) for rank in ranks) // 4, dtype=np.int64)
    tokens, depths, predictors = [], [], []
    size = length = 0
    for before, rank, at in zip([None, *ranks], ranks, trained, strict=False):
        ids = np.frombuffer(forest.keys[rank], dtype=">u4")
        shared = 0 if before is None else forest.shared(before, rank)
        end[path[shared:length]] = size
        length = len(ids)
        path[shared:length] = np.arange(size, size + length - shared)
        tokens.append(ids[shared:].astype(np.int64))
        depths.append(np.arange(shared, length))
        predictors.append(path[at - 1])
        size += length - shared
    end[path[:length]] = size
    return _Trie(np.concatenate(tokens), np.concatenate(depths), end[:size], predictors)


def _lay_out(draft: _Draft, forest: _Forest, everything: Sequence[Sample]) -> PackedRow:
    members = [forest.members[rank] for rank in draft.ranks]
    samples = [everything[member] for member in members]
    counts = np.array([len(s.trained) for s in samples])
    trained = [np.asarray(s.trained, dtype=np.int64) for s in samples]
    trie = _trie(draft.ranks, forest, trained)
    units = {trajectory: unit for unit, trajectory in enumerate(dict.fromkeys(s.trajectory for s in samples))}
    first = {s.trajectory: s for s in reversed(samples)}
    targets = [np.frombuffer(forest.keys[r], dtype=">u4")[at] for r, at in zip(draft.ranks, trained, strict=True)]
    return PackedRow(
        token_ids_T=_long(trie.token_ids),
        positions_T=_long(trie.depth),
        end_T=_long(trie.end),
        predictor_P=_long(np.concatenate(trie.predictors)),
        target_P=_long(np.concatenate(targets)),
        behaviour_P=_float(np.concatenate([np.asarray(s.logprobs, dtype=np.float32) for s in samples])),
        advantage_P=_float(np.concatenate([np.asarray(s.advantages, dtype=np.float32) for s in samples])),
        temperature_P=_float(np.repeat([s.temperature for s in samples], counts)),
        unit_P=_long(np.repeat([units[s.trajectory] for s in samples], counts)),
        weight_U=_float(np.array([first[t].weight for t in units])),
        trajectory_U=_long(np.array(list(units))),
        members_S=tuple(members),
        counts_S=tuple(counts.tolist()),
    )


def _long(values: np.ndarray[tuple[int], np.dtype[np.generic]]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float(values: np.ndarray[tuple[int], np.dtype[np.generic]]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))

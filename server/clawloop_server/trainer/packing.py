"""Prefix-tree packing: what several calls share is laid out, and computed, once.

The calls of a row form a trie of token ids, laid out in depth-first pre-order. A node's subtree is then the range
[j, end[j]), so that one rule says who sees whom: node i attends to node j iff `j <= i < end[j]`. A position is the
depth in the trie. A row of one call is plain causal attention; calls that share nothing are several roots; a history
that was rewritten is a fork. Losses hang on (predictor, target) pairs, so that one node may predict several targets.

Knows token ids and the numbers that travel with them; no model, no loss.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clawloop_server.trainer.rows import Sample

Ids = np.ndarray[tuple[int], np.dtype[np.uint32]]


@dataclass(frozen=True)
class PackedRow:
    """T trie nodes, P trained tokens, U units (a unit is what a row holds of one trajectory), S samples.

    predictor_P: node whose output predicts the token; target_P: the token; unit_P: whose token it is.
    trajectory_U: the trajectory's number in the update; trajectory_tokens_U: its trained tokens in all rows together;
    gap_U: how many versions lie between the policy that sampled it and the current one. members_S: which of the samples
    that were packed are here, in the order of their tokens in P; counts_S: how many tokens each has there.
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
    gap_U: Tensor
    trajectory_U: Tensor
    trajectory_tokens_U: Tensor
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


@dataclass(frozen=True)
class _Draft:
    """A row being filled: its samples' keys in order, whose they are, and how many nodes they need."""

    keys: list[bytes] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    size: int = 0

    def added(self, key: bytes, member: int) -> tuple["_Draft", int]:
        """A draft with one more sample, and how many tokens it shares with what was there."""
        at = bisect_left(self.keys, key)
        shared = max((_shared(key, other) for other in self.keys[max(0, at - 1) : at + 1]), default=0)
        keys = [*self.keys[:at], key, *self.keys[at:]]
        members = [*self.members[:at], member, *self.members[at:]]
        return _Draft(keys, members, self.size + len(key) // 4 - shared), shared


def pack(samples: Sequence[Sample], *, row_tokens: int, min_shared: int = 16) -> list[PackedRow]:
    """Rows of at most `row_tokens` nodes, each of whole trajectories that share at least `min_shared` tokens.

    A trajectory is split between rows only if it does not fit one by itself, and a sample never is. With `min_shared`
    0, unrelated trajectories fill rows together: right where the mask is sparse (FlexAttention), wrong where it is
    dense.
    """
    drafts: list[_Draft] = []
    for group in _by_prefix(samples):
        _place(drafts, group, row_tokens=row_tokens, min_shared=min_shared)
    totals: Counter[int] = Counter()
    for sample in samples:
        totals[sample.trajectory] += len(sample.trained)
    return [_lay_out(draft, [samples[member] for member in draft.members], totals=totals) for draft in drafts]


def _key(sample: Sample) -> bytes:
    """The ids as big-endian bytes: they compare like the lists of ids, but at the speed of memcmp."""
    return np.asarray(sample.token_ids, dtype=">u4").tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """The length of the common prefix, in tokens."""
    size = min(len(one), len(other)) // 4
    differs = np.frombuffer(one, dtype=">u4", count=size) != np.frombuffer(other, dtype=">u4", count=size)
    return int(differs.argmax()) if differs.any() else size


def _by_prefix(samples: Sequence[Sample]) -> list[list[tuple[bytes, int]]]:
    """The samples of each trajectory, trajectories with a common prefix side by side."""
    groups: dict[int, list[tuple[bytes, int]]] = {}
    for member, sample in enumerate(samples):
        groups.setdefault(sample.trajectory, []).append((_key(sample), member))
    return sorted(groups.values(), key=lambda group: group[0])


def _place(drafts: list[_Draft], group: list[tuple[bytes, int]], *, row_tokens: int, min_shared: int) -> None:
    """Put a trajectory into the last row if it fits and belongs there, else into new ones."""
    if drafts:
        joined, shared = drafts[-1].added(*group[0])
        for key, member in group[1:]:
            joined, _ = joined.added(key, member)
        if joined.size <= row_tokens and shared >= min_shared:
            drafts[-1] = joined
            return
    current = _Draft()
    for key, member in group:
        grown, _ = current.added(key, member)
        if grown.size > row_tokens and current.members:
            drafts.append(current)
            grown, _ = _Draft().added(key, member)
        current = grown
    drafts.append(current)


@dataclass(frozen=True)
class _Trie:
    """Nodes in depth-first pre-order, and for each sample its path: the node of each of its tokens."""

    token_ids: Ids
    depth: Ids
    end: Ids
    paths: list[Ids]


def _trie(keys: Sequence[bytes]) -> _Trie:
    """The trie of sorted keys: each adds, after what it shares with the one before, new nodes in pre-order."""
    tokens: list[Ids] = []
    depths: list[Ids] = []
    paths: list[Ids] = []
    end = np.zeros(sum(map(len, keys)) // 4, dtype=np.uint32)
    path, size, before = np.zeros(0, dtype=np.uint32), 0, b""
    for key in keys:
        ids = np.frombuffer(key, dtype=">u4").astype(np.uint32)
        shared = _shared(key, before)
        end[path[shared:]] = size
        tokens.append(ids[shared:])
        depths.append(np.arange(shared, len(ids), dtype=np.uint32))
        path = np.concatenate([path[:shared], np.arange(size, size + len(ids) - shared, dtype=np.uint32)])
        size, before = size + len(ids) - shared, key
        paths.append(path)
    end[path] = size
    return _Trie(np.concatenate(tokens), np.concatenate(depths), end[:size], paths)


def _lay_out(draft: _Draft, samples: Sequence[Sample], *, totals: Mapping[int, int]) -> PackedRow:
    trie = _trie(draft.keys)
    counts = np.array([len(s.trained) for s in samples])
    trained = [np.asarray(s.trained, dtype=np.int64) for s in samples]
    units = {trajectory: unit for unit, trajectory in enumerate(dict.fromkeys(s.trajectory for s in samples))}
    first = {s.trajectory: s for s in reversed(samples)}
    gaps = [max(s.version_gap for s in samples if s.trajectory == t) for t in units]
    return PackedRow(
        token_ids_T=_long(trie.token_ids),
        positions_T=_long(trie.depth),
        end_T=_long(trie.end),
        predictor_P=_long(np.concatenate([path[at - 1] for path, at in zip(trie.paths, trained, strict=True)])),
        target_P=_long(np.concatenate([np.asarray(s.token_ids)[at] for s, at in zip(samples, trained, strict=True)])),
        behaviour_P=_float(np.concatenate([np.asarray(s.logprobs, dtype=np.float32) for s in samples])),
        advantage_P=_float(np.concatenate([np.asarray(s.advantages, dtype=np.float32) for s in samples])),
        temperature_P=_float(np.repeat([s.temperature for s in samples], counts)),
        unit_P=_long(np.repeat([units[s.trajectory] for s in samples], counts)),
        weight_U=_float(np.array([first[t].weight for t in units])),
        gap_U=_long(np.array(gaps)),
        trajectory_U=_long(np.array(list(units))),
        trajectory_tokens_U=_float(np.array([totals[t] for t in units])),
        members_S=tuple(draft.members),
        counts_S=tuple(counts.tolist()),
    )


def _long(values: np.ndarray[tuple[int], np.dtype[np.generic]]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float(values: np.ndarray[tuple[int], np.dtype[np.generic]]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))

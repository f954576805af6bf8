"""The attention caches of earlier calls, so that the next turn of a conversation computes only what is new.

Keyed by policy: a cache made under one adapter is wrong under another (0.8 nats, silently). Bounded over all policies
by entries and bytes; the policy that was used longest ago gives way first. Lives in the engine's thread.
"""

from collections import OrderedDict
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    LRUPromptCache,
    PromptTrie,
    PromptTrieResult,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from clawloop_shared.records import Policy

_VALUE = "__value__"
"""the key of what a sequence has kept, in mlx-lm's trie"""


class PrefixTrie(PromptTrie):  # type: ignore[misc]
    """mlx-lm's, but for the search. Its own looks for the shortest sequence that goes on after the prefix, and copies
    the path to each token of each: a second, in which no stream moves, where one of 30,000 tokens is kept."""

    def search(self, model: Any, tokens: list[int]) -> PromptTrieResult:
        """The exact sequence, or the longest that is a prefix and one that goes on after what it shares."""
        node: dict[Any, Any] = self._trie.get(model, {})
        shared = whole = 0
        while shared < len(tokens) and tokens[shared] in node:
            node = node[tokens[shared]]
            shared += 1
            if _VALUE in node:
                whole = shared
        if tokens and whole == len(tokens):
            return PromptTrieResult(model, tokens, None, None, 0)
        longer = tokens[:shared] + _path_down(node) if shared else None
        return PromptTrieResult(model, None, tokens[:whole] or None, longer, shared)


def _path_down(node: dict[Any, Any]) -> list[int]:
    """The tokens from here to some sequence that is kept."""
    path = []
    while _VALUE not in node:
        token, node = next(iter(node.items()))
        path.append(token)
    return path


class PrefixCache:
    """Longest known prefix of a prompt, and its attention cache."""

    def __init__(self, *, entries: int, size_bytes: int) -> None:
        self._entries, self._size_bytes = entries, size_bytes
        self._by_policy: OrderedDict[Policy, Any] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Memory of all caches kept."""
        return sum(store.nbytes for store in self._by_policy.values())

    def __len__(self) -> int:
        return sum(len(store) for store in self._by_policy.values())

    def take(self, policy: Policy, prompt_ids: list[int]) -> tuple[Any | None, int]:
        """A copy of the cache of the longest known prefix, and that prefix's length: always less than the prompt's.

        At least one token is left to compute, since an empty rest would end mlx-lm's generator (mlx-lm #1215).
        """
        store = self._by_policy.get(policy)
        if store is None:
            return None, 0
        self._by_policy.move_to_end(policy)
        cache, rest = store.fetch_nearest_cache(policy, prompt_ids)
        if cache is None:
            return None, 0
        if not rest:
            if not can_trim_prompt_cache(cache):
                return None, 0
            trim_prompt_cache(cache, 1)
            return cache, len(prompt_ids) - 1
        return cache, len(prompt_ids) - len(rest)

    def put(self, policy: Policy, token_ids: list[int], cache: list[Any]) -> None:
        """Keep the cache of a finished call. Its arrays are evaluated: a lazy slice would hold its whole batch."""
        mx.async_eval([layer.state for layer in cache])  # type: ignore[no-untyped-call]
        store = self._by_policy.get(policy)
        if store is None:
            store = self._by_policy[policy] = LRUPromptCache(self._entries, self._size_bytes)
            store._trie = PrefixTrie()
        self._by_policy.move_to_end(policy)
        store.insert_cache(policy, token_ids, cache)
        self.shrink(self._size_bytes)

    def drop(self, policy: Policy) -> None:
        """Forget a policy that is no longer loaded."""
        self._by_policy.pop(policy, None)

    def shrink(self, size_bytes: int) -> None:
        """Let the oldest go until all take at most `size_bytes`, and no more entries are kept than may be."""
        for policy in list(self._by_policy):
            entries, size = len(self) - self._entries, self.size_bytes - size_bytes
            if entries <= 0 and size <= 0:
                return
            store = self._by_policy[policy]
            store.trim_to(n_sequences=len(store) - max(entries, 0), n_bytes=store.nbytes - max(size, 0))
            if not len(store):
                del self._by_policy[policy]

    def clear(self) -> None:
        """Forget all."""
        self._by_policy.clear()

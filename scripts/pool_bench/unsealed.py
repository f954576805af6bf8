"""`python -m pool_bench.unsealed SEED STEPS SINGLES FOLDER`: the pool's own code, with nothing encrypted or MACed.

In a process of its own: it takes SQLCipher and the sealing away from the modules that it measures. What is left is what
the pool costs besides its secrecy. Prints what it found as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import msgspec
import zstandard

from clawloop_shared.envelope import Dictionary

sys.modules["sqlcipher3"] = None  # type: ignore[assignment]  # as if it were not installed: SQLite as Python brings it


def main() -> None:
    """One round."""
    from clawloop_edge.pool import crypt, heads
    from pool_bench import measure
    from pool_bench.steps import Words, small_steps

    take_away(crypt, heads)
    seed, steps, singles = map(int, sys.argv[1:4])
    made = list(small_steps(Words(seed), steps + singles))
    found = measure.pool_inserts(Path(sys.argv[4]), made[:steps], made[steps:], name=measure.UNSEALED)
    print(msgspec.json.encode(found).decode())


def take_away(crypt: ModuleType, heads: ModuleType) -> None:
    """Have `seal` only pack, and the chain's MACs be empty."""
    pack, unpack = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def seal(_key: object, plain: bytes, *, dictionary: Dictionary | None = None, **_: object) -> bytes:
        return (dictionary.compressor if dictionary else pack).compress(plain)

    def unseal(_key: object, packed: bytes, *, dictionary: Dictionary | None = None, **_: object) -> bytes:
        return (dictionary.decompressor if dictionary else unpack).decompress(packed)

    for module, name, instead in (
        (crypt, "seal", seal),
        (crypt, "unseal", unseal),
        (heads, "_leaf", lambda *_, **__: b""),
        (heads, "_next", lambda *_, **__: b""),
    ):
        setattr(module, name, instead)


if __name__ == "__main__":
    main()

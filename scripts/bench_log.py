"""Measure the log of released adapters: a server's proofs out of its encrypted database, and a device's check of them.

The entries are put there by the log's own code, one after the other in one transaction. Then, for entries and older
sizes drawn by a seed: the server makes the proof of inclusion with the one of consistency and the head, encodes it,
and a device decodes it, verifies the signature and both proofs. Sound only if every proof holds and a
changed one does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import msgspec

from clawloop_server.release.log import ReleaseLog
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared import merkle, signing, wire
from clawloop_shared.errors import ProofInvalid
from clawloop_shared.log_head import LogProof, entry_leaf, open_head

LINE = "line"
TARGET_MS = 10.0


def main() -> None:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--entries", type=int, default=100_000)
    options.add_argument("--proofs", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true", help="print JSON instead of words")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-log-") as folder:
        database = ServerDatabase.open(Path(folder) / "server.db", bytes(range(32)))
        try:
            found = measure(database, entries=chosen.entries, proofs=chosen.proofs, seed=chosen.seed)
        finally:
            database.close()
    print(json.dumps(found) if chosen.json else "\n".join(f"{name:22} {value}" for name, value in found.items()))


def measure(database: ServerDatabase, *, entries: int, proofs: int, seed: int) -> dict[str, float]:
    """Times in ms; of one append the mean, within one transaction."""
    log, key = ReleaseLog(database), signing.new_key()
    began_s = time.perf_counter()
    with database.write():
        for version in range(1, entries + 1):
            log.append(LINE, version, digest(version), now_ms=version)
    append_ms = (time.perf_counter() - began_s) * 1000 / entries
    log.sign_head(LINE, key, now_ms=1)
    draw, sizes = random.Random(seed), list[int]()
    made, checked = Timed(), Timed()
    for _ in range(max(1, proofs)):
        version, from_size = draw.randint(1, entries), draw.randint(1, entries)
        old_root = log.root(LINE, from_size)
        with made:
            proof = log.proof(version, from_size=from_size)
            assert proof is not None
            packed = wire.encode(Carried(proof))
        with checked:
            check(wire.decode(packed, Carried).proof, version, old_root=old_root, public=signing.public_key(key))
        sizes.append(len(packed))
        refuses_others(proof, version)
    return {
        "entries": entries,
        "append ms": round(append_ms, 3),
        **made.found("prove"),
        **checked.found("verify"),
        "proof bytes most": max(sizes),
        "target ms": TARGET_MS,
    }


class Timed:
    """Milliseconds of each use: by the clock, and of this thread's CPU, which other programs do not add to."""

    def __init__(self) -> None:
        self._wall, self._cpu = list[float](), list[float]()

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        wall_s, cpu_s = self._began
        self._wall.append((time.perf_counter() - wall_s) * 1000)
        self._cpu.append((time.thread_time() - cpu_s) * 1000)

    def found(self, what: str) -> dict[str, float]:
        """Median, 95th percentile and longest by the clock, and the most CPU."""
        times = sorted(self._wall)
        named = {"p50": statistics.median(times), "p95": times[int(0.95 * len(times))], "most": times[-1]}
        return {f"{what} ms {name}": round(ms, 3) for name, ms in (named | {"CPU, most": max(self._cpu)}).items()}


class Carried(msgspec.Struct, frozen=True, tag="bench-log.v1"):
    """A proof as it travels."""

    proof: LogProof


def digest(version: int) -> str:
    """The hash of a manifest that is not there."""
    return hashlib.sha256(b"manifest %d" % version).hexdigest()


def check(proof: LogProof, version: int, *, old_root: bytes, public: bytes) -> None:
    """What a device does. Raises ProofInvalid, SignatureInvalid."""
    head = open_head(proof.head, public)
    leaf, root = entry_leaf(version, digest(version)), bytes.fromhex(head.root)
    merkle.check_inclusion(leaf, proof.index, size=head.size, proof=proof.inclusion, root=root)
    merkle.check_consistency(proof.from_size, old_root, new_size=head.size, new_root=root, proof=proof.consistency)


def refuses_others(proof: LogProof, version: int) -> None:
    """Raises AssertionError: another adapter passed with this proof, so that nothing was measured."""
    leaf = entry_leaf(version, digest(version + 1))
    size = msgspec.json.decode(proof.head.body)["size"]
    root = bytes.fromhex(msgspec.json.decode(proof.head.body)["root"])
    try:
        merkle.check_inclusion(leaf, proof.index, size=size, proof=proof.inclusion, root=root)
    except ProofInvalid:
        return
    raise AssertionError("another adapter passed with the proof of this one")


if __name__ == "__main__":
    main()

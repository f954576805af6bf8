"""Measure the detector of privacy/redact: megabytes a second of one core, and how much it takes out.

The texts are this repository's own: its code, its documents, the requests that OpenClaw made (JSON with escaped text in
it), and those requests once more as JSON within JSON; or files that are named. 500 known values and 50 words are looked
for as well. Each text is searched in pieces, as turns of a session are; CPU time counts, the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns
from clawloop_edge.privacy.redact.values import Value

ROOT = Path(__file__).resolve().parent.parent
MIN_MB_S = 0.9
"""what the slowest text must reach"""


def texts() -> dict[str, str]:
    """The texts by name."""
    requests = "\n".join(path.read_text() for path in sorted((ROOT / "tests/edge/captures").glob("*.json")))
    return {
        "code (Python)": "\n".join(path.read_text() for path in sorted((ROOT / "edge").rglob("*.py"))),
        "prose (Markdown)": "\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))) * 3,
        "requests (JSON)": requests * 4,
        "requests in JSON": json.dumps(requests) * 4,
    }


def values(rng: random.Random) -> list[Value]:
    """Known values that stand in no text."""
    letters = string.ascii_letters + string.digits
    return [Value("".join(rng.choices(letters, k=rng.randint(12, 48))), "known-secret") for _ in range(500)]


def pieces(text: str, size: int) -> Iterator[str]:
    for at in range(0, len(text), size):
        yield text[at : at + size]


def measured(detector: Detector, text: str, *, size: int, rounds: int) -> tuple[float, float]:
    """Megabytes a CPU second in the best round, and spans a megabyte."""
    best, spans = float("inf"), 0
    for _ in range(rounds):
        start = time.process_time()
        spans = sum(len(detector.find(piece)) for piece in pieces(text, size))
        best = min(best, time.process_time() - start)
    megabytes = len(text.encode()) / 1e6
    return megabytes / best, spans / megabytes


def given(files: list[Path]) -> Mapping[str, str]:
    return {str(path): path.read_text(errors="replace") for path in files}


def main() -> int:
    """Print a row for each text; 1 if the slowest is too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="text files to search instead of the repository's")
    parser.add_argument("--piece", type=int, default=8_192, help="characters searched at once (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = random.Random(7)
    words = ["".join(rng.choices(string.ascii_lowercase, k=9)) for _ in range(50)]
    start = time.process_time()
    detector = Detector(patterns(), values(rng), words=words)
    print(f"made in {time.process_time() - start:.2f} s CPU")
    slowest = float("inf")
    for name, text in (given(options.files) or texts()).items():
        speed, spans = measured(detector, text, size=options.piece, rounds=options.rounds)
        slowest = min(slowest, speed)
        print(f"{name:24} {len(text) / 1e6:6.2f} M characters  {speed:6.2f} MB/s  {spans:6.0f} spans/MB")
    return 0 if slowest >= MIN_MB_S else 1


if __name__ == "__main__":
    sys.exit(main())

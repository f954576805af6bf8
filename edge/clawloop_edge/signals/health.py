"""Whether rewards can be trusted: what each source says, whether sources agree, whether one begins to say something
else, and whether one pays for length or for many calls. Pure: sums that grow by one judgement at a time.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

BINS = 5
"""of values in [-1, 1], of one width"""
FAST, SLOW = 1 / 50, 1 / 500
"""how much a new value moves the recent mean, and the long one"""
MAX_SOURCES = 64
MAX_OPEN = 2048
"""trajectories whose sources are compared; those judged longest ago are let go"""
OTHERS = "others"
"""of all sources after the first MAX_SOURCES"""
_STEADY_COUNT, _DRIFT, _PAIRS, _AGREEMENT, _CORRELATED, _FLAT = 100, 0.3, 30, 0.6, 0.5, 0.05


class Line(msgspec.Struct):
    """Sums of pairs (x, y), for their correlation. Source: Welford's method, as for a variance."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    square_x: float = 0.0
    square_y: float = 0.0
    product: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Count a pair."""
        self.count += 1
        step_x, step_y = x - self.mean_x, y - self.mean_y
        self.mean_x += step_x / self.count
        self.mean_y += step_y / self.count
        self.square_x += step_x * (x - self.mean_x)
        self.square_y += step_y * (y - self.mean_y)
        self.product += step_x * (y - self.mean_y)

    @property
    def correlation(self) -> float:
        """Pearson's r; 0 while one of both never changed."""
        spread = math.sqrt(max(0.0, self.square_x) * max(0.0, self.square_y))
        return self.product / spread if spread > 1e-12 else 0.0

    @property
    def deviation_x(self) -> float:
        """Standard deviation of x."""
        return math.sqrt(max(0.0, self.square_x) / self.count) if self.count else 0.0


class Source(msgspec.Struct):
    """What one source has said so far. `lengths` pairs its values with the tokens of the answers, `calls` with the
    steps of the run."""

    histogram: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    lengths: Line = msgspec.field(default_factory=Line)
    calls: Line = msgspec.field(default_factory=Line)
    fast: float = 0.0
    slow: float = 0.0

    @property
    def count(self) -> int:
        """How many judgements."""
        return self.lengths.count

    @property
    def mean(self) -> float:
        """Of its values."""
        return self.lengths.mean_x

    @property
    def drift(self) -> float:
        """How far its recent values lie from those of long before."""
        return self.fast - self.slow

    def add(self, value: float, *, tokens: int, steps: int) -> None:
        """Count a judgement of an answer of so many sampled tokens, in a run of so many steps."""
        self.histogram[min(BINS - 1, int((value + 1) / 2 * BINS))] += 1
        # While they are young, both are the plain mean: a slow average would still be at its first value.
        plain = 1 / (self.count + 1)
        self.fast += max(FAST, plain) * (value - self.fast)
        self.slow += max(SLOW, plain) * (value - self.slow)
        self.lengths.add(value, tokens)
        self.calls.add(value, steps)


class Agreement(msgspec.Struct):
    """How often two sources judged one trajectory, and how often with the same sign."""

    both: int = 0
    same: int = 0

    @property
    def share(self) -> float:
        """Of the trajectories that both judged, those on which they agree."""
        return self.same / self.both if self.both else 0.0


class Sums(msgspec.Struct):
    """What is remembered over a restart: numbers and names of sources, nothing of whom or what was judged."""

    after_seq: int = 0
    sources: dict[str, Source] = {}
    pairs: dict[str, Agreement] = {}
    """by both names in order, joined by a space"""


class RewardHealth:
    """Takes judgements one after the other."""

    def __init__(self, sums: Sums | None = None) -> None:
        """`sums`: of an earlier life; which trajectory was judged by whom is not known from there."""
        self.sums = sums or Sums()
        self._open: OrderedDict[str, dict[str, float]] = OrderedDict()

    def add(self, source: str, value: float, *, trajectory: str, tokens: int, steps: int) -> None:
        """Count one judgement of `trajectory`, whose answers have `tokens` sampled tokens in `steps` steps."""
        name = source if source in self.sums.sources or len(self.sums.sources) < MAX_SOURCES else OTHERS
        self.sums.sources.setdefault(name, Source()).add(value, tokens=tokens, steps=steps)
        said = self._open.setdefault(trajectory, {})
        self._open.move_to_end(trajectory)
        for other, theirs in said.items():
            if other != name and value and theirs and name not in said:  # each pair counts once a trajectory
                pair = self.sums.pairs.setdefault(" ".join(sorted((name, other))), Agreement())
                pair.both += 1
                pair.same += (value > 0) == (theirs > 0)
        said.setdefault(name, value)
        while len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)


def report_of(sums: Sums) -> dict[str, object]:
    """The figures as JSON, with what is worth a warning in words."""
    return {
        "sources": {name: _figures(source) for name, source in sorted(sums.sources.items())},
        "agreement": [
            {"sources": name.split(" "), "both": pair.both, "same": round(pair.share, 3)}
            for name, pair in sorted(sums.pairs.items())
        ],
        "warnings": list(warnings_of(sums)),
    }


def _figures(source: Source) -> dict[str, object]:
    return {
        "count": source.count,
        "mean": round(source.mean, 3),
        "histogram": source.histogram,
        "recent_mean": round(source.fast, 3),
        "drift": round(source.drift, 3),
        "length_correlation": round(source.lengths.correlation, 3),
        "calls_correlation": round(source.calls.correlation, 3),
    }


def warnings_of(sums: Sums) -> Iterator[str]:
    """What an owner should look at, one sentence each."""
    for name, source in sorted(sums.sources.items()):
        if source.count >= _STEADY_COUNT:
            yield from _of_source(name, source)
    for name, pair in sorted(sums.pairs.items()):
        if pair.both >= _PAIRS and pair.share < _AGREEMENT:
            both = " and ".join(name.split(" "))
            yield f"{both} agree on {pair.share:.0%} of {pair.both} trajectories; one of them may be wrong"


def _of_source(name: str, source: Source) -> Iterator[str]:
    if source.lengths.deviation_x < _FLAT:
        yield f"{name} says the same of everything ({source.mean:+.2f}); nothing can be learned from it"
    if abs(source.drift) > _DRIFT:
        yield f"{name} says {source.fast:+.2f} of late, {source.slow:+.2f} before; did it, or what it judges, change?"
    kinds: Mapping[str, Line] = {"long answers": source.lengths, "many calls": source.calls}
    for what, line in kinds.items():
        if line.correlation > _CORRELATED:
            yield f"{name} pays for {what} (correlation {line.correlation:+.2f}); the model will learn to give them"

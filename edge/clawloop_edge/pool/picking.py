"""Picking steps by what is known of them: when, of whom, how they were judged, and what their owner said of them.

`Picker` tells of one step; `page` walks back from the latest, as far as its bound allows. A tag, and whatever can only
be true of curated steps, is looked up; the rest is read, without tokens. One snapshot, one thread; changes nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

import msgspec

from clawloop_edge.pool.curation import Curated, Curations, tag_index
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import StepLine
from clawloop_shared.records import Channel, Signal
from clawloop_shared.signals import Reward, RewardRules, reward_of

LOOKED_AT = 2000
"""steps that one page looks at: about 0.3 s"""
_END = 1 << 62
_AT_ONCE = 64
_TOGETHER = 1024
"""steps of one trajectory that are looked at for its reward, the latest ones"""


class Picked(msgspec.Struct, frozen=True, kw_only=True):
    """Which steps are meant; what is not given leaves nothing out. Times are ms since 1970, `until_ms` is outside.

    `trainable`: token-exact, and not taken out by the owner's word; False: the others. `judged`: by any signal;
    `source`: by one of that source. Signals and rewards are those of the trajectories that the steps are in.
    """

    sessions: list[str] = []
    app: str = ""
    channel: Channel | None = None
    since_ms: int = 0
    until_ms: int | None = None
    tags: list[str] = []
    quality_min: int | None = None
    trainable: bool | None = None
    judged: bool | None = None
    source: str = ""
    reward_min: float | None = None
    reward_max: float | None = None


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A step and what is known of it: its owner's word, and the signals on its trajectory with the reward they make."""

    line: StepLine
    curated: Curated
    signals: list[Signal]
    reward: Reward | None

    @property
    def trainable(self) -> bool:
        """Whether it may be learned from: it is token-exact, and its owner has not taken it out."""
        return not self.line.untrainable and self.curated.trainable is not False

    def facts(self) -> dict[str, Any]:
        """It as JSON values."""
        line = self.line
        names = ("step_id", "session_id", "run_id", "trajectory_id", "group_id", "kind", "app", "channel", "at_ms")
        return {
            **{name: getattr(line, name) for name in names},
            "trainable": self.trainable,
            "untrainable": line.untrainable,
            "curation": msgspec.to_builtins(self.curated),
            "reward": msgspec.to_builtins(self.reward),
            "signals": msgspec.to_builtins(self.signals),
        }


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Steps, latest first, and where the next page begins (None: this was the last)."""

    steps: list[Seen]
    next: int | None


class PickedPool(Protocol):
    """The part of the pool that is read."""

    def reading(self) -> AbstractContextManager[Reading]: ...
    def tag(self, name: str, value: bytes) -> bytes: ...


class Picker:
    """Says of the steps of one snapshot whether they are picked."""

    def __init__(self, reading: Reading, picked: Picked, *, rules: RewardRules) -> None:
        self._reading, self._picked, self._rules = reading, picked, rules
        self._curations = Curations(reading.database, reading.keyring)
        self._judged: dict[tuple[str, ...], tuple[list[Signal], Reward | None]] = {}

    def look(self, line: StepLine) -> Seen | None:
        """What is known of a step; None if it is not picked."""
        if not self._is_meant(line):
            return None
        curated = self._curations.of(line)
        if not self._is_said(curated):
            return None
        signals, reward = self._judgement(line)
        seen = Seen(line=line, curated=curated, signals=signals, reward=reward)
        return seen if self._is_judged(seen) else None

    def _is_meant(self, line: StepLine) -> bool:
        picked = self._picked
        in_time = line.at_ms >= picked.since_ms and (picked.until_ms is None or line.at_ms < picked.until_ms)
        whose = not picked.sessions or line.session_id in picked.sessions
        return in_time and whose and picked.app in ("", line.app) and picked.channel in (None, line.channel)

    def _is_said(self, curated: Curated) -> bool:
        wanted = self._picked.quality_min
        good = wanted is None or (curated.quality is not None and curated.quality >= wanted)
        return good and set(self._picked.tags) <= set(curated.tags)

    def _is_judged(self, seen: Seen) -> bool:
        picked = self._picked
        if picked.trainable not in (None, seen.trainable) or picked.judged not in (None, bool(seen.signals)):
            return False
        if picked.source and all(signal.source != picked.source for signal in seen.signals):
            return False
        if picked.reward_min is None and picked.reward_max is None:
            return True
        low = -1.0 if picked.reward_min is None else picked.reward_min
        high = 1.0 if picked.reward_max is None else picked.reward_max
        return seen.reward is not None and low <= seen.reward.value <= high

    def _judgement(self, line: StepLine) -> tuple[list[Signal], Reward | None]:
        """The signals on what the step is rewarded with, and the reward: as training has them."""
        alone = (line.trajectory_id,) if line.trajectory_id else ("", line.run_id, line.session_id)
        key = (*alone, line.channel, line.group_id)
        if key not in self._judged:
            members = [
                each
                for each in self._reading.rewarded_with(line, limit=_TOGETHER)
                if each.trajectory_id == line.trajectory_id
                and (each.channel, each.group_id) == (line.channel, line.group_id)
            ]
            found = self._reading.signals(members)
            self._judged[key] = found, reward_of(found, self._rules)
        return self._judged[key]


def page(
    pool: PickedPool,
    picked: Picked,
    *,
    rules: RewardRules,
    limit: int,
    before_seq: int | None = None,
    look_at: int = LOOKED_AT,
) -> Page:
    """Up to `limit` picked steps kept before the change `before_seq`, latest first; looks at `look_at` of them at most,
    so that a page may have fewer although more follow."""
    steps: list[Seen] = []
    with pool.reading() as reading:
        picker = Picker(reading, picked, rules=rules)
        last, looked = None, 0
        for line in islice(candidates(pool, reading, picked, before_seq=before_seq), look_at):
            last, looked = line.seq, looked + 1
            if (seen := picker.look(line)) is not None:
                steps.append(seen)
            if len(steps) == limit:
                break
    more = len(steps) == limit or looked == look_at
    return Page(steps=steps, next=last if more else None)


def candidates(
    pool: PickedPool, reading: Reading, picked: Picked, *, before_seq: int | None = None
) -> Iterator[StepLine]:
    """Steps that may be picked, latest first."""
    before = _END if before_seq is None else before_seq
    while seqs := _seqs(pool, reading, picked, before_seq=before):
        yield from reading.lines_at(seqs)
        before = seqs[-1]


def _seqs(pool: PickedPool, reading: Reading, picked: Picked, *, before_seq: int) -> list[int]:
    if picked.tags or picked.quality_min is not None:
        tag = tag_index(pool, picked.tags[0]) if picked.tags else None
        curations = Curations(reading.database, reading.keyring)
        return curations.curated_seqs(before_seq=before_seq, limit=_AT_ONCE, tag=tag)
    query = "SELECT s.seq FROM steps AS s JOIN sessions AS x USING (session_id) WHERE s.seq < ?1 AND x.last_ms >= ?2"
    if picked.sessions:
        query += " AND s.session_id IN (SELECT value FROM json_each(?4))"
    named = (msgspec.json.encode(picked.sessions).decode(),) if picked.sessions else ()
    rows = reading.database.conn.execute(
        f"{query} ORDER BY s.seq DESC LIMIT ?3", (before_seq, picked.since_ms, _AT_ONCE, *named)
    )
    return [row[0] for row in rows]

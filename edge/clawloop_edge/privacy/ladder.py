"""What may leave of what was kept when: levels over the order of changes. Pure values; knows no table and no clock.

A level that is raised holds for what comes after; one that is lowered holds for everything. So what a consent allows is
a ladder: from the change after `after_seq` on, `level`, until the next rung.
"""

from bisect import bisect_left
from collections.abc import Iterable
from operator import attrgetter

import msgspec

from clawloop_shared.levels import Level, lower


class Rung(msgspec.Struct, frozen=True, array_like=True):
    """What was kept after the change `after_seq` may leave at `level`."""

    after_seq: int
    level: Level


class Ladder(msgspec.Struct, frozen=True, array_like=True):
    """Rungs by rising `after_seq`; the first has 0, and neighbours differ."""

    rungs: tuple[Rung, ...]

    @classmethod
    def flat(cls, level: Level) -> "Ladder":
        """`level` for everything."""
        return cls((Rung(0, level),))

    @classmethod
    def of(cls, rungs: Iterable[Rung]) -> "Ladder":
        """A ladder of these rungs, which rise; a rung that changes nothing is left out."""
        kept: list[Rung] = []
        for rung in rungs:
            if not kept or kept[-1].level is not rung.level:
                kept.append(rung)
        return cls(tuple(kept))

    @property
    def latest(self) -> Level:
        """The level of what is kept from now on."""
        return self.rungs[-1].level

    @property
    def sends_after(self) -> int | None:
        """The change up to which no step may leave; None if none may at all."""
        return next((rung.after_seq for rung in self.rungs if rung.level.sends_steps), None)

    def at(self, seq: int) -> Level:
        """The level of what was kept as change `seq` (1 is the first)."""
        return self.rungs[bisect_left(self.rungs, seq, key=attrgetter("after_seq")) - 1].level

    def lowered(self, level: Level) -> "Ladder":
        """At most `level` everywhere."""
        return Ladder.of(Rung(rung.after_seq, lower(rung.level, level)) for rung in self.rungs)

    def followed_by(self, level: Level, *, after_seq: int) -> "Ladder":
        """`level` for all that comes after `after_seq`, and up to there as it is."""
        before = [rung for rung in self.rungs if rung.after_seq < after_seq]
        return Ladder.of([*before, Rung(after_seq, level)])

    def least(self, other: "Ladder") -> "Ladder":
        """The lower of two ladders at each change."""
        starts = sorted({rung.after_seq for rung in (*self.rungs, *other.rungs)})
        return Ladder.of(Rung(seq, lower(self.at(seq + 1), other.at(seq + 1))) for seq in starts)


NOTHING = Ladder.flat(Level.OFF)
EVERYTHING = Ladder.flat(Level.FULL)

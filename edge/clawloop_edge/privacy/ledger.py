"""How much privacy the noised deltas of this device have cost, and whether one more may be made.

A release is counted before it is learned: reserved in one transaction with the check, and given back only by whoever
knows that nothing left. So a crash anywhere counts one release too many, never one too few. No amplification by
sampling is assumed: which Macs are awake is no random draw. Knows no learner and no network. docs/formats/outbox.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.heads import Chained, append
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import SealedColumn
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_edge.privacy.counting import EntryState
from clawloop_shared.ids import new_id

if TYPE_CHECKING:
    from sqlite_utils import Database

DELTA = 1e-5
DISTANCE = 2.0
"""times the clip: how far apart two deltas can be, and so how much the noise must hide. That one was sent shows anyway,
so to hide what was said takes more than to hide whether anything was"""
EPSILON = 8.0
"""the budget of a model line, where the owner set no other"""
COHORT = "server.cohort"
"""state: how many devices the server said that it learns from (decimal text)"""
GAUSSIAN = "gaussian"
LEAST_SIGMA = 0.01
"""times the clip; less noise hides nothing, whatever the budget"""
_ROUNDING = 1e-9
KIND = "ledger"


class Noise(StrEnum):
    """Where the noise is added, so how it weighs against what all devices learned."""

    DEVICE = "device"
    """each device adds all of it and trusts nobody: a mean of k devices still has 1/sqrt(k) of it"""
    TOGETHER = "together"
    """the sum of all has it once, as secure aggregation or a trusted server gives it"""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One release of a delta that was clipped to the norm `clip` and got noise of standard deviation `sigma * clip`."""

    entry_id: str
    model_line: str
    mechanism: str
    sigma: float
    clip: float
    round_id: str
    at_ms: int
    delta: float = DELTA


class Spent(msgspec.Struct, frozen=True):
    """What some releases have cost together: (epsilon, delta) differential privacy of what they were learned from. Of
    the numbers alone: that they came, when, of how many trajectories, their rank and task are no part of it."""

    releases: int
    epsilon: float
    delta: float = DELTA


class Usefulness(msgspec.Struct, frozen=True):
    """Whether anything can be learned under a budget. `snr` below 1: mostly noise. `devices`: from how many on."""

    snr: float
    devices: int
    words: str

    @property
    def useful(self) -> bool:
        """Whether what is learned is more than noise."""
        return self.snr >= 1


def epsilon_of(sigmas: Iterable[float], *, delta: float = DELTA) -> float:
    """The epsilon of Gaussian releases together, without amplification; all that one device learned from put in the
    place of anything else (replace-one: two clipped deltas are at most `DISTANCE` clips apart).

    Gaussian mechanisms compose exactly into one of sigma = (sum of 1 / sigma_i^2)^(-1/2) (Dong, Roth, Su 2019,
    corollary 3.3); its epsilon is by Balle and Wang 2018, as `dp-accounting` computes it.
    """
    precision = sum(sigma**-2 for sigma in sigmas)
    if not precision:
        return 0.0
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(precision**-0.5 / DISTANCE, delta))


def sigma_for(epsilon: float, *, rounds: int, delta: float = DELTA) -> float:
    """The noise, in clips, that each of `rounds` releases needs, so that together they cost `epsilon`."""
    from dp_accounting import get_sigma_gaussian

    return float(get_sigma_gaussian(epsilon, delta)) * DISTANCE * math.sqrt(rounds)


def part_used(spent: Spent, epsilon: float) -> float:
    """Which part of the releases that a budget allows has been made; epsilons themselves do not add up."""
    return (sigma_for(epsilon, rounds=1) / sigma_for(spent.epsilon, rounds=1)) ** 2 if spent.epsilon else 0.0


def useful(
    cohort: int, parameters: int, *, rounds: int = 50, epsilon: float = EPSILON, noise: Noise = Noise.DEVICE
) -> Usefulness:
    """Whether `cohort` devices that train `parameters` weights for `rounds` can learn within `epsilon` each.

    Signal over noise of a whole run whose updates agree: k sqrt(T) / (sigma sqrt(d)) where the noise is added once, and
    sqrt(k T) / (sigma sqrt(d)) where each device adds its own.
    """
    per_device = math.sqrt(rounds) / (sigma_for(epsilon, rounds=rounds) * math.sqrt(parameters))
    power = 0.5 if noise is Noise.DEVICE else 1.0
    snr = per_device * cohort**power
    devices = _about(per_device ** (-1 / power))
    many = f"with {cohort} {'device' if cohort == 1 else 'devices'} and a budget of epsilon {epsilon:g}"
    if snr >= 1:
        words = f"{many}, {parameters:,} weights can be learned: the signal is {snr:.1f} times the noise"
    else:
        words = f"{many}, noise hides what {parameters:,} weights learn: no use with fewer than ~{devices:,} devices"
    return Usefulness(snr, devices, words)


def _about(number: float) -> int:
    """To two digits, since more would promise what nobody knows."""
    digits = max(0, math.floor(math.log10(max(number, 1))) - 1)
    return max(1, math.ceil(round(number, -digits)))


class Ledger:
    """The ledger of a pool. `epsilon` is the budget of each model line."""

    def __init__(self, pool: Pool, *, epsilon: float = EPSILON, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self.epsilon, self._clock = pool, epsilon, clock
        pool.adopt("ledger", (_first_tables,), sealed=_SEALED, chained=_CHAINED)

    def spent(self, line: str) -> Spent:
        """What the releases of one model line have cost together."""
        return _spent([entry for entry in self.entries() if entry.model_line == line])

    def spent_all(self) -> Spent:
        """What all releases have cost together: a new line has a new budget, but the person is the same."""
        return _spent(self.entries())

    def lines(self) -> dict[str, Spent]:
        """What each model line has cost."""
        entries = self.entries()
        lines = dict.fromkeys(entry.model_line for entry in entries)
        return {line: _spent([entry for entry in entries if entry.model_line == line]) for line in lines}

    def entries(self) -> list[Entry]:
        """The releases that count, oldest first."""
        with self._pool.read() as database:
            return self.entries_in(database)

    def check(self, line: str, *, sigma: float, clip: float) -> Spent:
        """What one more release would bring the line to; to be asked before learning.

        Raises:
            ConsentError: it would pass the budget, or has no noise.
        """
        with self._pool.read() as database:
            return self._check(database, line, sigma=sigma, clip=clip)

    def reserve_in(
        self,
        database: Database,
        *,
        line: str,
        sigma: float,
        clip: float,
        round_id: str,
        mechanism: str = GAUSSIAN,
    ) -> str:
        """Count a release that is about to be learned, if the budget allows; gives the entry's id. Needs a write
        transaction: the one that begins to learn it. `counting` has what comes after.

        Each call is another release, also of the same round: what is learned again gets other noise.

        Raises:
            ConsentError: it would pass the budget, has no noise, or a mechanism that cannot be accounted for.
        """
        if mechanism != GAUSSIAN:
            raise ConsentError(f"mechanism {mechanism!r} cannot be accounted for; use {GAUSSIAN!r}")
        entry = Entry(
            entry_id=new_id(),
            model_line=line,
            mechanism=mechanism,
            sigma=sigma,
            clip=clip,
            round_id=round_id,
            at_ms=self._clock(),
        )
        self._check(database, line, sigma=sigma, clip=clip)
        self._insert(database, entry)
        return entry.entry_id

    def count_all(self) -> None:
        """Count for good what is reserved: this pool comes from a backup, and nobody knows what left since. Waits."""
        update = "UPDATE ledger SET state = ? WHERE state = ?"
        states = (EntryState.RELEASED, EntryState.RESERVED)
        self._pool.submit(lambda database: database.conn.execute(update, states)).result()

    def take_over(self, other: Ledger) -> None:
        """Count what another pool's ledger counts, whose place this one takes. Waits for the disk."""
        for entry in other.entries():
            self._pool.submit(partial(self._count, entry=entry)).result()

    def advice(self, parameters: int, *, rounds: int = 50) -> str:
        """In plain words, whether the server's devices are enough; empty if it never said how many there are."""
        cohort = read_cohort(self._pool)
        return useful(cohort, parameters, rounds=rounds, epsilon=self.epsilon).words if cohort else ""

    def _count(self, database: Database, entry: Entry) -> None:
        """Count an entry of another ledger, also one that was given back here before it was known to have left."""
        update = "UPDATE ledger SET state = ? WHERE entry_id = ?"
        if not database.conn.execute(update, (EntryState.RELEASED, entry.entry_id)).rowcount:
            self._insert(database, entry, state=EntryState.RELEASED)

    def _insert(self, database: Database, entry: Entry, *, state: EntryState = EntryState.RESERVED) -> None:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("ledger", entry.entry_id, column="body", plain=msgspec.msgpack.encode(entry))
        insert = "INSERT INTO ledger (entry_id, state, body) VALUES (?, ?, ?)"
        database.conn.execute(insert, (entry.entry_id, state, body))
        append(database, self._pool.chain_key, kind=KIND, record_id=entry.entry_id, session_id="", sealed=(body,))

    def _check(self, database: Database, line: str, *, sigma: float, clip: float) -> Spent:
        if not (LEAST_SIGMA <= sigma < math.inf and 0 < clip < math.inf):
            raise ConsentError(
                f"a release with sigma {sigma} and clip {clip} is not private; sigma must be at least {LEAST_SIGMA}"
            )
        before = [entry for entry in self.entries_in(database) if entry.model_line == line]
        after = Spent(len(before) + 1, epsilon_of([*(entry.sigma for entry in before), sigma]))
        if after.epsilon > self.epsilon * (1 + _ROUNDING):
            spent = f"epsilon from {_spent(before).epsilon:.2f} to {after.epsilon:.2f}"
            raise ConsentError(
                f"model line {line}: a release with sigma {sigma:g} would bring {spent}, over the budget of"
                f" {self.epsilon:g} ([privacy] epsilon); nothing more is learned of this line"
            )
        return after

    def entries_in(self, database: Database) -> list[Entry]:
        """The releases that count, oldest first, inside any transaction or snapshot."""
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        query = "SELECT entry_id, body FROM ledger WHERE state != ? ORDER BY seq"
        rows = database.conn.execute(query, (EntryState.RETURNED,))
        opened = (scope.unseal("ledger", entry_id, column="body", sealed=body) for entry_id, body in rows)
        return [msgspec.msgpack.decode(plain, type=Entry) for plain in opened]


def keep_cohort(pool: Pool, devices: int) -> None:
    """Remember how many devices the server learns from. Waits for the disk."""
    pool.set_state(COHORT, str(devices).encode()).result()


def read_cohort(pool: Pool) -> int:
    """How many devices the server learns from, as it last said; 0: it never did."""
    found = pool.get_state(COHORT)
    return int(found) if found else 0


def _spent(entries: Sequence[Entry]) -> Spent:
    return Spent(len(entries), epsilon_of(entry.sigma for entry in entries))


_SEALED = (SealedColumn("ledger", "body", "entry_id"),)
_CHAINED = (Chained(KIND, "ledger", ("body",), "t.entry_id = c.record_id"),)


def _first_tables(database: Database) -> None:
    database.execute(
        "CREATE TABLE ledger (seq INTEGER PRIMARY KEY AUTOINCREMENT, entry_id TEXT NOT NULL UNIQUE,"
        " state TEXT NOT NULL, body BLOB NOT NULL) STRICT"
    )

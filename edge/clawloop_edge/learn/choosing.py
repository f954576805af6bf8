"""What may be learned from at home, and is not yet: judged trajectories whose level lets deltas out and nothing more.

`Chooser` follows the pool's changes with a cursor and keeps an index of what they touch (table `learnable`), so that a
look costs what is new. What is chosen is read and checked once more, by the code that both sides train with. Levels,
curation and rewards are not remembered: they are asked each time. docs/formats/deltas.md.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.learn.job import Interrupted
from clawloop_edge.pool.curation import KIND as CURATION
from clawloop_edge.pool.curation import Curations
from clawloop_edge.pool.heads import current
from clawloop_edge.pool.keeper import TARGET_COLUMNS
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import StepLine
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.deltas import Ladders, Source
from clawloop_edge.privacy.limits import Limits as Lowered
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level
from clawloop_shared.records import Channel, Signal, Trajectory
from clawloop_shared.rows import Limits, screen
from clawloop_shared.signals import RewardRules, assemble

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.privacy.consent import Allowance

CURSOR = "learn.cursor"
BITE, LOOKED_AT = 2000, 200
"""changes that are followed at once, and rows of the index that are looked at: about 0.2 s"""
MAX_TOKENS = 1 << 20
"""of all trajectories of one run together, which are in memory at once; beyond the least number of them"""
MAX_TRAJECTORIES = 1024
"""of one run, beyond the least number of them, whatever a task says of updates and batches"""
MAX_LOOKED = 4
"""sources that are read for each that may be chosen; the others are looked at another time"""
MAX_STEPS = 1024
"""of one trajectory; a longer one is not learned from at home"""
NEW, READY = "new", "ready"
_IDS = "(SELECT value FROM json_each(?))"
_SOURCE = "s.trajectory_id, iif(s.trajectory_id = '', s.run_id, ''), iif(s.trajectory_id = '', s.session_id, '')"
_NAMED = "SELECT seq FROM steps WHERE trajectory_id = ?1 AND trajectory_id != '' AND trainable LIMIT ?2"
_UNNAMED = "SELECT seq FROM steps WHERE run_id = ?1 AND session_id = ?3 AND trajectory_id = '' AND trainable LIMIT ?2"


class Place(msgspec.Struct, frozen=True):
    """How far the index is, and for which consent, rules and model line it holds."""

    seq: int
    basis: str


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One trajectory whose level lets deltas out: that level, and what of it is left out by its owner."""

    source: Source
    channel: Channel
    group_id: str
    level: Level
    lines: list[StepLine]
    left_out: set[str]
    signals: list[Signal]


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What one run learns from: trajectories of one level, where each comes from, and all steps of them. Of the
    `useless` sources nothing can be learned, after all: by which rules, is `refused`."""

    level: Level
    trajectories: list[Trajectory]
    sources: dict[str, Source]
    step_ids: list[str]
    session_ids: list[str]
    refused: dict[str, int] = {}
    useless: list[Source] = []


class Chooser:
    """Chooses in one pool for one model line. `limits`: what a step must fit to be learned from here."""

    def __init__(self, pool: Pool, consent: ConsentLog, *, limits: Limits) -> None:
        self._pool, self._consent, self._limits = pool, consent, limits

    @property
    def rules(self) -> RewardRules:
        """How what was said is weighed."""
        return self._limits.rules

    def catch_up(self) -> int:
        """Follow what is new for one bite; gives how many changes and rows were looked at (0: all is known)."""
        return self._follow() + self._look()

    def ready(self) -> Counter[Level]:
        """How many sources wait to be learned from, by their level, as far as the index knows. Opens nothing."""
        return ready_in(self._pool)

    def choose(
        self, level: Level, *, at_most: int, at_least: int = 1, go_on: Callable[[], bool] = lambda: True
    ) -> Chosen:
        """The latest trajectories of a level that were not learned from before; none if there are none. More than
        `at_least` only as long as they are not too much for memory.

        Raises:
            Interrupted: `go_on` said no; it is asked before each one that is read.
        """
        at_most = min(at_most, max(at_least, MAX_TRAJECTORIES))
        with self._pool.reading() as reading:
            looker = _Looker(reading, self._consent.within(reading.database), self._limits)
            refused = Counter[str]()
            given: list[tuple[Source, Trajectory]] = []
            useless, tokens = list[Source](), 0
            for source in islice(_rows(reading.database, f"{READY} {level}"), MAX_LOOKED * at_most):
                if len(given) >= at_most or (len(given) >= at_least and tokens > MAX_TOKENS):
                    break
                if not go_on():
                    raise Interrupted
                before = len(given)
                found = (one for each in looker.look(source) if _is_of(each, level) for one in looker.read(each))
                given += [(source, one) for one in found if _fits(one, self._limits, refused)]
                useless += [source] if len(given) == before else []
                tokens += sum(len(step.token_ids) for _, one in given[before:] for step in one.steps)
        steps = [step for _, one in given[:at_most] for step in one.steps]
        return Chosen(
            level=level,
            trajectories=[one for _, one in given[:at_most]],
            sources={one.trajectory_id: source for source, one in given[:at_most]},
            step_ids=[step.step_id for step in steps],
            session_ids=sorted({step.session_id for step in steps}),
            refused=dict(refused),
            useless=useless,
        )

    def pass_by(self, sources: Iterable[Source]) -> None:
        """Look at these no more, until something new is kept or said of them: nothing can be learned from them."""
        gone = [(each.trajectory_id, each.run_id, each.session_id) for each in sources]
        delete = "DELETE FROM learnable WHERE trajectory_id = ? AND run_id = ? AND session_id = ? AND item_id = ''"
        self._pool.submit(lambda database: database.conn.executemany(delete, gone)).result()

    # Following changes

    def _follow(self) -> int:
        with self._pool.read() as database:
            basis, first = self._basis(database)
            place = _place(database, self._pool)
            if place is None or place.basis != basis:
                place = Place(first, basis)
            upto = min(place.seq + BITE, current(database).seq)
            touched = [*_touched(database, place.seq, upto)] if upto > place.seq else []
            stale = _place(database, self._pool) != place
        if upto <= place.seq and not stale:
            return 0

        def operation(database: "Database") -> None:
            if stale and self._basis(database)[0] == basis:
                database.conn.execute("DELETE FROM learnable WHERE item_id = ''")
            database.conn.executemany(
                "INSERT INTO learnable (trajectory_id, run_id, session_id, state, seq) VALUES (?, ?, ?, 'new', ?)"
                " ON CONFLICT DO UPDATE SET state = 'new', seq = max(seq, excluded.seq) WHERE item_id = ''",
                touched,
            )
            value = msgspec.msgpack.encode(Place(max(upto, place.seq), basis))
            write_state(database, self._pool.keyring, name=CURSOR, value=value)

        self._pool.submit(operation).result()
        return max(upto - place.seq, 1)

    def _basis(self, database: "Database") -> tuple[str, int]:
        """What the index depends on, hashed, and the change up to which nothing may be learned from."""
        state = self._consent.state_in(database)
        first = next((rung.after_seq for rung in state.ladder.rungs if rung.level.sends_items), 1 << 62)
        lowered = [(each.subject, each.name, each.ladder) for each in Lowered(self._pool).all(database)]
        parts = (state.receipt.receipt_id if state.receipt else "", self._limits.line_id, self._limits.max_tokens)
        plain = msgspec.json.encode((*parts, state.ladder, lowered, self._limits.rules), order="sorted")
        return sha256(plain), min(first, current(database).seq)

    def _look(self) -> int:
        """Look at the rows that something was said of."""
        query = "SELECT trajectory_id, run_id, session_id, seq FROM learnable WHERE state = ? ORDER BY seq LIMIT ?"
        with self._pool.reading() as reading:
            rows = reading.database.conn.execute(query, (NEW, LOOKED_AT)).fetchall()
            looker = _Looker(reading, self._consent.within(reading.database), self._limits)
            states = [(looker.state(Source(*row[:3])), *row) for row in rows]
        kept = [row for row in states if row[0]]
        gone = [row[1:] for row in states if not row[0]]
        same = "trajectory_id = ? AND run_id = ? AND session_id = ? AND seq = ? AND state = 'new'"

        def operation(database: "Database") -> None:
            database.conn.executemany(f"UPDATE learnable SET state = ? WHERE {same}", kept)  # noqa: S608
            database.conn.executemany(f"DELETE FROM learnable WHERE {same}", gone)  # noqa: S608

        if rows:
            self._pool.submit(operation).result()
        return len(rows)


def ready_in(pool: Pool) -> Counter[Level]:
    """How many sources wait in a pool to be learned from, by their level, as far as the running edge has looked."""
    query = "SELECT state, count(*) FROM learnable WHERE state GLOB ? GROUP BY state"
    with pool.read() as database:
        rows = database.conn.execute(query, (f"{READY} *",)).fetchall()
    return Counter({Level(state.removeprefix(f"{READY} ")): number for state, number in rows})


class _Looker:
    """Looks at trajectories in one snapshot."""

    def __init__(self, reading: Reading, allowance: "Allowance", limits: Limits) -> None:
        self._reading, self._limits, self._ladders = reading, limits, Ladders(allowance)
        self._curations = Curations(reading.database, reading.keyring)
        self._run = reading.database.conn.execute

    def state(self, source: Source) -> str:
        """What the index says of a source; empty: nothing can be learned from it as it is."""
        found = [each for each in self.look(source) if self._teaches(each)]
        train = [each for each in found if each.channel is Channel.TRAIN]
        return f"{READY} {train[0].level}" if train else ""

    def look(self, source: Source) -> Iterator[Found]:
        """The trajectories of a source: those of one channel and group, all of whose steps are at levels of deltas."""
        if source.trajectory_id:
            rows = self._run(_NAMED, (source.trajectory_id, MAX_STEPS + 1))
        else:
            rows = self._run(_UNNAMED, (source.run_id, MAX_STEPS + 1, source.session_id))
        seqs = [row[0] for row in rows]
        lines = self._reading.lines_at(seqs) if len(seqs) <= MAX_STEPS else []
        if not lines or self._in_an_item(lines):
            return
        groups: dict[tuple[Channel, str], list[StepLine]] = {}
        for line in reversed(lines):
            groups.setdefault((line.channel, line.group_id), []).append(line)
        for (channel, group_id), members in groups.items():
            level = self._level(members)
            left_out = {line.step_id for line in members if self._curations.off(line)}
            if level is not None and len(left_out) < len(members):
                yield Found(
                    source=source,
                    channel=channel,
                    group_id=group_id,
                    level=level,
                    lines=members,
                    left_out=left_out,
                    signals=self._signals(members, level),
                )

    def read(self, found: Found) -> list[Trajectory]:
        """The trajectory with its tokens and its reward; none without one."""
        steps = [step for line in found.lines if (step := self._reading.step(line.step_id)) is not None]
        return assemble(steps, found.signals, rules=self._limits.rules, left_out=found.left_out)

    def _teaches(self, found: Found) -> bool:
        """Whether it was judged, and a step of it fits. Reads one step's tokens, which tell its model line."""
        if not any(self._limits.rules.counts(signal) for signal in found.signals):
            return False
        fitting = (
            line
            for line in found.lines
            if line.step_id not in found.left_out
            and line.prompt_tokens + line.response_tokens <= self._limits.max_tokens
        )
        step = next((self._reading.step(line.step_id) for line in fitting), None)
        return step is not None and step.policy.line == self._limits.line_id

    def _level(self, lines: Sequence[StepLine]) -> Level | None:
        """The lowest level of these steps; None if they may not all leave as a delta and as nothing more."""
        found = {self._ladders.at(line.session_id, line.seq) for line in lines}
        if not all(level.learns_at_home for level in found):
            return None
        return min(found, key=lambda level: level.rank)

    def _signals(self, lines: Sequence[StepLine], level: Level) -> list[Signal]:
        """What was said of these steps, as far as that may leave as well."""
        said = {signal.signal_id: signal for signal in self._reading.signals(lines)}
        query = f"SELECT signal_id, seq, session_id FROM signals WHERE signal_id IN {_IDS}"  # noqa: S608
        rows = self._run(query, (_json(said),)).fetchall()
        return [said[row[0]] for row in rows if self._ladders.at(row[2], row[1]).rank >= level.rank]

    def _in_an_item(self, lines: Sequence[StepLine]) -> bool:
        """Whether a step of them was in an item before: as itself, or in a delta."""
        query = f"SELECT 1 FROM outbox_records WHERE record_id IN {_IDS} LIMIT 1"  # noqa: S608
        return self._run(query, (_json(line.step_id for line in lines),)).fetchone() is not None


def _touched(database: "Database", after: int, upto: int) -> Iterator[tuple[str, str, str, int]]:
    """The sources that the changes after one and up to another are of, each with the last of them."""
    parts = [f"SELECT {_SOURCE}, s.seq AS seq FROM steps AS s WHERE s.trainable AND s.seq > ?1 AND s.seq <= ?2"]  # noqa: S608
    for table in ("signals", f"{CURATION}s"):
        parts += [
            f"SELECT {_SOURCE}, g.seq AS seq FROM {table} AS g JOIN steps AS s ON s.{column} = g.target_id"  # noqa: S608
            f" WHERE g.target = '{target}' AND s.{column} != '' AND s.trainable AND g.seq > ?1 AND g.seq <= ?2"
            for target, column in TARGET_COLUMNS.items()
        ]
    query = f"SELECT *, max(seq) FROM ({' UNION ALL '.join(parts)}) GROUP BY 1, 2, 3"  # noqa: S608
    for row in database.conn.execute(query, (after, upto)):
        yield row[0], row[1], row[2], row[-1]


def _is_of(found: Found, level: Level) -> bool:
    return found.channel is Channel.TRAIN and found.level is level


def _rows(database: "Database", state: str) -> Iterator[Source]:
    """The sources in a state, those that something happened to last first."""
    query = "SELECT trajectory_id, run_id, session_id FROM learnable WHERE state = ? ORDER BY seq DESC"
    for row in database.conn.execute(query, (state,)):
        yield Source(*row)


def _place(database: "Database", pool: Pool) -> Place | None:
    raw = read_state(database, pool.keyring, name=CURSOR)
    return msgspec.msgpack.decode(raw, type=Place) if raw else None


def _fits(trajectory: Trajectory, limits: Limits, refused: Counter[str]) -> bool:
    """Whether training takes any of it, by the rules that both sides have."""
    found = screen([trajectory], limits)
    refused.update(found.rejected_trajectories.values())
    return bool(found.trajectories)


def _json(names: Iterable[Any]) -> str:
    return msgspec.json.encode(list(names)).decode()

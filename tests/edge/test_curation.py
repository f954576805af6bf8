"""Curation: kept as it was said, found by its tags, gone with its session, and obeyed by what leaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.errors import UnknownTarget
from clawloop_edge.opening import prepare_rooms
from clawloop_edge.pool import backup, curation
from clawloop_edge.pool.curation import Curated, Curation, Curations, Word
from clawloop_edge.pool.keys import FileKeyStore, KnownKey
from clawloop_edge.pool.restore import Rooms, restore
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import in_silence
from clawloop_edge.privacy import curating
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.forget import Forgetter, Wanted
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.preview import preview
from clawloop_edge.privacy.returning import come_back
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared import wire
from clawloop_shared.errors import RecordError
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Mark, Signal, Step, StepBatch, Target

from .kept import kept_step

MIB = 1 << 20
OFF, ON = Word(trainable=False), Word(trainable=True)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """An empty pool whose outbox obeys."""
    with Pool.open(tmp_path / "pool", KnownKey.of(bytes(32))) as opened:
        curating.adopt(opened)
        yield opened


@pytest.fixture
def outbox(pool: Pool) -> Outbox:
    """At level full, holding nothing back."""
    consent = ConsentLog(pool)
    consent.set_level(Level.FULL)
    return Outbox(pool, consent, hold_s=0)


def keep(pool: Pool, session: str = "s1", **fields: Any) -> Step:
    kept = kept_step(session, **fields)
    pool.keep_step(kept).result()
    return kept.step


def say(pool: Pool, target: Target, target_id: str, *, word: Word) -> list[Curation]:
    return curation.curate(pool, target, target_id, word=word).result()


def judge(pool: Pool, target: Target, target_id: str) -> Signal:
    signal = Signal(signal_id=new_id(), target=target, target_id=target_id, source="user", value=1.0, created_ms=1)
    pool.keep_signal(signal).result()
    return signal


def holds(pool: Pool, step: Step) -> Curated:
    with pool.read() as database:
        return Curations(database, pool.keyring).of(step)


def waiting(outbox: Outbox) -> list[StepBatch]:
    """What the items hold that have yet to leave."""
    return [
        wire.decode(outbox.get(item.item_id).body, StepBatch)
        for item in outbox.list()
        if item.state is ItemState.QUEUED
    ]


def waiting_ids(outbox: Outbox) -> set[str]:
    return {step.step_id for batch in waiting(outbox) for step in batch.steps} | {
        signal.signal_id for batch in waiting(outbox) for signal in batch.signals
    }


def send_all(outbox: Outbox) -> None:
    outbox.mark_sent([item.item_id for item in outbox.next_items(MIB)[0]])


# What is said and what holds


def test_the_last_word_on_a_step_its_run_or_its_session_holds_and_all_are_kept(pool: Pool) -> None:
    step, other = keep(pool), keep(pool)
    say(pool, Target.SESSION, "s1", word=Word(trainable=False, quality=2, tags=["old", "slow"]))
    say(pool, Target.STEP, step.step_id, word=Word(trainable=True, note="this one is fine"))
    say(pool, Target.RUN, "run-s1", word=Word(untags=["slow"], quality=4, tags=["new"]))
    found = holds(pool, step)
    assert (found.trainable, found.quality, found.tags, found.note) == (True, 4, ["new", "old"], "this one is fine")
    assert (holds(pool, other).trainable, holds(pool, other).note) == (False, "")
    assert holds(pool, keep(pool)).trainable is False, "a word on a session holds for what comes later in it"
    with pool.read() as database:
        words = Curations(database, pool.keyring).words(step)
    assert [each.word.quality for each in words] == [2, None, 4]
    assert sorted({each.created_ms for each in words}) == [each.created_ms for each in words], "no two at one time"


def test_a_word_on_a_run_is_kept_in_each_session_that_it_passes_through(pool: Pool) -> None:
    one, two = keep(pool, "a", run_id="r"), keep(pool, "b", run_id="r")
    assert [each.session_id for each in say(pool, Target.RUN, "r", word=OFF)] == ["a", "b"]
    Forgetter(pool, []).forget(Forgetter(pool, []).preview(Wanted(session_ids=["a"])))
    assert holds(pool, two).trainable is False
    assert pool.get_step(one.step_id) is None


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        (Word(), "nothing is said"),
        (Word(quality=6), "quality 6"),
        (Word(quality=-1), "quality -1"),
        (Word(tags=["two words"]), "is no tag"),
        (Word(tags=[""]), "is no tag"),
        (Word(note="x" * 5000), "5000 characters"),
        (Word(tags=[f"t{number}" for number in range(40)]), "40 tags"),
    ],
)
def test_a_word_that_says_nothing_or_too_much_is_refused(pool: Pool, word: Word, wrong: str) -> None:
    step = keep(pool)
    with pytest.raises(RecordError, match=wrong):
        say(pool, Target.STEP, step.step_id, word=word)


def test_what_is_not_here_cannot_be_curated(pool: Pool) -> None:
    step = keep(pool)
    with pytest.raises(UnknownTarget, match="no step nobody"):
        say(pool, Target.STEP, "nobody", word=OFF)
    Forgetter(pool, []).forget(Forgetter(pool, []).preview(Wanted(session_ids=["s1"])))
    with pytest.raises(UnknownTarget):
        say(pool, Target.STEP, step.step_id, word=OFF)


def test_words_are_sealed_chained_verified_and_forgotten_with_their_session(pool: Pool) -> None:
    step = keep(pool)
    keep(pool, "s2")
    say(pool, Target.STEP, step.step_id, word=Word(tags=["secret-tag"], note="secret-note"))
    say(pool, Target.SESSION, "s2", word=Word(tags=["secret-tag"]))
    assert pool.verify().ok
    with pool.read() as database:
        plain = repr(database.conn.execute("SELECT * FROM curations").fetchall())
        plain += repr(database.conn.execute("SELECT * FROM curation_tags").fetchall())
    assert "secret" not in plain
    Forgetter(pool, []).forget(Forgetter(pool, []).preview(Wanted(session_ids=["s1"])))
    assert pool.verify().ok
    with pool.read() as database:
        assert [row[0] for row in database.conn.execute("SELECT session_id FROM curations")] == ["s2"]
        assert [row[0] for row in database.conn.execute("SELECT session_id FROM curation_tags")] == ["s2"]


def test_a_word_that_was_changed_on_the_disk_is_found_by_verify(pool: Pool) -> None:
    step = keep(pool)
    say(pool, Target.STEP, step.step_id, word=OFF)
    pool.submit(lambda db: db.conn.execute("DELETE FROM curations").rowcount).result()
    assert any("curation" in problem for problem in pool.verify().problems)


def test_a_backup_brings_its_words_back_and_keeps_those_that_were_said_since(tmp_path: Path) -> None:
    file, home = tmp_path / "a.backup", tmp_path / "home"
    home.mkdir(mode=0o700)
    store = FileKeyStore(home / "pool.key")
    with Pool.open(home, store) as pool:
        prepare_rooms(pool)
        step = keep(pool)
        say(pool, Target.STEP, step.step_id, word=Word(tags=["kept"]))
        backup.back_up(pool, file, seal=None, progress=in_silence)
        say(pool, Target.STEP, step.step_id, word=OFF)
        later = keep(pool)
        say(pool, Target.STEP, later.step_id, word=OFF)
    rooms = Rooms(adopt=prepare_rooms, mend=come_back)
    restore(home, file, store=store, passphrase=lambda: "", replace=True, rooms=rooms, progress=in_silence)
    with Pool.open(home, store) as pool:
        prepare_rooms(pool)
        assert (holds(pool, step).tags, holds(pool, step).trainable) == (["kept"], False)
        assert pool.get_step(later.step_id) is None
        assert pool.verify().ok


def test_a_tag_is_looked_up_and_no_step_without_it_is_opened(pool: Pool) -> None:
    steps = [keep(pool, f"s{number}") for number in range(6)]
    say(pool, Target.STEP, steps[1].step_id, word=Word(tags=["x"]))
    say(pool, Target.SESSION, "s4", word=Word(tags=["x"]))
    say(pool, Target.RUN, "run-s5", word=Word(tags=["x"]))
    say(pool, Target.RUN, "run-s5", word=Word(untags=["x"]))
    with pool.read() as database:
        known = Curations(database, pool.keyring)
        seqs = known.curated_seqs(before_seq=1 << 62, limit=9, tag=curation.tag_index(pool, "x"))
        named = {row[0] for row in database.conn.execute("SELECT step_id FROM steps WHERE seq IN (?, ?)", seqs)}
        plan = " ".join(
            str(row) for row in database.conn.execute("EXPLAIN QUERY PLAN SELECT 1 FROM curation_tags WHERE tag = x''")
        )
    assert named == {steps[1].step_id, steps[4].step_id}
    assert "SCAN" not in plan


# What leaves


def test_what_must_not_be_learned_from_is_not_put_into_the_outbox(pool: Pool, outbox: Outbox) -> None:
    step, other = keep(pool), keep(pool)
    say(pool, Target.STEP, step.step_id, word=OFF)
    judge(pool, Target.STEP, step.step_id)
    run = judge(pool, Target.RUN, "run-s1")
    with pool.reading() as reading:
        assert preview(reading, ConsentLog(pool).within(reading.database), after_seq=0).steps == 1
    outbox.fill()
    assert waiting_ids(outbox) == {other.step_id, run.signal_id}


def test_a_step_that_waits_is_taken_out_and_the_rest_of_its_item_still_leaves(pool: Pool, outbox: Outbox) -> None:
    step, other = keep(pool), keep(pool)
    signal = judge(pool, Target.STEP, other.step_id)
    outbox.fill()
    (item,) = outbox.list()
    say(pool, Target.STEP, step.step_id, word=OFF)
    assert outbox.find(item.item_id).state is ItemState.DROPPED
    assert outbox.next_items(MIB) == ([], False), "nothing leaves in between"
    outbox.fill()
    assert waiting_ids(outbox) == {other.step_id, signal.signal_id}
    assert not any(batch.marks for batch in waiting(outbox)), "the server never had it"


def test_a_word_that_comes_while_items_are_made_keeps_its_step_at_home(
    pool: Pool, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = keep(pool)
    submit, said = pool.submit, list[int]()

    def after_a_word(operation: Any) -> Any:
        if not said:
            said.append(1)
            say(pool, Target.STEP, step.step_id, word=OFF)
        return submit(operation)

    monkeypatch.setattr(pool, "submit", after_a_word)
    outbox.fill()
    assert waiting_ids(outbox) == set()


def test_taking_it_back_lets_the_step_leave_after_all(pool: Pool, outbox: Outbox) -> None:
    step = keep(pool)
    signal = judge(pool, Target.STEP, step.step_id)
    say(pool, Target.SESSION, "s1", word=OFF)
    assert outbox.fill() == 0
    say(pool, Target.STEP, step.step_id, word=ON)
    outbox.fill()
    assert waiting_ids(outbox) == {step.step_id, signal.signal_id}
    broken = keep(pool, "s2", untrainable="no logprob for every token", response_logprobs=[-1.0, float("nan")])
    say(pool, Target.STEP, broken.step_id, word=ON)
    outbox.fill()
    assert broken.step_id not in waiting_ids(outbox), "a word makes nothing token-exact"


def test_of_a_step_that_has_left_the_word_goes_after_it(pool: Pool, outbox: Outbox) -> None:
    step, other = keep(pool), keep(pool)
    outbox.fill()
    send_all(outbox)
    (said,) = say(pool, Target.STEP, step.step_id, word=OFF)
    keep(pool)
    outbox.fill()
    (batch,) = waiting(outbox)
    (mark,) = batch.marks
    assert mark == Mark(mark_id=mark.mark_id, step_id=step.step_id, trainable=False, created_ms=said.created_ms)
    (item,) = [item for item in outbox.list() if item.state is ItemState.QUEUED]
    assert item.marks == 1
    send_all(outbox)
    assert outbox.fill() == 0, "a word leaves once"
    say(pool, Target.SESSION, "s1", word=ON)
    outbox.fill()
    (batch,) = waiting(outbox)
    assert {mark.step_id for mark in batch.marks} >= {step.step_id, other.step_id}
    assert all(mark.trainable and mark.created_ms > said.created_ms for mark in batch.marks)


def test_a_mark_names_a_redacted_step_as_the_server_knows_it(pool: Pool) -> None:
    consent = ConsentLog(pool)
    consent.set_level(Level.REDACTED)
    outbox = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", NothingToHide()))
    step = keep(pool, step_id="computed-from-tokens-0123456789")
    outbox.fill()
    (left,) = [step for batch in waiting(outbox) for step in batch.steps]
    send_all(outbox)
    say(pool, Target.STEP, step.step_id, word=OFF)
    outbox.fill()
    (batch,) = waiting(outbox)
    assert [mark.step_id for mark in batch.marks] == [left.step_id] != [step.step_id]
    assert step.step_id not in outbox.get(outbox.list()[-1].item_id).body.decode("latin-1")


def test_a_word_leaves_only_while_steps_may(pool: Pool, outbox: Outbox) -> None:
    step = keep(pool)
    outbox.fill()
    send_all(outbox)
    consent = ConsentLog(pool)
    consent.set_level(Level.OFF)
    say(pool, Target.STEP, step.step_id, word=OFF)
    assert outbox.fill() == 0
    consent.set_level(Level.FULL)
    outbox.fill()
    assert [mark.step_id for batch in waiting(outbox) for mark in batch.marks] == [step.step_id]


def test_a_mark_that_waits_beside_a_step_that_is_taken_out_is_made_again(pool: Pool, outbox: Outbox) -> None:
    left = keep(pool)
    outbox.fill()
    send_all(outbox)
    say(pool, Target.STEP, left.step_id, word=OFF)
    waits = keep(pool)
    outbox.fill()
    (batch,) = waiting(outbox)
    assert (len(batch.steps), len(batch.marks)) == (1, 1)
    say(pool, Target.STEP, waits.step_id, word=OFF)
    outbox.fill()
    (batch,) = waiting(outbox)
    assert (batch.steps, [mark.step_id for mark in batch.marks]) == ([], [left.step_id])


class NothingToHide:
    """A redactor that finds nothing."""

    def learn(self, steps: object) -> None:
        pass

    def step(self, step: Step) -> Step:
        return step

    def text(self, text: str, *, session_id: str) -> str:
        return text

    def is_clean(self, ids: object, *, session_id: str) -> bool:
        return True


@pytest.mark.parametrize("when", ["said before", "said meanwhile"])
@pytest.mark.parametrize("what", ["device", "session"])
def test_a_mark_that_could_not_leave_for_a_while_leaves_when_it_may(
    pool: Pool, outbox: Outbox, when: str, what: str
) -> None:
    consent, step = ConsentLog(pool), keep(pool)

    def allow(level: Level) -> None:
        if what == "device":
            consent.set_level(level)
        else:
            consent.set_limit(Subject.SESSION, "s1", level=level)
        outbox.fill()

    outbox.fill()
    send_all(outbox)
    if when == "said before":
        say(pool, Target.STEP, step.step_id, word=OFF)
        outbox.fill()
        allow(Level.OFF)
    else:
        allow(Level.OFF)
        say(pool, Target.STEP, step.step_id, word=OFF)
        outbox.fill()
    assert waiting(outbox) == []
    allow(Level.FULL)
    (batch,) = waiting(outbox)
    assert [(mark.step_id, mark.trainable) for mark in batch.marks] == [(step.step_id, False)]
    assert not batch.steps
    allow(Level.FULL)
    assert len(waiting(outbox)) == 1

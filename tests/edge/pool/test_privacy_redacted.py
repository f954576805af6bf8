"""Level `redacted`: nothing that the redactor would take out, no name that a caller chose, and nothing unredacted."""

import msgspec
import pytest

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import batch
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.items import OutboxItem
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared import wire
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Hint, Policy, Signal, Step, StepBatch, Target

from .conftest import Blotter, MakeKept, MakeSignal

NAMES = ("alice-session", "alice-run", "alice-trajectory", "alice-group")


@pytest.fixture
def consent(pool: Pool) -> ConsentLog:
    """A consent to redacted steps."""
    consent = ConsentLog(pool)
    consent.set_level(Level.REDACTED)
    return consent


@pytest.fixture
def outbox(pool: Pool, consent: ConsentLog) -> Outbox:
    """An outbox that holds nothing back and takes token 666 and the word `secret` out."""
    return Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Blotter()))


def only_batch(outbox: Outbox) -> tuple[OutboxItem, StepBatch]:
    (item,) = outbox.list()
    return item, wire.decode(outbox.get(item.item_id).body, StepBatch)


def step_with(make_kept: MakeKept, **fields: object) -> Step:
    return msgspec.structs.replace(make_kept(session=NAMES[0]).step, **fields)


def keep(pool: Pool, make_kept: MakeKept, step: Step) -> None:
    pool.keep_step(msgspec.structs.replace(make_kept(), step=step)).result()


def test_what_the_redactor_takes_out_is_not_in_the_item(pool: Pool, outbox: Outbox, make_kept: MakeKept) -> None:
    keep(pool, make_kept, make_kept(prompt=[1, 666, 3], response=[4, 666, 5]).step)
    assert outbox.fill() == 1
    item, found = only_batch(outbox)
    (step,) = found.steps
    assert 666 not in step.token_ids
    assert step.redacted == [(1, 1), (4, 1)]
    assert (item.level, item.redacted_tokens) == (Level.REDACTED, 2)


def test_a_step_without_secrets_leaves_whole(pool: Pool, outbox: Outbox, make_kept: MakeKept) -> None:
    kept = make_kept()
    pool.keep_step(kept).result()
    outbox.fill()
    (step,) = only_batch(outbox)[1].steps
    assert (step.token_ids, step.response_logprobs) == (kept.step.token_ids, kept.step.response_logprobs)
    assert step.step_id == kept.step.step_id, "an id drawn at random tells nothing"


def test_names_that_callers_chose_leave_as_pseudonyms_that_stay_the_same(
    pool: Pool, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    session, run, trajectory, group = NAMES
    steps = [step_with(make_kept, run_id=run, trajectory_id=trajectory, group_id=group) for _ in range(2)]
    for step in steps:
        keep(pool, make_kept, step)
    signals = [make_signal(run, target=Target.RUN), make_signal(session, target=Target.SESSION)]
    for signal in (*signals, make_signal(steps[0].step_id), make_signal(trajectory, target=Target.TRAJECTORY)):
        pool.keep_signal(signal).result()
    outbox.fill()
    item, found = only_batch(outbox)
    body = wire.decode(outbox.get(item.item_id).body, StepBatch)
    assert not [name for name in NAMES if name in str(body)]
    first, second = found.steps
    assert (first.session_id, first.run_id) == (second.session_id, second.run_id)
    assert len({first.session_id, first.run_id, first.trajectory_id, first.group_id}) == 4
    assert [signal.target_id for signal in found.signals] == [
        first.run_id,
        first.session_id,
        first.step_id,
        first.trajectory_id,
    ]


def test_an_id_that_was_computed_from_tokens_could_confirm_a_guess_and_is_replaced(
    pool: Pool, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    parent, child = f"step-{'ab' * 16}", f"step-{'cd' * 16}"
    keep(pool, make_kept, step_with(make_kept, step_id=parent))
    keep(pool, make_kept, step_with(make_kept, step_id=child, parent_id=parent))
    signal = Signal(signal_id="ef" * 16, target=Target.STEP, target_id=child, source="user", value=1.0, created_ms=1)
    pool.keep_signal(signal).result()
    outbox.fill()
    item, found = only_batch(outbox)
    first, second = found.steps
    assert not {parent, child, signal.signal_id} & {first.step_id, second.step_id, found.signals[0].signal_id}
    assert (second.parent_id, found.signals[0].target_id) == (first.step_id, second.step_id)
    with pool.read() as database:
        rows = dict(database.conn.execute("SELECT record_id, sent_as FROM outbox_records").fetchall())
    assert rows == {
        parent: first.step_id,
        child: second.step_id,
        signal.signal_id: found.signals[0].signal_id,
    }
    assert Outbox.items_with(pool, child) == [item]


def test_what_was_said_of_a_step_is_redacted_too(
    pool: Pool, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    kept = make_kept()
    pool.keep_step(kept).result()
    pool.keep_signal(make_signal(kept.step.step_id, comment="my secret")).result()
    outbox.fill()
    assert only_batch(outbox)[1].signals[0].comment == "my [redacted]"


def test_what_belongs_together_is_learned_from_before_any_of_it_is_redacted(
    pool: Pool, consent: ConsentLog, make_kept: MakeKept
) -> None:
    class Learning(Blotter):
        def step(self, step: Step) -> Step | None:
            assert len(self.learned) == 3
            return super().step(step)

    for _ in range(3):
        pool.keep_step(make_kept()).result()
    assert Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Learning())).fill() == 1


def test_without_a_redactor_what_must_be_redacted_waits_and_is_not_lost(
    pool: Pool, consent: ConsentLog, make_kept: MakeKept
) -> None:
    pool.keep_step(make_kept()).result()
    bare = Outbox(pool, consent, hold_s=0)
    assert bare.fill() == 0
    assert bare.waits_for_redactor()
    able = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Blotter()))
    assert able.fill() == 1
    assert not bare.waits_for_redactor()


def test_a_step_of_another_model_or_that_cannot_be_redacted_stays_and_is_counted(
    pool: Pool, consent: ConsentLog, make_kept: MakeKept
) -> None:
    class Unable(Blotter):
        def step(self, step: Step) -> Step | None:
            return None if 13 in step.prompt_ids else super().step(step)

    outbox = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Unable()))
    keep(pool, make_kept, step_with(make_kept, policy=Policy("another line")))
    keep(pool, make_kept, step_with(make_kept, prompt_ids=[13]))
    keep(pool, make_kept, step_with(make_kept, response_ids=[666], response_logprobs=[-0.5]))
    assert outbox.fill() == 0
    assert outbox.left_out() == {batch.OTHER_LINE: 1, batch.NOT_REDACTED: 1, batch.NOTHING_LEFT: 1}
    keep(pool, make_kept, step_with(make_kept, prompt_ids=[13], step_id=new_id()))
    outbox.fill()
    assert outbox.left_out()[batch.NOT_REDACTED] == 2


def test_what_fails_while_redacting_is_tried_again_and_nothing_is_skipped(
    pool: Pool, consent: ConsentLog, make_kept: MakeKept
) -> None:
    class Failing(Blotter):
        broken = True

        def step(self, step: Step) -> Step | None:
            if self.broken:
                raise RuntimeError("the child died")
            return super().step(step)

    redactor = Failing()
    outbox = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", redactor))
    pool.keep_step(make_kept()).result()
    with pytest.raises(RuntimeError):
        outbox.fill()
    redactor.broken = False
    assert outbox.fill() == 1


def test_a_signal_on_redacted_and_open_steps_leaves_no_higher_than_its_session(
    pool: Pool, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    consent = ConsentLog(pool)
    consent.set_level(Level.FULL)
    consent.set_limit(Subject.SESSION, NAMES[0], level=Level.REDACTED)
    kept = make_kept(session=NAMES[0])
    pool.keep_step(kept).result()
    pool.keep_signal(make_signal(kept.step.step_id, comment="secret")).result()
    outbox = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Blotter()))
    outbox.fill()
    item, found = only_batch(outbox)
    assert (item.level, found.signals[0].comment) == (Level.REDACTED, "[redacted]")


def keep_hinted(pool: Pool, make_kept: MakeKept, *token_ids: int, line: str = "line") -> Signal:
    """A step and a signal with a hint on it, both kept."""
    step = step_with(make_kept, step_id=f"step-{'ab' * 16}", policy=Policy(line))
    keep(pool, make_kept, step)
    signal = Signal(
        signal_id=new_id(),
        target=Target.STEP,
        target_id=step.step_id,
        source="hindsight",
        value=-1.0,
        created_ms=1,
        comment="it is secret",
        evidence="a secret hint",
        hint=Hint(step.step_id, 2, list(token_ids)),
    )
    pool.keep_signal(signal).result()
    return signal


def test_a_clean_hint_goes_along_under_the_name_of_its_step_and_its_words_are_redacted(
    pool: Pool, outbox: Outbox, make_kept: MakeKept
) -> None:
    keep_hinted(pool, make_kept, 5, 6, 7)
    outbox.fill()
    found = only_batch(outbox)[1]
    (signal,), (step,) = found.signals, found.steps
    assert (signal.comment, signal.evidence) == ("it is [redacted]", "a [redacted] hint")
    assert signal.hint == Hint(step.step_id, 2, [5, 6, 7])
    assert step.step_id != f"step-{'ab' * 16}"


def test_a_hint_with_something_to_take_out_stays_at_home(pool: Pool, outbox: Outbox, make_kept: MakeKept) -> None:
    keep_hinted(pool, make_kept, 5, 666, 7)
    outbox.fill()
    (signal,) = only_batch(outbox)[1].signals
    assert signal.hint is None
    assert signal.value == -1.0


def test_a_hint_of_another_model_cannot_be_looked_through_and_stays(
    pool: Pool, outbox: Outbox, make_kept: MakeKept
) -> None:
    keep_hinted(pool, make_kept, 5, 6, 7, line="another line")
    outbox.fill()
    (signal,) = only_batch(outbox)[1].signals
    assert signal.hint is None


def test_at_full_a_hint_leaves_as_it_is(pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept) -> None:
    consent.set_level(Level.FULL)
    kept = keep_hinted(pool, make_kept, 5, 666, 7)
    outbox.fill()
    assert only_batch(outbox)[1].signals == [kept]

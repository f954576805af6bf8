"""What a round was given stays what it was: nothing that comes changes it, and what goes is lost to it."""

import random
from collections.abc import Callable

import pytest

from clawloop_server.bases import Base
from clawloop_server.errors import VaultError
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.ids import new_id
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Mark, Signal, Step, StepBatch, Target, Trajectory

Make = Callable[..., Step]
Say = Callable[..., Signal]


def send(
    vault: Vault, device: str, *, steps: list[Step], signals: list[Signal], marks: list[Mark] | None = None
) -> None:
    body = wire.encode(StepBatch(steps=steps, signals=signals, marks=marks or []))
    vault.receive(device, [UploadItem(item_id=new_id(), receipt_id="r", kind="steps", body=body)])


def mark(step: Step, *, trainable: bool, created_ms: int) -> Mark:
    return Mark(mark_id=new_id(), step_id=step.step_id, trainable=trainable, created_ms=created_ms)


def read(vault: Vault, round_id: str = "round") -> list[Trajectory]:
    return list(vault.pins.read(pin.trajectory_id for pin in vault.pins.of(round_id)))


@pytest.fixture
def filled(vault: Vault, device: str, make_step: Make, make_signal: Say) -> list[Step]:
    """Three runs of two steps each, judged."""
    steps = [make_step(run_id=f"r{n}", created_ms=n * 10 + i) for n in range(3) for i in range(2)]
    send(vault, device, steps=steps, signals=[make_signal(Target.RUN, f"r{n}", 0.5) for n in range(3)])
    return steps


def test_what_comes_after_a_round_began_changes_nothing_of_what_it_has(
    vault: Vault, base: Base, device: str, make_step: Make, make_signal: Say, filled: list[Step]
) -> None:
    assert vault.pin("round", base.line_id, 3) == (3, 6)
    before = read(vault)
    assert before == sorted(vault.ready(base.line_id, 9), key=lambda t: t.trajectory_id)
    more = [make_step(run_id="r0", created_ms=5), make_step(run_id="new")]
    said = [make_signal(Target.RUN, name, -1.0, created_ms=9) for name in ("r0", "r1", "new")]
    back = [mark(filled[4], trainable=True, created_ms=1)]
    send(vault, device, steps=more, signals=said, marks=back)
    assert read(vault) == before
    assert vault.count_ready(base.line_id) == 4, "nothing is consumed before the round ends"
    vault.consume("round", vault.pins.rewards(t.trajectory_id for t in before))
    vault.pins.release("round")
    assert [t.steps[0].run_id for t in vault.ready(base.line_id, 9)] == ["new"]
    accounts = [lesson.account for lesson in vault.lessons("round")]
    assert {a.reward.value for a in accounts if a and a.reward} == {0.5}


def test_what_its_owner_takes_out_is_lost_to_the_round_and_the_rest_waits_for_the_next(
    vault: Vault, base: Base, device: str, filled: list[Step]
) -> None:
    vault.pin("round", base.line_id, 3)
    assert not any(pin.lost for pin in vault.pins.of("round"))
    send(vault, device, steps=[], signals=[], marks=[mark(filled[0], trainable=False, created_ms=5)])
    lost = [pin.trajectory_id for pin in vault.pins.of("round") if pin.lost]
    assert len(lost) == 1
    assert {t.steps[0].run_id for t in read(vault)} == {"r1", "r2"}
    (rest,) = (t for t in vault.ready(base.line_id, 9) if t.trajectory_id in lost)
    assert rest.steps == [filled[1]]


def test_a_step_left_out_before_stays_left_out_and_its_mark_loses_nothing(
    vault: Vault, base: Base, device: str, filled: list[Step]
) -> None:
    send(vault, device, steps=[], signals=[], marks=[mark(filled[0], trainable=False, created_ms=5)])
    vault.pin("round", base.line_id, 3)
    before = read(vault)
    send(vault, device, steps=[], signals=[], marks=[mark(filled[0], trainable=False, created_ms=6)])
    send(vault, device, steps=[], signals=[], marks=[mark(filled[0], trainable=True, created_ms=7)])
    assert read(vault) == before
    assert sorted(len(t.steps) for t in before) == [1, 2, 2]


def test_a_plan_is_kept_in_its_order_and_what_is_set_aside_with_its_reason(
    vault: Vault, base: Base, filled: list[Step]
) -> None:
    vault.pin("round", base.line_id, 3)
    names = [pin.trajectory_id for pin in vault.pins.of("round")]
    random.Random(1).shuffle(names)
    vault.pins.plan("round", [[names[2], names[0]]], set_aside={names[1]: "no steps"})
    found = [(pin.trajectory_id, pin.at_update, pin.reason) for pin in vault.pins.of("round")]
    assert found == [(names[2], 0, ""), (names[0], 0, ""), (names[1], None, "no steps")]


def test_the_largest_of_an_update_is_the_one_with_the_most_tokens(
    vault: Vault, base: Base, device: str, make_step: Make, make_signal: Say
) -> None:
    steps = [make_step(run_id=f"r{n}", prompt_ids=[1] * n) for n in (3, 9, 6)]
    send(vault, device, steps=steps, signals=[make_signal(Target.RUN, f"r{n}") for n in (3, 9, 6)])
    vault.pin("round", base.line_id, 3)
    names = {t.steps[0].run_id: t.trajectory_id for t in read(vault)}
    vault.pins.plan("round", [[names["r3"], names["r6"]], [names["r9"]]], set_aside={})
    assert vault.pins.set_largest_aside("round", 0, reason="too large") == names["r6"]
    assert vault.pins.set_largest_aside("round", 0, reason="too large") == names["r3"]
    assert vault.pins.set_largest_aside("round", 0, reason="too large") is None
    assert [pin.at_update for pin in vault.pins.of("round")] == [1, None, None]


def test_a_device_makes_a_round_begin_again_once_and_then_waits_for_the_next(
    vault: Vault, base: Base, add_device: Callable[[], str], make_step: Make, make_signal: Say
) -> None:
    devices = {name: add_device() for name in "ab"}
    steps = {(name, n): make_step(run_id=f"r{n}", created_ms=n) for name in "ab" for n in range(3)}
    for name, device in devices.items():
        mine = [steps[name, n] for n in range(3)]
        send(vault, device, steps=mine, signals=[make_signal(Target.RUN, f"r{n}") for n in range(3)])
    vault.pin("round", base.line_id, 6)

    def take_out(name: str, n: int) -> None:
        send(vault, devices[name], steps=[], signals=[], marks=[mark(steps[name, n], trainable=False, created_ms=9)])
        vault.pins.begin_again("round", [pin.trajectory_id for pin in vault.pins.of("round") if pin.lost])

    def left() -> list[int]:
        pins = [pin for pin in vault.pins.of("round") if not pin.lost]
        return [sum(pin.device_id == device for pin in pins) for device in devices.values()]

    take_out("a", 0)
    assert left() == [2, 3]
    take_out("b", 0)
    assert left() == [2, 2]
    take_out("a", 1)
    assert left() == [0, 2]
    assert {t.steps[0].step_id for t in vault.ready(base.line_id, 9)} >= {steps["a", 2].step_id}, "it goes another time"


def test_a_row_that_is_gone_without_a_word_is_an_error_and_no_smaller_trajectory(
    vault: Vault, base: Base, filled: list[Step]
) -> None:
    vault.pin("round", base.line_id, 3)
    with vault.database.write() as database:
        database.run("DELETE FROM steps WHERE trajectory_id = (SELECT trajectory_id FROM pins LIMIT 1)")
    with pytest.raises(VaultError, match="is gone; start it anew"):
        read(vault)

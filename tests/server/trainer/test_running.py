"""A round that is cut off goes on, learns from what it was given, and never from what was forgotten meanwhile."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.checkpoint import read_text
from clawloop_server.trainer.engine import PoisonedSamples, TrainEngine
from clawloop_server.trainer.loop import NOT_FINITE
from clawloop_server.trainer.running import DEADLY, RUNNING_FILE, Running
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared.ids import new_id
from clawloop_shared.messages import ForgetRequest
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Signal, Step, Target
from clawloop_shared.rows import Sample
from clawloop_shared.whole_step import Sums

from .filled import PER_ROUND, TRAIN, adapters, configure, die_in, fill, group_of, send, under_way

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]


@pytest.fixture
def filled(
    home: Home, keys: ServerKeys, vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal
) -> Home:
    """A home with data for one round and a bit."""
    configure(home)
    fill(vault, device, count=PER_ROUND + 2, make_step=make_step, make_signal=make_signal)
    return home


@pytest.fixture
def opened(filled: Home) -> Iterator[Callable[[], Worker]]:
    """Opens trainers on it, one after the other."""
    found = list[Worker]()

    def another() -> Worker:
        found.append(Worker.open(filled))
        return found[-1]

    yield another
    for worker in found:
        worker.close()


def learned(worker: Worker) -> list[str]:
    """What the checkpoint within the round learned from."""
    text = read_text(worker._home.trainer / RUNNING_FILE)
    return msgspec.convert(json.loads(text), Running, str_keys=True).progress.learned


def step_names(worker: Worker, trajectory_id: str) -> list[str]:
    (found,) = worker.vault.pins.read([trajectory_id])
    return [step.step_id for step in found.steps]


def forget(vault: Vault, device: str, names: Sequence[str]) -> list[int]:
    return vault.forget(
        ForgetRequest(request_id=new_id(), device_id=device, everything=False, record_ids=list(names), at_ms=1)
    ).adapters


def test_a_round_goes_on_where_it_was_saved_and_tells_of_it_as_one(opened: Callable[[], Worker]) -> None:
    first = opened()
    die_in(first, 2)
    assert len(learned(first)) == 6
    assert (under_way(first).at_update, under_way(first).attempts) == (2, 1)
    second, heard = opened(), list[float]()
    assert second.missing == 0
    report = second.run(lambda metrics: heard.append(metrics["round_update"]))
    assert heard == [3.0]
    assert (report.updates, report.trajectories, report.steps) == (3, 9, 18)
    found = second._registry.round(report.round_id)
    assert [update["round_update"] for update in found.metrics["updates"]] == [1.0, 2.0, 3.0]
    assert (found.attempts, found.trajectories, found.steps) == (2, 9, 18)
    assert not (second._home.trainer / RUNNING_FILE).exists()
    assert second.vault.database.count("SELECT count(*) FROM pins") == 0


def test_a_state_is_saved_no_more_often_than_is_set(filled: Home, opened: Callable[[], Worker]) -> None:
    configure(filled, train=TRAIN | {"checkpoint_every_s": 10.0})
    times = iter([0.0, 0.0, 4.0, 11.0, 11.5, 12.0, 99.0])  # begin, begun, after each update, saved, ..., end
    worker, saved = opened(), list[int]()
    whole = worker._engine.save_state

    def save_state(path: object, *, text: str) -> None:
        if str(path).endswith(RUNNING_FILE):
            saved.append(json.loads(text)["progress"]["at_update"])
        whole(path, text=text)  # type: ignore[arg-type]

    worker._engine.save_state = save_state  # type: ignore[method-assign]
    worker.run(clock=lambda: next(times))
    assert saved == [2]


def test_late_words_and_new_trajectories_change_nothing_of_a_round_under_way(
    filled: Home, opened: Callable[[], Worker], vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal
) -> None:
    worker = opened()
    die_in(worker, 1)
    before = [pin.trajectory_id for pin in vault.pins.of(under_way(worker).round_id)]
    said = [make_signal(Target.RUN, str(n), -1.0, created_ms=99) for n in range(PER_ROUND)]
    send(vault, device, steps=[make_step(run_id=str(n)) for n in range(PER_ROUND)], signals=said)
    report = opened().run()
    assert sorted(vault.lineage(report.round_id)) == sorted(before)
    assert report.steps == 2 * PER_ROUND
    rewards = {
        lesson.account.reward.value
        for lesson in vault.lessons(report.round_id)
        if lesson.account and lesson.account.reward
    }
    assert -1.0 not in rewards


def test_after_other_settings_a_round_begins_anew_under_its_id(filled: Home, opened: Callable[[], Worker]) -> None:
    worker = opened()
    die_in(worker, 2)
    configure(filled, train=TRAIN | {"lr": 0.02})
    report = opened().run()
    assert report.updates == 3
    (found,) = worker._registry.rounds()
    assert (found.round_id, found.attempts) == (report.round_id, 1)


def test_a_state_that_cannot_be_read_is_left_and_the_round_is_made_from_its_beginning(
    filled: Home, opened: Callable[[], Worker]
) -> None:
    die_in(opened(), 2)
    path = filled.trainer / RUNNING_FILE
    path.write_bytes(path.read_bytes()[:100])
    heard = list[float]()
    assert opened().run(lambda metrics: heard.append(metrics["round_update"])).version == 1
    assert heard == [1.0, 2.0, 3.0]


def test_drafts_that_a_crash_left_are_removed(filled: Home, opened: Callable[[], Worker]) -> None:
    draft = filled.trainer / ".running.safetensors.0a1b2c3d"
    draft.write_bytes(b"half")
    opened()
    assert not draft.exists()


# what is forgotten


def test_what_was_learned_from_and_then_forgotten_is_in_no_adapter(
    filled: Home, opened: Callable[[], Worker], vault: Vault, device: str, tmp_path: Path
) -> None:
    """The adapter is that of a round from which it was gone before the first update, bit for bit."""
    die_in(opened(), 0)
    early = Home(tmp_path / "early")
    shutil.copytree(filled.folder, early.folder, symlinks=True)
    first = opened()
    die_in(first, 2)
    gone = learned(first)[1]
    names = step_names(first, gone)
    assert forget(vault, device, names) == []
    heard = list[float]()
    report = opened().run(lambda metrics: heard.append(metrics["trajectories"]))
    assert (len(heard), sum(heard)) == (3, PER_ROUND - 1), "it began again"
    assert gone not in vault.lineage(report.round_id)
    assert report.trajectories == len(vault.lineage(report.round_id)) == PER_ROUND - 1
    assert vault.database.row("SELECT 1 FROM trajectories WHERE trajectory_id = ?", [gone]) is None

    other = Worker.open(early)
    forget(other.vault, device, names)
    other.run()
    other.close()
    assert adapters(early.folder) == adapters(filled.folder) != {}


@pytest.mark.parametrize("at", ["between updates", "while it is judged"])
def test_what_is_forgotten_while_a_round_runs_is_not_published_with_it(
    filled: Home, opened: Callable[[], Worker], vault: Vault, device: str, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    worker, heard, gone = opened(), list[float](), list[str]()

    def forget_one() -> None:
        if not gone:
            gone.append(learned(worker)[0])
            assert forget(vault, device, step_names(worker, gone[0])) == []

    def report(metrics: dict[str, float]) -> None:
        heard.append(metrics["round_update"])
        if at == "between updates" and heard == [1.0, 2.0]:
            forget_one()

    def unhealthy(result: object, settings: object) -> str:
        if at != "between updates":
            forget_one()
        return ""

    monkeypatch.setattr("clawloop_server.trainer.worker.unhealthy", unhealthy)
    done = worker.run(report)
    assert heard == [1.0, 2.0, *([] if at == "between updates" else [3.0]), 1.0, 2.0, 3.0]
    assert done.trajectories == PER_ROUND - 1
    assert gone[0] not in vault.lineage(done.round_id)
    assert [record.version for record in worker._registry.adapters()] == [1]
    assert not list(filled.trainer.glob("running*"))
    rest = vault.lineage(done.round_id)[0]
    assert vault.database.row("SELECT state FROM trajectories WHERE trajectory_id = ?", [rest]) == ("consumed",)


def test_who_forgets_piece_by_piece_makes_a_round_begin_again_twice_at_most(
    filled: Home,
    opened: Callable[[], Worker],
    vault: Vault,
    device: str,
    add_device: Callable[[], str],
    make_step: MakeStep,
    make_signal: MakeSignal,
) -> None:
    """The second time all that the device has in the round waits for another one."""
    other = add_device()
    fill(vault, other, count=4, make_step=make_step, make_signal=make_signal, name="other")
    configure(filled, train=TRAIN | {"updates_per_round": 5})
    worker, began = opened(), list[int]()

    def report(metrics: dict[str, float]) -> None:
        mine = {pin.trajectory_id for pin in vault.pins.of(under_way(worker).round_id) if pin.device_id == device}
        saved = learned(worker) if (filled.trainer / RUNNING_FILE).exists() else []
        if known := [name for name in saved if name in mine]:
            forget(vault, device, step_names(worker, known[0]))

    done = worker.run(report, began=lambda round_: began.append(round_.done))
    assert len(began) == 3
    assert (done.state, done.trajectories) == (RoundState.PASSED, 4)
    assert {lesson.device_id for lesson in vault.lessons(done.round_id)} == {other}
    assert worker.missing == 6, "the others of the device wait for the next"


def test_what_was_not_learned_from_yet_is_passed_by_without_beginning_again(
    opened: Callable[[], Worker], vault: Vault, device: str
) -> None:
    worker, heard = opened(), list[float]()

    def report(metrics: dict[str, float]) -> None:
        heard.append(metrics["trajectories"])
        if len(heard) == 1:
            pins = vault.pins.of(under_way(worker).round_id)
            forget(vault, device, step_names(worker, next(p.trajectory_id for p in pins if p.at_update == 2)))

    assert worker.run(report).trajectories == PER_ROUND - 1
    assert heard == [3.0, 3.0, 2.0]


def test_a_device_that_is_deleted_takes_the_round_with_it_and_the_others_are_learned_from(
    filled: Home,
    opened: Callable[[], Worker],
    vault: Vault,
    device: str,
    add_device: Callable[[], str],
    make_step: MakeStep,
    make_signal: MakeSignal,
) -> None:
    other = add_device()
    fill(vault, other, count=4, make_step=make_step, make_signal=make_signal, name="other")
    configure(filled, train=TRAIN | {"updates_per_round": 5})
    worker = opened()
    die_in(worker, 3)
    vault.delete_device(device)
    report = opened().run()
    assert report.trajectories == 4
    assert {lesson.device_id for lesson in vault.lessons(report.round_id)} == {other}


def test_when_all_of_it_is_gone_the_round_waits_for_others(
    opened: Callable[[], Worker], vault: Vault, device: str
) -> None:
    worker = opened()
    die_in(worker, 1)
    vault.delete_device(device)
    assert opened().missing == PER_ROUND


# what ends hard


def test_after_the_second_death_in_an_update_the_rows_are_halved_and_after_the_third_its_largest_is_set_aside(
    filled: Home, opened: Callable[[], Worker], vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal
) -> None:
    for n in range(PER_ROUND):
        longer = make_step(run_id=str(n), prompt_ids=[2] * (9 + n), created_ms=9, **group_of(n))
        send(vault, device, steps=[longer], signals=[])
    budgets, batches = list[int](), list[list[str]]()
    for _ in range(3):
        worker = opened()
        die_in(worker, 1 if not budgets else 0)
        found = under_way(worker)
        budgets.append(found.row_tokens)
        pins = vault.pins.of(found.round_id)
        batches.append([pin.trajectory_id for pin in pins if pin.at_update == 1])
        assert found.at_update == 1
    largest = max(batches[0], key=lambda name: sum(len(s.token_ids) for s in next(iter(vault.pins.read([name]))).steps))
    assert batches[0] == batches[1] == batches[2]
    report = opened().run()
    assert report.state is RoundState.PASSED
    found_round = worker._registry.round(report.round_id)
    assert found_round.metrics["set_aside"] == {largest: DEADLY}
    assert found_round.attempts == 4
    assert (report.trajectories, report.set_aside) == (PER_ROUND - 1, 1)
    assert largest in vault.lineage(report.round_id), "it does not come back"
    assert budgets == [budgets[0], budgets[0], budgets[0] // 2]
    assert worker._engine.row_tokens == budgets[2]


def test_deaths_in_different_updates_set_nothing_aside(opened: Callable[[], Worker]) -> None:
    worker = opened()
    for later in (1, 1, 0):
        die_in(opened(), later)
    assert opened().run().set_aside == 0
    assert worker._registry.rounds()[0].attempts == 4


def test_what_is_stopped_has_not_died(opened: Callable[[], Worker]) -> None:
    for _ in range(4):
        worker = opened()

        def stop(metrics: dict[str, float]) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            worker.run(stop)
        assert under_way(worker).at_update is None
    assert under_way(worker).deaths == {}
    assert opened().run().set_aside == 0


def test_a_poisoned_trajectory_stays_set_aside_across_a_crash(
    opened: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, poisoned = TrainEngine.forward_backward, list[str]()

    def forward_backward(engine: TrainEngine, samples: Sequence[Sample], settings: LossSettings) -> Sums:
        if not poisoned:
            poisoned.append(samples[0].step_id)
        bad = sorted({s.trajectory for s in samples if s.step_id == poisoned[0]})
        if bad:
            raise PoisonedSamples(bad)
        return whole(engine, samples, settings)

    monkeypatch.setattr(TrainEngine, "forward_backward", forward_backward)
    die_in(opened(), 1)
    worker = opened()
    report = worker.run()
    assert list(worker._registry.round(report.round_id).metrics["set_aside"].values()) == [NOT_FINITE]
    assert report.trajectories == PER_ROUND - 1


def test_a_database_of_before_there_were_pins_runs_its_cut_off_round_anew(
    filled: Home, base: Base, opened: Callable[[], Worker], vault: Vault
) -> None:
    registry = Registry(vault.database, filled.adapters)
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=6, steps=12)
    assert opened().run().round_id == round_id


def test_two_updates_of_a_round_are_never_in_memory_together(opened: Callable[[], Worker], vault: Vault) -> None:
    worker, held = opened(), list[int]()
    whole = worker.vault.pins.read

    def read(names: Sequence[str], *, unreadable: dict[str, str]) -> Iterator[object]:
        held.append(len(names))
        yield from whole(names, unreadable=unreadable)

    worker.vault.pins.read = read  # type: ignore[method-assign,assignment]
    worker.run()
    assert held == [PER_ROUND, 3, 3, 3], "planned one at a time, then an update at a time"

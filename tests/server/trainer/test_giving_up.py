"""What a round does where it cannot go on: which data are to blame for it, and which are not and wait for another."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_candidate, renew_expiring, roll_back
from clawloop_server.trainer.engine import PoisonedSamples, TrainEngine
from clawloop_server.trainer.running import DEADLY_READ, MOST_DEADLY, PLANNING, RUNNING_FILE
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import StorageError
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Signal, Step
from clawloop_shared.rows import Sample
from clawloop_shared.whole_step import Sums

from .filled import PER_ROUND, Died, configure, die_in, fill, group_of, send, under_way

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


def given_up(worker: Worker, says: str) -> None:
    """Whether the next round fails, says so, leaves its data to another one, and has training wait."""
    line_id = worker._base.line_id
    assert not worker.resting
    report = worker.run()
    assert (report.state, report.version, report.trajectories) == (RoundState.FAILED, None, 0)
    assert says in report.reason
    assert worker.vault.lineage(report.round_id) == []
    assert worker.vault.database.count("SELECT count(*) FROM pins") == 0
    assert worker.vault.count_ready(line_id) == PER_ROUND + 2
    assert worker._registry.under_way(line_id) is None
    assert worker.resting


def test_a_round_that_dies_on_and_on_is_given_up_and_its_data_are_not_used_up(opened: Callable[[], Worker]) -> None:
    for _ in range(3 * (MOST_DEADLY + 1)):
        die_in(opened(), 0)
    given_up(opened(), "again after 2 trajectories were set aside")
    assert opened().run().state is RoundState.PASSED, "a restart ends the wait"


def test_a_round_that_dies_while_it_is_planned_sets_its_largest_aside_without_opening_it(
    filled: Home,
    opened: Callable[[], Worker],
    vault: Vault,
    device: str,
    make_step: MakeStep,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longer = make_step(run_id="3", prompt_ids=[2] * 40, created_ms=9, **group_of(3))
    send(vault, device, steps=[longer], signals=[])

    def die(*values: object, **named: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("clawloop_server.trainer.running.plan_round", die)
        for _ in range(3):
            worker = opened()
            with pytest.raises(Died):
                worker.run()
            assert under_way(worker).at_update == PLANNING
    (largest,) = vault.database.rows("SELECT trajectory_id FROM pins ORDER BY tokens DESC LIMIT 1")
    report = opened().run()
    assert (report.state, report.trajectories) == (RoundState.PASSED, PER_ROUND - 1)
    assert worker._registry.round(report.round_id).metrics["set_aside"] == {largest[0]: DEADLY_READ}


def test_what_stops_while_it_is_planned_has_not_died(
    opened: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*values: object, **named: object) -> None:
        raise KeyboardInterrupt

    worker = opened()
    monkeypatch.setattr("clawloop_server.trainer.running.plan_round", stop)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert under_way(worker).at_update is None


def test_an_error_that_nobody_knows_ends_the_trainer_and_counts(
    opened: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(engine: TrainEngine, lr: float) -> float:
        raise RuntimeError("no device")

    worker = opened()
    with monkeypatch.context() as patch:
        patch.setattr(TrainEngine, "optim_step", broken)
        with pytest.raises(RuntimeError, match="no device"):
            worker.run()
    opened().run()
    assert "ended hard in update 0, time 1" in caplog.text


def test_when_nothing_is_finite_the_data_are_not_used_up(
    opened: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_backward(engine: TrainEngine, samples: Sequence[Sample], settings: LossSettings) -> Sums:
        if samples:
            raise PoisonedSamples(sorted({s.trajectory for s in samples}))
        return Sums()

    monkeypatch.setattr(TrainEngine, "forward_backward", forward_backward)
    given_up(opened(), "trajectories of an update are finite")


@pytest.mark.parametrize("planned", [False, True])
def test_what_cannot_be_read_is_set_aside_by_name(opened: Callable[[], Worker], vault: Vault, planned: bool) -> None:
    die_in(opened(), 0)
    worker = opened()
    round_id = under_way(worker).round_id
    broken = next(pin.trajectory_id for pin in vault.pins.of(round_id) if pin.at_update == 1)
    with vault.database.write() as database:
        database.run("UPDATE steps SET sealed = x'00' WHERE trajectory_id = ?", [broken])
        if not planned:
            database.run("UPDATE rounds SET rejected_steps = '' WHERE round_id = ?", [round_id])
    report = worker.run()
    assert (report.round_id, report.state, report.trajectories) == (round_id, RoundState.PASSED, PER_ROUND - 1)
    (found,) = worker._registry.round(round_id).metrics["set_aside"].items()
    assert found[0] == broken
    assert found[1].startswith("cannot be read: ")
    assert broken in vault.lineage(round_id), "it does not come back"


def test_when_nothing_can_be_read_the_data_are_not_used_up(opened: Callable[[], Worker], vault: Vault) -> None:
    with vault.database.write() as database:
        database.run("UPDATE steps SET sealed = x'00'")
    given_up(opened(), f"none of {PER_ROUND} trajectories can be read")


def test_when_all_of_it_is_forgotten_in_the_middle_the_round_ends_and_the_trainer_waits(
    opened: Callable[[], Worker], vault: Vault, device: str
) -> None:
    def report_update(metrics: dict[str, float]) -> None:
        vault.delete_device(device)

    worker = opened()
    report = worker.run(report_update)
    assert (report.state, report.version) == (RoundState.FAILED, None)
    assert "forgotten" in report.reason
    assert (worker.missing, worker.resting) == (PER_ROUND, False)
    assert worker._registry.round(report.round_id).state is RoundState.FAILED
    assert list(worker._home.trainer.glob("running*")) == []


def test_a_state_that_cannot_be_saved_stops_no_round(
    opened: Callable[[], Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = opened()
    whole = worker._engine.save_state

    def save_state(path: Path, *, text: str) -> None:
        if path.name == RUNNING_FILE:
            raise StorageError("the disk is full")
        whole(path, text=text)

    worker._engine.save_state = save_state  # type: ignore[method-assign]
    assert worker.run().state is RoundState.PASSED
    assert "the disk is full" in caplog.text


def test_a_round_begins_with_what_fits_here_and_never_with_more(opened: Callable[[], Worker]) -> None:
    worker = opened()
    fits = worker._engine.row_tokens
    worker._engine.row_tokens = 7  # as if memory had run out in the round before
    die_in(worker, 1)
    assert under_way(worker).row_tokens == worker._engine.row_tokens == fits
    smaller = opened()
    smaller._row_tokens = fits // 4
    smaller.run()
    assert smaller._engine.row_tokens == fits // 4


def test_what_did_not_pass_leaves_no_checkpoint(
    filled: Home, opened: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = filled.trainer / "01ARZ3NDEKTSV4RRFFQ69G5FAV.safetensors"
    stray.write_bytes(b"of a round that was cut off while it was recorded")
    worker = opened()
    assert not stray.exists()
    stray.write_bytes(b"of one that was refused")
    monkeypatch.setattr("clawloop_server.trainer.worker.unhealthy", lambda updates, settings: "bad")
    assert worker.run().state is RoundState.REFUSED
    assert [path.name for path in filled.trainer.glob("*.safetensors")] == ["start.safetensors"]


def test_a_renewal_does_not_move_what_training_goes_on_from(
    filled: Home,
    keys: ServerKeys,
    opened: Callable[[], Worker],
    vault: Vault,
    device: str,
    make_step: MakeStep,
    make_signal: MakeSignal,
) -> None:
    configure(filled, gate={})  # candidates are held
    fill(vault, device, count=3 * PER_ROUND, make_step=make_step, make_signal=make_signal, name="more")
    registry, worker = Registry(vault.database, filled.adapters), opened()
    line_id = worker._base.line_id
    assert worker.run().version == 1
    release_candidate(registry, keys, version=1, now_ms=1)
    second = worker.run()
    assert second.version == 2
    seen = list[int | None]()

    def renew(metrics: dict[str, float]) -> None:
        if not seen:
            seen.append(renew_expiring(registry, keys, line_id=line_id))

    third = worker.run(renew)
    assert (seen, third.state, third.version) == ([3], RoundState.PASSED, 4)
    assert registry.round(third.round_id).base_version == 2
    restarted = opened()._saves.newest()
    assert restarted is not None
    assert restarted.version == 4
    roll_back(registry, keys, to_version=1)
    went_back = opened()._saves.newest()
    assert went_back is not None
    assert (went_back.version, went_back.facts.round_id) == (5, registry.adapter(1).facts.round_id)


def test_a_round_that_dies_while_it_is_judged_is_given_up_in_the_end(
    opened: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(result: object, settings: object) -> str:
        raise Died

    monkeypatch.setattr("clawloop_server.trainer.worker.unhealthy", die)
    for _ in range(3):
        with pytest.raises(Died):
            opened().run()
    given_up(opened(), "while this round was judged")

"""Rounds of cohorts, with the real engine: who conflicts parts, and each cohort goes on from its own adapter."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from safetensors.numpy import load, save

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys, load_keys
from clawloop_server.release.records import AdapterState, RoundState
from clawloop_server.release.release import release_waiting
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.records import Signal, Step, Target

from ..made_deltas import make_delta, send_delta
from .filled import PER_ROUND, TRAIN, configure, send

FEDERATE: dict[str, object] = {"min_devices": 2, "conflict_rounds": 2, "buffer": 4, "duplicate_cosine": 2.0}
TARGETS = ("q_proj", "v_proj")
GOOD, BAD = (20, 21, 22), (30, 31, 32)


@pytest.fixture
def opened(home: Home, keys: ServerKeys, vault: Vault) -> Iterator[Callable[[], Worker]]:
    configure(home, train=TRAIN | {"rank": 8, "alpha": 16.0}, federate=FEDERATE)
    found = list[Worker]()

    def another() -> Worker:
        found.append(Worker.open(home))
        return found[-1]

    yield another
    for worker in found:
        worker.close()


@pytest.fixture
def four(add_device: Callable[..., str]) -> list[str]:
    """Devices of two worlds, two each."""
    return [add_device() for _ in range(4)]


def cohort_of(vault: Vault, device: str) -> str:
    ((cohort,),) = vault.database.rows("SELECT cohort FROM devices WHERE device_id = ?", [device])
    return str(cohort)


def beside(worker: Worker, version: int) -> dict[str, Any]:
    """What a delta says of the adapter that it was learned beside."""
    if not version:
        return {}
    hashes = {entry.name: entry.sha256 for entry in worker._registry.adapter(version).facts.files}
    return {"base_version": version, "weights_sha256": hashes[WEIGHTS_FILE]}


def send_round(worker: Worker, base: Base, four: list[str], *, version: int, seed: int, last: float = -1.0) -> None:
    """A delta of each: the first two agree, and the last two want `last` times that."""
    about, vault = {"targets": TARGETS, "scale": 0.03, **beside(worker, version)}, worker.vault
    world = make_delta(base.shape, base.line_id, seed=seed, **about)
    for n, device in enumerate(four):
        own = make_delta(base.shape, base.line_id, seed=1000 * seed + n, targets=TARGETS, scale=0.01)
        sign = 1.0 if n < 2 else last
        send_delta(vault, device, _sum(world, own, sign=sign))


def _sum(world: Any, own: Any, *, sign: float) -> Any:
    """`world`'s factors, B with that sign, and a little of the device's own."""
    one, other = load(world.weights), load(own.weights)
    mixed = {k: (sign if k.endswith("lora_B.weight") else 1.0) * v + 0.1 * other[k] for k, v in one.items()}
    return replace(world, weights=save(mixed))


def test_devices_whose_deltas_keep_conflicting_part_and_go_on_from_adapters_of_their_own(
    vault: Vault, base: Base, home: Home, opened: Callable[[], Worker], four: list[str]
) -> None:
    worker, keys = opened(), load_keys(home)
    reports = []
    for seed in (1, 2):
        version = worker._saves.named()[1]
        send_round(worker, base, four, version=version, seed=seed)
        reports.append(worker.run())
        release_waiting(worker._registry, keys)
    assert cohort_of(vault, four[0]) == cohort_of(vault, four[1])
    assert cohort_of(vault, four[2]) == cohort_of(vault, four[3])
    assert {cohort_of(vault, four[0]), cohort_of(vault, four[2])} == {"", "cohort-1"}
    (split,) = worker._registry.round(reports[1].round_id).metrics["split"]
    assert split["cohort"] == "cohort-1"
    assert "went against" in split["why"]

    moved, stayed = (four[:2], four[2:]) if cohort_of(vault, four[0]) else (four[2:], four[:2])
    registry, line_id = worker._registry, base.line_id
    begun = {cohort: registry.current(line_id, cohort=cohort) for cohort in ("", "cohort-1")}
    versions = {cohort: adapter.version for cohort, adapter in begun.items() if adapter}
    assert versions == {"": 2, "cohort-1": 3}, "they never agreed, so that nobody goes back"
    assert registry.files(3) == registry.files(1), "the adapter that the round began with"

    for n, device in enumerate(moved):
        about = {"targets": TARGETS, "scale": 0.03, **beside(worker, versions["cohort-1"])}
        send_delta(vault, device, make_delta(base.shape, line_id, seed=50 + n, **about))
    assert worker.missing == 0, "two deltas of a cohort of two are enough"
    report = worker.run()
    assert (report.state, report.deltas) == (RoundState.PASSED, 2)
    assert report.version is not None
    assert registry.adapter(report.version).cohort == registry.round(report.round_id).cohort == "cohort-1"
    release_waiting(registry, keys)
    mine, shared = registry.current(line_id, cohort="cohort-1"), registry.current(line_id)
    assert mine is not None
    assert shared is not None
    assert (mine.version, shared.version) == (report.version, 2)

    for n, device in enumerate(stayed):
        about = {"targets": TARGETS, "scale": 0.03, **beside(worker, 2)}
        send_delta(vault, device, make_delta(base.shape, line_id, seed=70 + n, **about))
    again = opened()
    report = again.run()
    assert report.version is not None
    assert registry.adapter(report.version).cohort == ""
    assert registry.round(report.round_id).base_version == 2
    assert registry.files(mine.version)[WEIGHTS_FILE] != registry.files(report.version)[WEIGHTS_FILE]


def test_cohorts_that_once_agreed_both_go_back_to_that(
    base: Base, home: Home, opened: Callable[[], Worker], four: list[str]
) -> None:
    worker, keys = opened(), load_keys(home)
    registry, report = worker._registry, None
    for seed in range(1, 9):
        send_round(worker, base, four, version=worker._saves.named()[1], seed=seed, last=1.0 if seed == 1 else -1.0)
        report = worker.run()
        if "split" in registry.round(report.round_id).metrics:
            break
        release_waiting(registry, keys)
    assert report is not None
    (split,) = registry.round(report.round_id).metrics["split"]
    assert (split["since"], split["back"]) == (0, True)
    release_waiting(registry, keys)
    taken_back = (AdapterState.ROLLED_BACK, AdapterState.HELD)
    assert all(registry.adapter(version).state in taken_back for version in range(1, report.version or 0))
    for cohort in ("", "cohort-1"):
        adapter = registry.current(base.line_id, cohort=cohort)
        assert adapter is not None
        factors = load(registry.files(adapter.version)[WEIGHTS_FILE])
        assert not any(tensor.any() for name, tensor in factors.items() if "lora_B" in name), "the line as it is"


def test_devices_whose_trajectories_keep_conflicting_part_too(
    vault: Vault,
    base: Base,
    opened: Callable[[], Worker],
    four: list[str],
    make_step: Callable[..., Step],
    make_signal: Callable[..., Signal],
) -> None:
    worker = opened()
    for round_ in range(3):
        for n, device in enumerate(four):
            liked, other = (GOOD, BAD) if n < 2 else (BAD, GOOD)
            for k in range(4):
                name = f"{round_}.{device}.{k}"
                step = make_step(
                    run_id=name,
                    step_id=name,
                    prompt_ids=[7, 8, 9, 10],
                    response_ids=list(liked if k % 2 else other),
                    logprobs=[-5.8] * 3,
                    created_ms=k,
                )
                signals = [make_signal(Target.RUN, name, 1.0 if k % 2 else -1.0)]
                send(vault, device, steps=[step], signals=signals)
        while not worker.missing:
            report = worker.run()
            found = worker._registry.round(report.round_id).metrics
            if "split" in found:
                break
    conflicts = [r.metrics["conflict"] for r in worker._registry.rounds() if r.metrics.get("conflict")]
    assert conflicts, "it was asked who pulls which way"
    assert cohort_of(vault, four[0]) == cohort_of(vault, four[1]) != cohort_of(vault, four[2])
    assert cohort_of(vault, four[2]) == cohort_of(vault, four[3])


def test_a_cohort_that_was_cut_off_goes_first_and_none_starves(
    vault: Vault,
    base: Base,
    opened: Callable[[], Worker],
    four: list[str],
    make_step: Callable[..., Step],
    make_signal: Callable[..., Signal],
) -> None:
    with vault.database.write() as database:
        database.run("UPDATE devices SET cohort = 'b' WHERE device_id = ?", [four[3]])
    for name, device in (("x", four[0]), ("y", four[3])):
        for n in range(2 * PER_ROUND):
            step = make_step(run_id=f"{name}{n}", step_id=f"{name}{n}", response_ids=[20 + n % 5], logprobs=[-5.8])
            send(vault, device, steps=[step], signals=[make_signal(Target.RUN, f"{name}{n}", 1.0 if n % 2 else -1.0)])
    worker = opened()
    served = []
    for _ in range(4):
        assert worker.missing == 0
        served.append(worker._registry.round(worker.run().round_id).cohort)
    assert served in (["", "b", "", "b"], ["b", "", "b", ""])
    assert worker.missing == PER_ROUND

"""The trainer on a real home: rounds as one transaction, killed at any point, and the same adapter in the end."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import tomli_w

from clawloop_server.bases import Base
from clawloop_server.errors import ReleaseError, TrainerError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import AdapterState, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.rejecting import reject
from clawloop_server.release.release import release_candidate, roll_back
from clawloop_server.trainer.process import serve, sole_trainer
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.errors import ConfigError
from clawloop_shared.files import sha256
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, check_tensors, parse_config
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Signal, Step, StepBatch, Target
from clawloop_shared.safetensors_header import read_header

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]
TRAIN = {
    "rank": 2,
    "batch_trajectories": 3,
    "updates_per_round": 2,
    "min_ess": 0.0,
    "min_kept": 0.0,
    "loss": {"veto": 0.0},
}
PER_ROUND = 6
TASK = {
    "messages": [{"role": "user", "content": "hi"}],
    "expect": {"calls": [], "answer_names": "hello"},
}


def configure(home: Home, **tables: dict[str, object]) -> None:
    home.config.write_text(tomli_w.dumps({"train": TRAIN, "reward": {"settle_s": 0}} | tables))


@pytest.fixture
def fill(vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal) -> Callable[[int], None]:
    """Send rewarded trajectories of two steps each."""

    def send(count: int) -> None:
        rng = random.Random(count)
        for n in range(count):
            steps = [
                make_step(
                    run_id=f"run-{count}-{n}",
                    prompt_ids=[2, 3, 4, 5 + n % 50, *range(6, 8 + i)],
                    response_ids=[rng.randrange(2, 320) for _ in range(3)],
                    logprobs=[-rng.uniform(5, 6.5) for _ in range(3)],
                    created_ms=n,
                )
                for i in range(2)
            ]
            signals = [make_signal(Target.RUN, f"run-{count}-{n}", rng.choice((-1.0, 1.0)))]
            body = wire.encode(StepBatch(steps=steps, signals=signals))
            vault.receive(device, [UploadItem(item_id=f"item-{count}-{n}", receipt_id="r", kind="steps", body=body)])

    return send


@pytest.fixture
def ready_home(home: Home, keys: ServerKeys, base: Base, fill: Callable[[int], None], vault: Vault) -> Home:
    """A home with data for two rounds and a trajectory more; nothing has it open."""
    configure(home, gate={"required": False})
    fill(2 * PER_ROUND + 1)
    vault.close()
    return home


@pytest.fixture
def opened(ready_home: Home) -> Iterator[Worker]:
    """A worker on it."""
    worker = Worker.open(ready_home)
    yield worker
    worker.close()


def registry_of(worker: Worker, home: Home) -> Registry:
    return Registry(worker.vault.database, home.adapters)


def test_a_round_becomes_an_adapter_with_its_lineage_and_probe(opened: Worker, ready_home: Home, base: Base) -> None:
    assert opened.missing == 0
    report = opened.run()
    assert (report.state, report.version, report.trajectories, report.steps) == (RoundState.PASSED, 1, 6, 12)
    assert report.verdict == "passed (not evaluated)"
    registry = registry_of(opened, ready_home)
    record, files = registry.adapter(1), registry.files(1)
    config = parse_config(files[CONFIG_FILE])
    check_tensors(read_header(files[WEIGHTS_FILE], max_bytes=1 << 20), config, shape=base.shape)
    assert (len(record.facts.probe.ids), len(record.facts.probe.logprobs)) == (16, 15)
    assert record.facts.lineage_root == sha256("\n".join(sorted(opened.vault.lineage(report.round_id))).encode())
    found = registry.round(report.round_id)
    assert len(found.metrics["updates"]) == 2
    assert opened.run().version == 2
    assert opened.missing == PER_ROUND - 1
    names = {path.name for path in ready_home.trainer.glob("*.safetensors")}
    assert names == {"start.safetensors", *(f"{r.round_id}.safetensors" for r in registry.rounds())}


def test_without_gate_tasks_a_candidate_is_held_by_default(ready_home: Home) -> None:
    configure(ready_home)
    worker = Worker.open(ready_home)
    report = worker.run()
    assert (report.verdict, report.version) == ("held", 1)
    assert registry_of(worker, ready_home).adapter(1).state is AdapterState.HELD
    worker.close()


def test_the_gate_plays_its_tasks_with_both_adapters(ready_home: Home) -> None:
    (ready_home.folder / "tasks.jsonl").write_text(json.dumps(TASK))
    configure(ready_home, gate={"tasks": "tasks.jsonl", "samples": 2})
    worker = Worker.open(ready_home)
    report = worker.run()
    assert report.verdict == "passed"
    evaluation = registry_of(worker, ready_home).adapter(1).facts.evaluation
    assert (evaluation.episodes, evaluation.reward) == (2, 0.0)
    assert evaluation.suite.startswith("tasks.jsonl@")
    worker.close()


def test_a_refused_round_leaves_the_last_passed_state_and_uses_up_its_data(
    ready_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker.open(ready_home)
    assert worker.run().version == 1
    before = worker._engine.adapter()
    monkeypatch.setattr("clawloop_server.trainer.worker.unhealthy", lambda result, settings: "it collapsed")
    report = worker.run()
    assert (report.state, report.reason, report.version) == (RoundState.REFUSED, "it collapsed", None)
    assert worker.vault.count_ready(worker._base.line_id) == 1
    monkeypatch.undo()
    worker._restore()
    assert worker._state.updates == 2
    assert worker._state.version == 1
    assert all(bool((tensor == before[name]).all()) for name, tensor in worker._engine.adapter().items())
    worker.close()


def test_training_does_not_go_on_from_what_was_rejected(ready_home: Home) -> None:
    configure(ready_home)  # what is not evaluated is held
    worker = Worker.open(ready_home)
    registry, start = registry_of(worker, ready_home), worker._engine.adapter()
    assert [worker.run().version, worker.run().version] == [1, 2]
    first = registry.round(registry.adapter(1).facts.round_id)
    with pytest.raises(ReleaseError, match="is in 2 too, made after it; --with-later"):
        reject(registry, version=1, who="me")
    assert reject(registry, version=2, who="me") == [2]
    worker._restore()
    assert (worker._state.version, worker._state.updates) == (1, 2)
    assert reject(registry, version=1, who="me") == [1]
    worker._restore()
    assert (worker._state.version, worker._state.updates) == (0, 0)
    assert all(bool((tensor == start[name]).all()) for name, tensor in worker._engine.adapter().items())
    worker._prune()
    assert [path.name for path in ready_home.trainer.glob("*.safetensors")] == ["start.safetensors"]
    assert registry.round(first.round_id) == first, "what it was stays known"
    worker.close()
    again = Worker.open(ready_home)
    assert again._saves.named() == ("start", 0)
    again.close()


def test_a_round_under_way_does_not_bring_back_what_was_rejected(
    ready_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(ready_home)
    worker = Worker.open(ready_home)
    registry = registry_of(worker, ready_home)
    assert worker.run().version == 1

    def judge(result: object, settings: object) -> str:
        reject(registry, version=1, who="me")
        return ""

    monkeypatch.setattr("clawloop_server.trainer.worker.unhealthy", judge)
    monkeypatch.setattr(Worker, "missing", 0)
    report = worker.run()
    assert (report.state, report.version) == (RoundState.REFUSED, None)
    assert "adapter 1, which it went on from, was rejected meanwhile" in report.reason
    assert worker.vault.lineage(report.round_id) == [], "its data wait for another round"
    worker.close()


def test_a_round_under_way_does_not_bring_back_what_the_operator_took_back(
    ready_home: Home, keys: ServerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker.open(ready_home)
    registry = registry_of(worker, ready_home)
    for version in (1, 2):
        assert worker.run().version == version
        release_candidate(registry, keys, version=version)

    def judge(result: object, settings: object) -> str:
        roll_back(registry, keys, to_version=1)
        return ""

    monkeypatch.setattr("clawloop_server.trainer.worker.unhealthy", judge)
    monkeypatch.setattr(Worker, "missing", 0)
    report = worker.run()
    assert (report.state, report.version) == (RoundState.REFUSED, None)
    assert "adapter 2, which it went on from, was rolled back" in report.reason
    assert worker.vault.lineage(report.round_id) == [], "its data wait for another round"
    assert worker.vault.database.count("SELECT count(*) FROM pins") == 0
    assert [record.version for record in registry.adapters()] == [3, 2, 1]
    worker._restore()
    assert (worker._state.version, worker._state.updates) == (3, 2)
    worker.close()


def test_training_goes_on_from_an_adapter_whose_checkpoint_is_gone(ready_home: Home) -> None:
    worker = Worker.open(ready_home)
    worker.run()
    after = worker._engine.adapter()
    worker.close()
    for path in ready_home.trainer.glob("*.safetensors"):
        path.unlink()
    worker = Worker.open(ready_home)
    worker._restore()
    assert worker._state.version == 1
    assert all(bool((tensor == after[name]).all()) for name, tensor in worker._engine.adapter().items())
    assert worker.run().version == 2
    worker.close()


def test_other_lora_settings_than_those_in_training_are_refused(ready_home: Home) -> None:
    worker = Worker.open(ready_home)
    worker.run()
    worker.close()
    configure(ready_home, train=TRAIN | {"alpha": 4.0})
    worker = Worker.open(ready_home)
    with pytest.raises(ConfigError, match=r"alpha 16, 7 targets .* alpha 4, 7 targets"):
        worker.run()
    worker.close()


def test_a_classifier_that_always_has_work_starves_no_round(
    ready_home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = list[int]()

    def judge(worker: Worker) -> int:
        looked.append(1)
        return 1

    monkeypatch.setattr(Worker, "judge", judge)
    serve(ready_home, rounds=1)
    assert len(looked) == 1
    assert '"event":"round"' in capsys.readouterr().out


def test_only_one_trainer_runs_on_a_home(home: Home) -> None:
    with sole_trainer(home), pytest.raises(TrainerError, match="another trainer"), sole_trainer(home):
        raise AssertionError


def test_an_empty_vault_has_nothing_to_train_on(home: Home, keys: ServerKeys, base: Base) -> None:
    configure(home)
    worker = Worker.open(home)
    assert worker.missing == PER_ROUND
    with pytest.raises(TrainerError, match="no rewarded trajectory"):
        worker.run()
    worker.close()


def test_the_process_prints_one_line_an_event_and_ends_when_told(ready_home: Home) -> None:
    command = [sys.executable, "-m", "clawloop_server.trainer.process", "--home", str(ready_home.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [msgspec.json.decode(process.stdout.readline()) for _ in range(9)]
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert lines[0] == {"event": "ready", "missing": 0}
    assert [line["event"] for line in lines[1:]] == ["began", "update", "update", "round"] * 2
    assert [(line["state"], line["version"]) for line in lines[4::4]] == [("passed", 1), ("passed", 2)]
    assert process.returncode == 0, errors
    assert errors.count("reward=") == 4


def test_a_home_that_is_none_is_one_line_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clawloop_server.trainer.process", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run `clawloop-server init" in done.stderr
    assert done.stderr.count("\n") == 1

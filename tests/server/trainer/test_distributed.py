"""Two processes train what one would: gradients, steps, rounds; and none is left waiting when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file

from clawloop_server.bases import Base, base_folder
from clawloop_server.errors import TrainerError
from clawloop_server.home import Home
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.launch import Seat, find_seat, launch
from clawloop_server.trainer.leading import Disagreement, SetAdapter, _check_base, obey
from clawloop_server.trainer.packing import pack
from clawloop_server.trainer.worker import Worker
from clawloop_server.trainer.world import Alone
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.rows import Sample

from .filled import PER_ROUND, TRAIN, MakeSignal, MakeStep, configure, fill
from .ranks import ROW_TOKENS, Case, build, train

Session = Callable[..., list[Sample]]
REPOSITORY = Path(__file__).parents[3]
CASES = (
    Case("forks", rank=3),
    Case("forks", tied=False, checkpointing="on"),
    Case("forks", architecture="llama", kl_beta=0.0),
    Case("one", architecture="llama", tied=False),
    Case("one"),
)
"""`forks`: three rows, so that once the second process has none; `one`: it never has. A rank of 3 has no halves."""
ROWS = {"forks": 3, "one": 1}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    from .conftest import session

    make = session.__wrapped__()  # type: ignore[attr-defined]
    samples = {"forks": make(5, trajectories=3), "one": make(6, trajectories=1, turns=2)}
    for name, kept in samples.items():
        (folder / name).write_bytes(msgspec.msgpack.encode(kept, enc_hook=list))
    for number, case in enumerate(CASES):
        (folder / f"{number}.case").write_bytes(msgspec.json.encode(case))
    command = [
        sys.executable,
        "-c",
        "import sys; from clawloop_server.trainer.launch import launch;"
        "sys.exit(launch(2, [sys.executable, '-m', 'tests.server.trainer.ranks', sys.argv[1]]))",
        str(folder),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_do_what_one_does(number: int, together: Path) -> None:
    case = CASES[number]
    samples = msgspec.msgpack.decode((together / case.name).read_bytes(), type=list[Sample])
    assert len(pack(samples, row_tokens=ROW_TOKENS)) == ROWS[case.name]
    found, told = train(build(case), samples, case, Alone())
    theirs = load_file(together / f"{number}.safetensors")
    said = json.loads((together / f"{number}.json").read_text())
    assert theirs.keys() == found.keys()
    apart = {name: float((theirs[name].double() - tensor.double()).abs().max()) for name, tensor in found.items()}
    assert max(apart.values()) < 1e-6, apart
    assert max(float(tensor.abs().max()) for name, tensor in found.items() if name.startswith("gradient/")) > 1e-3
    assert said["sums"] == pytest.approx(told["sums"], abs=1e-6)
    for name in ("norms", "base", "logprobs", "again"):
        assert flat(said[name]) == pytest.approx(flat(told[name]), abs=1e-6)
    assert said["replies"] == told["replies"]
    assert said["poisoned"] == told["poisoned"] != []


def flat(values: Any) -> list[float]:
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


# rounds


@pytest.fixture
def ready_home(
    home: Home, keys: object, base: Base, vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal
) -> Home:
    """A home with data for a round, for two processes; nothing has it open."""
    fill(vault, device, count=PER_ROUND, make_step=make_step, make_signal=make_signal)
    vault.close()
    configure(home, train=TRAIN | {"processes": 2})
    return home


@contextmanager
def trainer(home: Home, *launcher: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *launcher, "-m", "clawloop_server.trainer.process", "--home", str(home.folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--rounds", "1"], env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def told(output: str) -> list[str]:
    return [json.loads(line)["event"] for line in output.splitlines()]


def adapter_of(home: Home) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(home.adapters / "1" / WEIGHTS_FILE)
    return tensors


def round_alone(home: Home, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The adapter before and after a round of one process on a copy of the home."""
    shutil.copytree(home.folder, folder, symlinks=True)
    worker = Worker.open(Home(folder))
    before = worker._engine.adapter()
    worker.run()
    worker.close()
    return before, adapter_of(Home(folder))


def assert_same_step(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, before: dict[str, torch.Tensor]
) -> None:
    """Both went the same way from `before`; AdamW divides by a gradient's size, so small ones' last bits count."""
    assert found.keys() == wanted.keys()
    step = torch.cat([(wanted[name] - before[name]).flatten() for name in wanted])
    apart = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted])
    assert float(step.norm()) > 0.1
    assert float(apart.norm() / step.norm()) < 1e-3


def test_a_killed_follower_ends_the_trainer_and_a_restart_finishes_the_round(ready_home: Home, tmp_path: Path) -> None:
    before, wanted = round_alone(ready_home, tmp_path / "alone")
    with trainer(ready_home) as process:
        assert process.stdout is not None
        for _ in range(2):  # the first one's state is on the disk before the second begins
            assert any('"update"' in line for line in iter(process.stdout.readline, ""))
        ranks = {int(p.environ()["RANK"]): p for p in psutil.Process(process.pid).children()}
        ranks[1].kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert [line for line in errors.splitlines() if "clawloop.trainer" not in line] == [
            f"trainer: process 1 of 2 (pid {ranks[1].pid}) was ended by SIGKILL, so all end; started again, training"
            " goes on from the last checkpoint"
        ]
        assert psutil.wait_procs(ranks.values(), timeout=10)[1] == []
    with trainer(ready_home) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert told(output)[-1] == "round"
    assert told(output).count("update") < TRAIN["updates_per_round"]  # type: ignore[operator]
    assert_same_step(adapter_of(ready_home), wanted, before=before)


def test_torchrun_starts_the_same_trainer(ready_home: Home, tmp_path: Path) -> None:
    before, wanted = round_alone(ready_home, tmp_path / "alone")
    with trainer(ready_home, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert told(output) == ["ready", "began", "update", "update", "update", "round"]
    assert_same_step(adapter_of(ready_home), wanted, before=before)


# what goes wrong


def script(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", "import os, sys, time\n" + text]


def test_the_launcher_ends_all_when_one_fails_and_says_who(capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert launch(3, script("os.environ['RANK'] == '1' and sys.exit('no GPU')\ntime.sleep(300)")) == 1
    assert capfd.readouterr().err == "no GPU\n"
    assert launch(2, script("os.environ['RANK'] == '0' and os.kill(os.getpid(), 9)\ntime.sleep(300)")) == 1
    assert "process 0 of 2" in capfd.readouterr().err
    assert launch(2, script("sys.exit(75)")) == 1
    assert "lost each other" in capfd.readouterr().err
    assert launch(2, script("pass")) == 0
    assert time.monotonic() - started < 200


def test_the_launcher_stops_the_first_process_and_then_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    stop_us = f"os.environ['RANK'] == '1' and os.kill({os.getpid()}, {signal.SIGTERM:d})\ntime.sleep(300)"
    assert launch(2, script(stop_us)) == 0
    assert capfd.readouterr() == ("", "")


def test_a_seat_is_whole_or_none() -> None:
    assert find_seat({}) is None
    assert find_seat({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None
    assert find_seat({"RANK": "x", "WORLD_SIZE": "4"}) is None, "another launcher's names"
    met = {"MASTER_ADDR": "127.0.0.1"}
    seat = met | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
    assert find_seat(seat) == Seat(rank=3, size=4, local_rank=1, node=1)
    with pytest.raises(ConfigError, match="'LOCAL_RANK' is not set"):
        find_seat(met | {"RANK": "3", "WORLD_SIZE": "4"})
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        with pytest.raises(ConfigError, match=f"^{name} is 'two', not a number"):
            find_seat(seat | {name: "two"})
    with pytest.raises(ConfigError, match=r"RANK 4 and LOCAL_RANK 1 are not in 0\.\.3"):
        find_seat(seat | {"RANK": "4"})


def test_when_a_process_cannot_be_started_those_before_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started, really = list[subprocess.Popen[bytes]](), subprocess.Popen

    def start(*given: Any, **named: Any) -> subprocess.Popen[bytes]:
        if len(started) == 2:
            raise OSError("no memory for another process")
        started.append(really(*given, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainerError, match="process 2 of 3 could not be started: no memory"):
        launch(3, script("time.sleep(300)"))
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_base_of_other_hashes_is_refused_on_another_machine(home: Home, base: Base) -> None:
    folder = base_folder(home, base.line_id)
    far: Any = SimpleNamespace(seat=Seat(rank=2, size=4, local_rank=0, node=1))
    _check_base(folder, far)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"node 1: .* copy base/{base.line_id} from the first node"):
        _check_base(folder, far)


def test_what_all_refuse_is_an_error_of_the_call_and_what_some_refuse_ends_the_trainer(engine: TrainEngine) -> None:
    alike: Any = SimpleNamespace(exchange=lambda data: [data, data])
    with pytest.raises(TrainerError, match="other tensors"):
        obey(SetAdapter(tensors_as_bytes()), engine, alike)
    unlike: Any = SimpleNamespace(exchange=lambda data: [b"", data])
    with pytest.raises(Disagreement, match=r"differ on SetAdapter \(0: done; 1: the adapter has other tensors"):
        obey(SetAdapter(tensors_as_bytes()), engine, unlike)


def tensors_as_bytes() -> bytes:
    from safetensors.torch import save

    data: bytes = save({"lora": torch.zeros(1)})
    return data


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_the_round_of_one(ready_home: Home, tmp_path: Path) -> None:
    train = TRAIN | {"device": "cuda", "dtype": "float32", "attention": "dense"}
    configure(ready_home, train=train)
    before, wanted = round_alone(ready_home, tmp_path / "alone")
    configure(ready_home, train=train | {"processes": 2})
    with trainer(ready_home) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert told(output)[-1] == "round"
    assert_same_step(adapter_of(ready_home), wanted, before={name: tensor.cpu() for name, tensor in before.items()})

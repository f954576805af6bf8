"""Two processes train what one would: gradients, steps, rounds; and none is left waiting when one of them dies."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from clawloop_server.trainer.packing import pack
from clawloop_server.trainer.rows import Sample
from clawloop_server.trainer.world import Alone

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

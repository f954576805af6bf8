"""What an operator does with adapters one by one: taking them elsewhere, comparing them, rejecting them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load, save

from clawloop_server import cli
from clawloop_server.bases import Base, find_base
from clawloop_server.home import Home, open_home
from clawloop_server.release.keys import load_keys
from clawloop_server.release.records import Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.rejecting import reject
from clawloop_server.trainer.parting import begin_apart
from clawloop_server.vault.store import Vault
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, LoraConfig, expected_tensors
from clawloop_shared.manifest import Evaluation, Probe, check_files, open_manifest
from clawloop_shared.manifest_file import MANIFEST_JSON, read_manifest_file

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")  # typer's own import of click

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command on a server made by `init`; what it printed, or its error where it ends with `code`."""

    def run(*arguments: str, code: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--home", str(tmp_path / "box")])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        if code:
            assert "Traceback" not in err
            return err
        return json.loads(out) if "--json" in arguments else out

    run("init", "--base", str(model_folder), "--port", "9443", "--name", "gpu.example", "--yes")
    return run


@pytest.fixture
def made(run: Run, tmp_path: Path) -> Home:
    return open_home(tmp_path / "box")


@pytest.fixture
def base(made: Home) -> Base:
    return find_base(made)


@pytest.fixture
def registry(made: Home) -> Iterator[Registry]:
    vault = Vault.open(made, load_keys(made).master)
    yield Registry(vault.database, made.adapters)
    vault.close()


def adapter(base: Base, *, seed: int, rank: int, targets: tuple[str, ...]) -> dict[str, bytes]:
    """A random adapter's files."""
    config = LoraConfig(r=rank, lora_alpha=16.0, target_modules=list(targets))
    made = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(config, base.shape)
    tensors = {name: torch.randn(*shape, generator=made) for name, shape in shapes.items()}
    return {CONFIG_FILE: msgspec.json.encode(config), WEIGHTS_FILE: save(tensors)}


def learned(
    registry: Registry,
    base: Base,
    *,
    on: int = 0,
    rank: int = 2,
    targets: tuple[str, ...] = ("q_proj",),
    cohort: str = "",
) -> int:
    """A round on adapter `on` and what it made: a candidate."""
    round_id = registry.start_round(base.line_id, base_version=on, trajectories=3, steps=7, cohort=cohort)
    candidate = Candidate(
        round_id=round_id,
        line=base.line,
        files=adapter(base, seed=on, rank=rank, targets=targets),
        rank=rank,
        alpha=16.0,
        target_modules=list(targets),
        probe=Probe(ids=[1, 2], logprobs=[-0.5]),
        evaluation=Evaluation(suite="tools", episodes=8, reward=0.5, reward_before=0.25, standard_error=0.1),
        lineage_root=f"root of {on}",
        cohort=cohort,
    )
    with registry.within():
        version = registry.record_candidate(candidate)
        metrics = {"deltas": {"one": "", "two": "", "three": "left out"}}
        registry.finish_round(round_id, RoundState.PASSED, version=version, metrics=metrics, reason="better")
    return version


def test_a_released_adapter_is_exported_as_it_is_with_its_manifest(
    run: Run, made: Home, base: Base, registry: Registry, tmp_path: Path
) -> None:
    learned(registry, base)
    learned(registry, base)
    run("adapters", "release", "1")
    told = run("adapters", "export", "1", "--out", str(tmp_path / "out"), "--json")
    assert told["folder"] == str(tmp_path / "out")
    assert told["files"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    signed = read_manifest_file((tmp_path / "out" / MANIFEST_JSON).read_bytes())
    manifest = open_manifest(signed, load_keys(made).release_public)
    check_files(manifest, {name: (tmp_path / "out" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)})
    assert "is not empty" in run("adapters", "export", "1", "--out", str(tmp_path / "out"), code=1)
    assert "adapter 2 is candidate; release it first" in run(
        "adapters", "export", "2", "--out", str(tmp_path / "two"), code=1
    )
    assert "no adapter 9; `clawloop-server adapters list`" in run(
        "adapters", "export", "9", "--out", str(tmp_path / "nine"), code=1
    )
    assert not list(tmp_path.glob("two*"))
    assert not list(tmp_path.glob(".*draft*"))


def dense(registry: Registry, version: int) -> dict[str, torch.Tensor]:
    found = registry.adapter(version)
    tensors = load(registry.files(version)[WEIGHTS_FILE])
    scale = found.facts.alpha / found.facts.rank
    a = {name.replace(".lora_A.weight", ""): t.double() for name, t in tensors.items() if "lora_A" in name}
    return {path: scale * tensors[f"{path}.lora_B.weight"].double() @ a[path] for path in a}


def test_diff_tells_what_was_learned_between_two_adapters_and_how_far_they_are_apart(
    run: Run, base: Base, registry: Registry
) -> None:
    first = learned(registry, base)
    middle = learned(registry, base, on=first)
    last = learned(registry, base, on=middle, rank=3, targets=("q_proj", "down_proj"))
    aside = learned(registry, base, on=first)
    run("adapters", "release", "1")
    run("adapters", "release", "3")
    found = run("adapters", "diff", "1", "3", "--json")
    counts = [
        (r["version"], r["base_version"], r["trajectories"], r["steps"], r["deltas"])
        for r in found["lineage"]["b_alone"]
    ]
    assert (found["lineage"]["common"], found["lineage"]["a_alone"], counts) == (
        1,
        [],
        [(2, 1, 3, 7, 2), (3, 2, 3, 7, 2)],
    )
    old, new = dense(registry, first), dense(registry, last)
    zero = {path: torch.zeros_like(matrix) for path, matrix in new.items()}
    both = [torch.cat([one.get(path, zero[path]).flatten() for path in sorted(new)]) for one in (old, new)]
    overall = found["overall"]
    assert overall["relative"] == pytest.approx(float((both[1] - both[0]).norm() / both[0].norm()), rel=1e-6)
    assert overall["cosine"] == pytest.approx(float(both[0] @ both[1] / both[0].norm() / both[1].norm()), abs=1e-6)
    by_layer = {layer["layer"]: layer for layer in found["layers"]}
    down = by_layer["model.layers.0.mlp.down_proj"]
    assert (down["norm_a"], down["relative"], down["cosine"]) == (0.0, None, None)
    assert (found["a"]["rank"], found["b"]["rank"]) == (2, 3)
    assert found["b"]["size_bytes"] == sum(map(len, registry.files(last).values()))
    assert found["manifest"]["version"] == {"a": 1, "b": 3}
    assert {"adapter_model.safetensors sha256", "lineage_root", "previous_sha256"} <= found["manifest"].keys()
    apart = run("adapters", "diff", str(last), str(aside), "--json")["lineage"]
    assert apart["common"] == 1
    assert [[r["version"] for r in apart[side]] for side in ("a_alone", "b_alone")] == [[2, 3], [4]]


def test_diff_is_drawn_for_people(run: Run, base: Base, registry: Registry) -> None:
    learned(registry, base)
    learned(registry, base, on=1, rank=3, targets=("q_proj", "down_proj"))
    run("adapters", "release", "1")
    drawn = run("adapters", "diff", "1", "2")
    words = " ".join(drawn.split())
    assert drawn.index("0.mlp.down_proj") > drawn.index(" all ")
    assert "both go back to adapter 1; 2 has 1 round (3 trajectories, 7 steps, 2 deltas) that 1 has not" in words
    assert "0.mlp.down_proj" in drawn
    assert "new" in drawn
    assert "█" in drawn
    assert "manifests" not in drawn  # one of both was never released
    same = " ".join(run("adapters", "diff", "1", "1").split())
    assert "both are of the same rounds, the latest of adapter 1" in same
    assert "0.0%" in same
    assert "no adapter 9" in run("adapters", "diff", "1", "9", code=1)


def states(run: Run) -> dict[int, str]:
    return {found["version"]: found["state"] for found in run("adapters", "list", "--json")}


def test_a_rejected_adapter_is_never_released_and_everybody_is_told_why(
    run: Run, base: Base, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    learned(registry, base)
    (told,) = run("adapters", "reject", "1", "--reason", "it swears", "--json")
    assert (told["version"], told["act"], told["who"], told["why"]) == (1, "rejected", "ada", "it swears")
    assert states(run) == {1: "rejected"}
    refused = run("adapters", "release", "1", code=1)
    assert "adapter 1 was rejected by ada on 20" in refused
    assert ": it swears; it is never released: take another of `clawloop-server adapters list`" in refused
    for command in ("hold", "reject"):
        assert "adapter 1 is rejected" in run("adapters", command, "1", code=1)
    assert "adapter 1 is rejected, and never released" in run("adapters", "export", "1", "--out", "x", code=1)
    assert "it swears" in run("adapters", "list")
    assert "by ada on" in run("adapters", "show", "1")
    assert run("adapters", "show", "1", "--json")["rejection"] == told
    round_id = registry.adapter(1).facts.round_id
    assert run("rounds", "explain", round_id, "--json")["rejection"] == told
    explained = " ".join(run("rounds", "explain", round_id).split())
    assert "adapter 1 (rejected)" in explained
    assert "it swears" in explained
    assert run("status", "--json")["waiting_adapters"] == 0


def test_what_was_learned_on_from_it_is_rejected_with_it_or_it_is_refused(
    run: Run, base: Base, registry: Registry
) -> None:
    first = learned(registry, base)
    learned(registry, base, on=first)
    learned(registry, base, on=0)
    learned(registry, base, on=2, cohort="c")
    registry.copy_adapter(1, cohort="d")
    assert "is in 2, 4, 5 too, made after it; --with-later" in run("adapters", "reject", "1", code=1)
    run("adapters", "hold", "2")
    assert set(states(run).values()) == {"candidate", "held"}
    done = run("adapters", "reject", "1", "--reason", "poisoned", "--with-later", "--json")
    assert [(one["version"], one["why"]) for one in done] == [
        (1, "poisoned"),
        *((version, "it goes on from 1: poisoned") for version in (2, 4, 5)),
    ]
    assert states(run) == {1: "rejected", 2: "rejected", 3: "candidate", 4: "rejected", 5: "rejected"}


def test_what_devices_have_is_taken_back_before_it_is_rejected(run: Run, base: Base, registry: Registry) -> None:
    first = learned(registry, base)
    run("adapters", "release", "1")
    second = learned(registry, base, on=first)
    learned(registry, base, on=second)
    run("adapters", "release", "3")
    assert "adapter 3 is released; only a candidate or held one is rejected; `clawloop-server adapters rollback" in run(
        "adapters", "reject", "3", code=1
    )
    assert "adapter 3, which was released, goes on from 2; go back before it first" in run(
        "adapters", "reject", "2", "--with-later", code=1
    )
    run("adapters", "rollback", "--to", "1", "--yes")
    assert "adapter 2 is rejected by" in run("adapters", "reject", "2")
    assert states(run) == {1: "released", 2: "rejected", 3: "rolled_back", 4: "released"}
    assert "say it in 500" in run("adapters", "reject", "4", "--reason", "x" * 501, code=1)


def test_cohorts_that_part_begin_with_the_newest_adapter_that_was_not_rejected(
    base: Base, registry: Registry, run: Run
) -> None:
    first = learned(registry, base)
    second = learned(registry, base, on=first)
    third = learned(registry, base, on=second)
    reject(registry, version=second, who="me", with_later=True)

    def bare(cohort: str) -> Candidate:
        raise AssertionError("there is an adapter to begin with")

    begin_apart(registry, line_id=base.line_id, cohort="", parted=["c"], since=third, back=False, bare=bare)
    newest = registry.adapters()[0]
    assert (newest.cohort, newest.facts.round_id) == ("c", registry.adapter(first).facts.round_id)

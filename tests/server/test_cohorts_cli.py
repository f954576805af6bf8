"""`cohorts`, and what other commands say of them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from clawloop_server.bases import Base
from clawloop_server.cli.commands import app
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.hub.members import HubReleases
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import AdapterState, Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_waiting
from clawloop_server.vault.store import Vault
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")


@pytest.fixture
def run(home: Home) -> Callable[..., str]:
    def run(*arguments: str, code: int = 0) -> str:
        found = CliRunner().invoke(app, ["--home", str(home.folder), *arguments])
        assert found.exit_code == code, found.output
        return found.output

    return run


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


def release(registry: Registry, keys: ServerKeys, base: Base, cohort: str, *, round_id: str = "round") -> None:
    made = Candidate(
        round_id=round_id,
        line=base.line,
        files={CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"},
        rank=8,
        alpha=16.0,
        target_modules=["q_proj"],
        probe=Probe(ids=[1, 2], logprobs=[-0.5]),
        evaluation=Evaluation(suite="tools", episodes=8, reward=0.5, reward_before=0.25, standard_error=0.1),
        lineage_root="root",
        cohort=cohort,
    )
    registry.record_candidate(made)
    release_waiting(registry, keys)


def test_cohorts_are_listed_with_the_reason_that_made_them(
    run: Callable[..., str], registry: Registry, keys: ServerKeys, base: Base, vault: Vault, add_device: Any
) -> None:
    one, other = add_device(), add_device()
    release(registry, keys, base, "")
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=0, steps=0)
    split = [{"cohort": "cohort-1", "devices": [other], "why": "they went against each other"}]
    conflict = {min(one, other): {max(one, other): -0.5}}
    metrics = {"split": split, "conflict": conflict}
    registry.finish_round(round_id, RoundState.PASSED, metrics=metrics)
    Devices(vault.database).set_cohort(other, "cohort-1")
    release(registry, keys, base, "cohort-1")

    listed = json.loads(run("cohorts", "list", "--json"))
    assert [(c["cohort"], c["devices"], c["adapter_version"]) for c in listed] == [
        ("", [one], 1),
        ("cohort-1", [other], 2),
    ]
    assert (listed[1]["round_id"], listed[1]["why"]) == (round_id, "they went against each other")
    shown = run("cohorts", "list")
    assert "everybody else" in shown
    assert f"rounds explain {round_id}" in shown.replace("\n", " ")
    explained = run("rounds", "explain", round_id)
    assert "learn apart from now on, as cohort-1" in explained.replace("\n", " ")
    assert "-0.500" in explained
    assert json.loads(run("adapters", "show", "2", "--json"))["cohort"] == "cohort-1"
    assert json.loads(run("devices", "show", other, "--json"))["cohort"] == "cohort-1"


def test_a_device_is_moved_by_the_operator_and_gets_the_adapters_of_its_cohort(
    run: Callable[..., str], registry: Registry, keys: ServerKeys, base: Base, vault: Vault, add_device: Any
) -> None:
    one, other = add_device(), add_device()
    release(registry, keys, base, "")
    release(registry, keys, base, "quiet")
    releases = HubReleases(registry, Devices(vault.database), line_id=base.line_id)
    assert (releases.current_version(), releases.apart(), releases.versions()) == (1, {}, {"": 1, "quiet": 2})
    assert "learns with quiet" in run("cohorts", "move", one, "--to", "quiet", "--yes")
    assert releases.apart() == {one: 2}
    run("cohorts", "move", other, "--to", "new-one", "--yes")
    assert releases.apart() == {one: 2, other: 1}, "a cohort without an adapter has the shared one"
    assert "everybody else" in run("cohorts", "move", one, "--yes")
    assert releases.apart() == {other: 3}, "the device has 2 and takes no 1, so that it is given again"
    assert (releases.current_version(), registry.adapter(3).origin) == (3, 1), "training goes on from what it was"
    assert registry.files(3) == registry.files(1)
    assert "letters" in run("cohorts", "move", one, "--to", "a b", "--yes", code=2)
    run("cohorts", "move", "nobody", "--yes", code=1)


def test_a_device_that_has_a_higher_version_than_its_new_cohort_is_not_stuck(
    run: Callable[..., str], registry: Registry, keys: ServerKeys, base: Base, vault: Vault, add_device: Any
) -> None:
    device, alone = add_device(), add_device()
    for cohort in ("quiet", "", ""):
        release(registry, keys, base, cohort)
    Devices(vault.database).mark_seen(device, 3)
    moved = run("cohorts", "move", device, "--to", "quiet", "--yes")
    assert "released again, as 4" in moved
    found = registry.current(base.line_id, cohort="quiet")
    assert found is not None
    assert (found.version, found.origin) == (4, 1)
    assert "released again" not in run("cohorts", "move", alone, "--to", "quiet", "--yes")
    assert registry.current(base.line_id) == registry.adapter(3), "the others keep theirs"


def test_a_rollback_names_the_cohorts_that_go_on_from_what_is_taken_back_and_takes_them_along(
    run: Callable[..., str], registry: Registry, keys: ServerKeys, base: Base
) -> None:
    def made(cohort: str, on: int) -> int:
        round_id = registry.start_round(base.line_id, base_version=on, trajectories=0, steps=0, cohort=cohort)
        release(registry, keys, base, cohort, round_id=round_id)
        version = registry.adapters()[0].version
        registry.finish_round(round_id, RoundState.PASSED, version=version)
        return version

    first = made("", 0)
    apart = made("other", first)  # went on from what stays
    bad = made("", first)
    copied = registry.copy_adapter(bad, cohort="a")  # as a split begins
    release_waiting(registry, keys)
    assert made("a", copied) == 5
    assert apart == 2

    refused = run("adapters", "rollback", "--to", str(first), "--json", code=1)
    assert "cohort a: goes on" in refused
    found = json.loads(run("adapters", "rollback", "--to", str(first), "--with-cohorts", "--yes", "--json"))
    assert (found["version"], found["cohorts"], found["cohorts_kept"]) == (6, {"a": 7}, [])
    states = {a.version: a.state for a in registry.adapters()}
    assert [version for version, state in states.items() if state is AdapterState.ROLLED_BACK] == [5, 4, 3]
    assert registry.adapter(7).facts.round_id == registry.adapter(first).facts.round_id


def test_a_rollback_of_a_cohort_says_whose_and_leaves_the_others(
    run: Callable[..., str], registry: Registry, keys: ServerKeys, base: Base
) -> None:
    for cohort in ("", "a", "a"):
        release(registry, keys, base, cohort)
    assert json.loads(run("adapters", "rollback", "--to", "2", "--yes", "--json"))["version"] == 4
    assert json.loads(run("adapters", "rollback", "--to", "1", "--cohort", "a", "--yes", "--json"))["version"] == 5
    current, shared = registry.current(base.line_id, cohort="a"), registry.current(base.line_id)
    assert current is not None
    assert shared is not None
    assert (current.version, shared.version) == (5, 1)

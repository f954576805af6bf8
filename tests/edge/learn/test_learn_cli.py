"""The commands of learning at home: what a person sees of it, in words that are true."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge.cli.context import console
from clawloop_edge.cli.deltas import picture
from clawloop_edge.cli.root import app
from clawloop_edge.home import EdgeHome
from clawloop_edge.learn.masked import MaskedItems
from clawloop_edge.opening import open_pool
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_edge.privacy.ledger import keep_cohort
from clawloop_edge.privacy.policy import TEXTS
from clawloop_shared.deltas import A
from clawloop_shared.levels import Level

from .learning_device import LearningDevice, learn_task


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeHome:
    """A home as `setup` makes it, and a terminal that is wide enough to read."""
    monkeypatch.setattr(console, "width", 200)
    found = EdgeHome(tmp_path / "home")
    made = run(found, "setup", "--model", str(tiny_model), "--key-file", "--port", "8124", "--yes")
    assert made.exit_code == 0, made.output
    return found


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


def ok(home: EdgeHome, *arguments: str) -> str:
    result = run(home, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def facts(home: EdgeHome, *arguments: str) -> Any:
    return json.loads(ok(home, *arguments, "--json"))


def learned(home: EdgeHome, level: Level) -> tuple[str, str]:
    """The item that a device learned at a level in this home, and a step that it learned from."""
    device = LearningDevice(home.folder, pool=open_pool(home, writer=False))
    device.now_ms = wall_clock_ms()
    device.set_level(level)
    (step, _) = device.keep_many(2)
    device.learn()
    (item,) = device.outbox.list()
    device.close()
    return item.item_id, step.step_id


def test_before_anything_it_says_at_which_level_nothing_is_learned(home: EdgeHome) -> None:
    assert "the level is off (never asked), at which nothing is learned here" in ok(home, "learn", "status")
    assert facts(home, "learn", "status")["state"] == "not running"
    assert "nothing was learned here yet" in ok(home, "learn", "history")
    assert facts(home, "learn", "history") == []
    (finding,) = [
        each for each in json.loads(run(home, "doctor", "--json").output)["findings"] if each["check"] == "learning"
    ]
    assert finding["state"] == "ok"


def test_at_a_level_of_deltas_it_says_why_it_never_learned(home: EdgeHome) -> None:
    ok(home, "privacy", "set", "deltas", "--yes")
    status = ok(home, "learn", "status")
    assert "the edge does not run" in status
    assert "0 judged and not learned from before, of 8 at least" in status
    (finding,) = [
        each for each in json.loads(run(home, "doctor", "--json").output)["findings"] if each["check"] == "learning"
    ]
    assert finding["state"] == "warn"
    assert "never learned so far" in finding["reason"]
    assert "it begins when no call is in flight" in ok(home, "learn", "now")
    assert facts(home, "learn", "status")["asked_ms"] > 0


def test_a_plain_delta_is_shown_with_its_sizes_and_a_warning(home: EdgeHome) -> None:
    item_id, step_id = learned(home, Level.DELTAS)
    listed = ok(home, "outbox", "list")
    assert "delta of 2 trajectories, ffa of rank 4" in listed
    assert "(learned from 2 sessions)" in listed
    shown = ok(home, "outbox", "show", item_id)
    assert "parts of what was said can be recovered" in shown
    assert "judged +1.00 on average" in shown
    assert "q_proj B" in shown
    told = facts(home, "outbox", "show", item_id)
    assert told["trajectories"] == 2
    assert "weights" not in told
    assert len(told["tensors"]) == 14
    raw = run(home, "outbox", "show", item_id, "--raw").stdout_bytes
    assert raw.startswith(b"CLW")
    assert f"learned from at home for delta item {item_id}" in ok(home, "explain", step_id)
    assert f"item {item_id}" in ok(home, "learn", "history")
    (outcome,) = facts(home, "learn", "history")
    assert (outcome["item_id"], outcome["level"], outcome["trajectories"]) == (item_id, "deltas", 2)
    assert "learned" not in ok(home, "outbox", "drop", item_id, "--yes").replace(item_id, "")


def test_a_noised_delta_is_shown_with_what_hides_it_and_what_it_cost(home: EdgeHome) -> None:
    item_id, _ = learned(home, Level.PRIVATE_DELTAS)
    shown = ok(home, "outbox", "show", item_id)
    assert "each with noise of" in shown
    assert "the ledger counts 1 release of this model: epsilon" in shown
    assert "average" not in shown
    status = facts(home, "learn", "status")
    assert (status["releases"], status["budget"]) == (1, 8.0)
    assert "1 noised delta so far" in ok(home, "learn", "status")
    ok(home, "outbox", "drop", item_id, "--yes")
    assert facts(home, "learn", "status")["releases"] == 0, "what never left costs nothing"


def test_privacy_says_from_how_many_devices_on_noise_is_of_use(home: EdgeHome) -> None:
    with open_pool(home, writer=False) as pool:
        keep_cohort(pool, 5)
    said = ok(home, "privacy", "set", "private-deltas", "--yes")
    assert "no use with fewer than" in said
    assert "reckoned for a small adapter" in said
    assert "no use with fewer than" in ok(home, "privacy", "show")
    device = LearningDevice(home.folder, pool=open_pool(home, writer=False))
    device.runs.keep_task(learn_task(target_modules=("q_proj",)))
    device.close()
    assert "for what the server asked for last" in ok(home, "privacy", "show")


def test_the_picture_has_one_bar_a_layer_and_the_norm_of_all() -> None:
    norms = {f"model.layers.{layer}.self_attn.q_proj{A}": size for layer, size in ((10, 3.0), (2, 4.0), (0, 0.0))}
    assert picture(norms) == ["q_proj A ▁█▆ 5"]
    assert picture({}) == []


def test_what_went_into_a_secure_sum_is_shown_as_what_it_is(home: EdgeHome) -> None:
    device = LearningDevice(home.folder, pool=open_pool(home, writer=False))
    device.now_ms = wall_clock_ms()
    device.set_level(Level.PRIVATE_DELTAS)
    device.keep_many(2)
    task = learn_task(secure=True)
    device.runs.keep_task(task)
    device.schedule.tick()
    (item,) = device.outbox.list()
    assert device.outbox.next_items(1 << 20) == ([], False), "it leaves in no other way"
    masked = MaskedItems(device.pool, device.consent, clock=device.clock)
    summand = masked.summand(task.task_id)
    assert summand is not None
    masked.leaving(summand.item_id, b"masked bytes")
    assert device.ledger.spent("line").releases == 1
    device.close()
    shown = ok(home, "outbox", "show", item.item_id)
    assert "12 bytes, masked: only the sum of all devices can be read" in shown
    assert facts(home, "outbox", "show", item.item_id)["kind"] == "masked.v1"
    assert run(home, "outbox", "show", item.item_id, "--raw").stdout_bytes == b"masked bytes"
    assert "went into a secure sum" in ok(home, "outbox", "list")


@pytest.mark.parametrize("level", [Level.DELTAS, Level.PRIVATE_DELTAS])
def test_a_limit_at_which_a_device_begins_to_learn_is_shown_and_asked(home: EdgeHome, level: Level) -> None:
    ok(home, "privacy", "set", "full", "--yes")
    command = ["--home", str(home.folder), "privacy", "set", level, "--app", "agent"]
    refused = CliRunner().invoke(app, command, input="n\n")
    assert refused.exit_code == 1
    assert TEXTS[level] in refused.output
    assert facts(home, "privacy", "show")["limits"] == []
    assert CliRunner().invoke(app, command, input="y\n").exit_code == 0
    (limit,) = facts(home, "privacy", "show")["limits"]
    assert (limit["name"], limit["level"]) == ("agent", level)
    ok(home, "privacy", "set", "metrics", "--app", "agent")  # at which nothing is learned: nothing is asked

"""The three modes as their examples are run, against a real edge with the demo's model and a real server that learns.

Each makes two tasks' worth of trajectories, which is just one round: so every one of them was learned from when a round
more has taken four more.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_shared.records import Step
from demoworld.stage import Part, make_edge, make_server

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "scripts/demoworld/model"
EXAMPLES = ROOT / "examples"
TASKS = EXAMPLES / "blackbox_agent/tasks.jsonl"
ROUND = 4
SERVER: Mapping[str, Mapping[str, object]] = {
    "fleet": {"upload_every_s": 0.2},
    "reward": {"settle_s": 3.0},
    "train": {"batch_trajectories": ROUND, "updates_per_round": 1, "lr": 1e-4, "min_ess": 0.0, "min_kept": 0.0},
    "gate": {"required": False},
}
EDGE: Mapping[str, Mapping[str, object]] = {
    "privacy": {"hold_s": 0.0, "fill_every_s": 0.1},
    "node": {"poll_s": 0.2},
    "signals": {"scorers": [], "compute_reward": "exact"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Part, Part]]:
    folder = tmp_path_factory.mktemp("examples")
    server = make_server(folder, MODEL, settings=SERVER)
    edge = make_edge(folder, MODEL, name="edge", settings=EDGE)
    try:
        server.start()
        edge.start()
        edge.run("join", server.run("invite", "--json", expect_json=True)["invitation"], "--yes")
        edge.run("privacy", "set", "full", "--yes")
        yield server, edge
    finally:
        edge.stop()
        server.stop()


def example(edge: Part, folder: str, *command: str, **more: str) -> str:
    """Run a command in an example's folder, as its README says; what it printed."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
        "CLAWLOOP_EDGE_HOME": str(edge.home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    done = subprocess.run(command, cwd=EXAMPLES / folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def kept(edge: Part) -> list[Step]:
    with open_pool(EdgeHome(edge.home), writer=False) as pool:
        return [change.step for change in pool.changes(0, 10_000) if change.step is not None]


def learned(server: Part) -> list[str]:
    """The trajectories that rounds have consumed."""
    rounds = server.run("rounds", "list", "--json", expect_json=True)
    shown = [server.run("rounds", "show", each["round_id"], "--json", expect_json=True) for each in rounds]
    return [name for one in shown if one["round"]["state"] != "running" for name in one["lineage"]]


def until_learned(server: Part, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(learned(server)) < count:
        assert time.monotonic() < deadline, server.run("data", "stats")
        time.sleep(0.3)
    found = learned(server)
    assert len(found) == len(set(found)) == count


def two_tasks(tmp_path: Path) -> Path:
    """The first two of the example's tasks."""
    file = tmp_path / "two.jsonl"
    file.write_text("".join(TASKS.read_text().splitlines(keepends=True)[:2]))
    return file


def checked(steps: list[Step], *, groups: int, size: int) -> None:
    """Four trajectories in so many groups, all of which may be learned from."""
    assert all(step.trainable for step in steps), {step.untrainable for step in steps}
    assert len({step.trajectory_id for step in steps}) == ROUND
    assert len({step.group_id for step in steps}) == groups
    assert {step.group_size for step in steps} == {size}


def test_black_box_offline_a_rollouts_groups_are_learned_from(parts: tuple[Part, Part], tmp_path: Path) -> None:
    server, edge = parts
    typed = "clawloop-edge rollout --agent 'python agent.py' --tasks {} --n 2 --scorer rule:judge --out {} --json"
    said = example(edge, "blackbox_agent", *shlex.split(typed.format(two_tasks(tmp_path), tmp_path / "out")))
    report: Any = json.loads(said)
    assert (report["judged"], report["failed"]) == (ROUND, 0)
    checked(kept(edge), groups=2, size=2)
    until_learned(server, ROUND)


def test_a_program_for_claw_r1_is_learned_from_unchanged(parts: tuple[Part, Part], tmp_path: Path) -> None:
    server, edge = parts
    before = len(kept(edge))
    url = f"http://clawloop:{edge.token()}@127.0.0.1:{edge.port}"
    said = example(edge, "claw_r1_agent", "python", "agent.py", str(two_tasks(tmp_path)), "--n", "2", CLAW_R1_URL=url)
    assert "4 trajectories, mean reward" in said
    checked(kept(edge)[before:], groups=2, size=0)
    until_learned(server, 2 * ROUND)


def test_white_box_offline_what_a_program_drew_is_learned_from(parts: tuple[Part, Part], tmp_path: Path) -> None:
    server, edge = parts
    before = len(kept(edge))
    said = example(edge, "whitebox", "python", "program.py", str(MODEL), str(two_tasks(tmp_path)), "--n", "2")
    assert "4 trajectories, mean reward" in said
    checked(kept(edge)[before:], groups=2, size=2)
    until_learned(server, 3 * ROUND)


def test_the_black_box_agents_know_nothing_of_clawloop() -> None:
    for name in ("blackbox_agent/agent.py", "blackbox_agent/rule.py", "claw_r1_agent/agent.py"):
        text = (EXAMPLES / name).read_text()
        assert "import clawloop" not in text
        assert "from clawloop" not in text


def test_the_tasks_are_what_the_demo_world_makes_of_them() -> None:
    command = [sys.executable, str(EXAMPLES / "blackbox_agent/make_tasks.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert made.stdout == TASKS.read_text()

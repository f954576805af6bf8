"""`clawloop-edge rollout`: any program as agent, each in its own trajectory, whatever the others do."""

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clawloop_edge.cli.root import app
from clawloop_edge.errors import ScorerFailed
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.rollout.agent import Limits, Outcome, run_agent
from clawloop_edge.rollout.environment import agent_environment, base_environment
from clawloop_edge.rollout.journal import JOURNAL_NAME, Begun, Ending, Journal, Opened, Settings
from clawloop_edge.rollout.judging import hidden_fields, told_reward
from clawloop_edge.rollout.report import pass_at_k
from clawloop_edge.rollout.tasks import Task, read_tasks
from clawloop_edge.signals.settings import ExactSettings, SignalsSettings
from clawloop_shared.errors import ConfigError, StorageError
from clawloop_shared.records import Channel, Signal, Step
from demoworld.stage import Part, make_edge

AGENT = """
import http.client, json, os, sys, time
from urllib.parse import urlsplit
url = urlsplit(os.environ["OPENAI_BASE_URL"])
def ask(text):
    http_ = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    body = {"model": "any", "messages": [{"role": "user", "content": text}]}
    http_.request("POST", url.path + "/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = http_.getresponse()
    assert reply.status == 200, reply.read()
    return json.loads(reply.read())["choices"][0]["message"]["content"]
task, number = json.load(sys.stdin), int(os.environ["CLAWLOOP_RUN"].rpartition("-")[2])
"""
SAYS = AGENT + 'print(ask(task["prompt"]))\n'
TASK = {"id": "sum", "prompt": "2+2?", "answer": "4"}
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Part]:
    """A real edge that says "4" to everything."""
    folder = tmp_path_factory.mktemp("rollout")
    script = folder / "script.json"
    script.write_text(json.dumps(["4"] * 2000))
    found = make_edge(folder, tiny_model, name="edge", settings={"model": {"kind": "scripted", "script": str(script)}})
    try:
        found.start()
        yield found
    finally:
        found.stop()


def arguments(folder: Path, agent: str, *more: str, tasks: Any = (TASK,)) -> list[str]:
    """What is typed to roll out an agent of Python code; its folder is `folder`."""
    file, program = folder / "tasks.jsonl", folder / "agent.py"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in tasks))
    program.write_text(agent)
    command = f"{sys.executable} -S -E {program}"
    return ["rollout", "--agent", command, "--tasks", str(file), "--out", str(folder / "out"), *more]


def run(edge: Part, *typed: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(edge.home), *typed])


def report_of(folder: Path) -> Any:
    return json.loads((folder / "out/report.json").read_text())


def events(folder: Path) -> list[Any]:
    path = folder / "out" / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def kept(edge: Part, trajectory_id: str) -> tuple[list[Step], list[Signal]]:
    with open_pool(EdgeHome(edge.home), writer=False) as pool, pool.reading() as reading:
        steps = [kept.step for kept in reading.session_steps(trajectory_id)]
        return steps, reading.session_signals(trajectory_id)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_rollout_is_one_group_a_task_in_its_channel_with_its_rewards(edge: Part, tmp_path: Path) -> None:
    tasks = [TASK, {"id": "wrong", "prompt": "3+3?", "answer": "6", "trajectory_id": "x'; DROP TABLE steps; --"}]
    done = run(edge, *arguments(tmp_path, SAYS, "--n", "3", "--scorer", "exact", "--channel", "val", tasks=tasks))
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path)
    assert [(line["task"], line["judged"], line["passed"], line["mean_reward"]) for line in report["tasks"]] == [
        ("sum", 3, 3, 1.0),
        ("wrong", 3, 0, -1.0),
    ]
    assert (report["mean_reward"], report["pass_at_k"], report["failures"]) == (0.0, {"1": 0.5, "2": 0.5}, {})
    groups = []
    for line in report["tasks"]:
        found = [kept(edge, one["trajectory_id"]) for one in line["runs"]]
        assert [(step.group_size, step.channel) for steps, _ in found for step in steps] == [(3, Channel.VAL)] * 3
        assert [(s.source, s.value) for _, signals in found for s in signals] == [("exact", line["mean_reward"])] * 3
        groups.append({step.group_id for steps, _ in found for step in steps})
    assert all(len(group) == 1 for group in groups)
    assert groups[0] != groups[1]


def test_a_broken_line_is_named_by_its_number_and_the_others_go_on(edge: Part, tmp_path: Path) -> None:
    tasks = [TASK, "{no json", json.dumps([1]), '{"prompt": 5}', TASK, "", {"prompt": "again?", "answer": "4"}]
    done = run(edge, *arguments(tmp_path, SAYS, "--n", "1", "--scorer", "exact", tasks=tasks))
    assert isinstance(done.exception, ConfigError), done.output
    assert "4 lines of the tasks left out" in str(done.exception)
    for number in (2, 3, 4, 5):
        assert f"line {number} is left out" in " ".join(done.stderr.split())
    report = report_of(tmp_path)
    assert [(line["task"], line["passed"]) for line in report["tasks"]] == [("sum", 1), ("line 7", 1)]
    assert [line["line"] for line in report["broken_lines"]] == [2, 3, 4, 5]


def test_a_crashing_agent_fails_its_own_trajectory_only_and_never_by_a_zero(edge: Part, tmp_path: Path) -> None:
    agent = AGENT + 'print(ask(task["prompt"]))\nif number == 1: sys.exit(3)\n'
    done = run(edge, *arguments(tmp_path, agent, "--n", "3", "--scorer", "exact"))
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path)
    runs = report["tasks"][0]["runs"]
    assert [one["reward"] for one in runs] == [1.0, None, 1.0]
    assert (report["failures"], report["mean_reward"]) == ({"exit code 3": 1}, 1.0)
    assert report["pass_at_k"]["1"] == pytest.approx(2 / 3)
    steps, signals = kept(edge, runs[1]["trajectory_id"])
    assert (len(steps), signals) == (1, [])


def test_a_failed_run_gets_a_reward_only_where_one_was_chosen_for_it(edge: Part, tmp_path: Path) -> None:
    agent = AGENT + 'ask(task["prompt"])\nsys.exit(3 * (number == 1))\n'
    typed = arguments(tmp_path, agent, "--n", "2", "--scorer", "exact", "--failed-reward", "-0.5")
    assert run(edge, *typed).exit_code == 0
    _, signals = kept(edge, report_of(tmp_path)["tasks"][0]["runs"][1]["trajectory_id"])
    assert [(s.source, s.value) for s in signals] == [("rollout", -0.5)]


def test_an_agent_may_judge_itself_on_its_last_line_and_sees_the_answer_only_if_told(
    edge: Part, tmp_path: Path
) -> None:
    agent = AGENT + 'ask(task["prompt"])\nprint("hm")\nprint(json.dumps({"reward": 1 if "answer" in task else -1}))\n'
    for name, more, reward in (("hidden", [], -1.0), ("told", ["--tell-answer"], 1.0)):
        (tmp_path / name).mkdir()
        typed = arguments(tmp_path / name, agent, "--n", "2", "--scorer", "stdout", *more)
        assert run(edge, *typed).exit_code == 0
        assert report_of(tmp_path / name)["mean_reward"] == reward
    for line in (b"", b"[1]", b'{"reward": true}', b'{"reward": 1.5}', b'{"reward": NaN}', b'{"reward": "1"}'):
        assert told_reward(line) is None


def test_whatever_says_what_is_right_is_hidden_from_agents() -> None:
    hidden = hidden_fields(SignalsSettings(exact=ExactSettings(keys=("label.gold",))))
    fields = {
        "prompt": "?",
        "answer": 1,
        "answer_regex": "x",
        "reward_model": {"ground_truth": 1},
        "label": {"gold": 1},
    }
    assert Task(key="k", name="n", line=1, fields=fields).told(hidden) == {"prompt": "?"}


def test_sixty_four_agents_run_at_the_same_time(edge: Part, tmp_path: Path) -> None:
    tasks = [{"prompt": f"{n}?", "answer": "4"} for n in range(4)]
    began = time.monotonic()
    typed = arguments(tmp_path, SAYS, "--n", "16", "--parallel", "64", "--scorer", "exact", "--json", tasks=tasks)
    done = run(edge, *typed)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["runs"], report["passed"], report["failures"]) == (64, 64, {})
    assert time.monotonic() - began < 60


async def started(command: list[str], tmp_path: Path, **limits: Any) -> Outcome:
    task = tmp_path / "task.json"
    task.write_text("{}")
    environment = {"PATH": os.environ["PATH"]}
    return await run_agent(command, environment=environment, task=task, log=tmp_path / "log", limits=Limits(**limits))


async def test_a_hanging_agent_is_killed_with_its_children(tmp_path: Path) -> None:
    script = f'trap "" TERM; sleep 600 & echo $! > {tmp_path}/child; while :; do sleep 600; done'
    outcome = await started(["/bin/sh", "-c", script], tmp_path, timeout_s=0.5, grace_s=0.2)
    assert (outcome.ending, outcome.detail) == (Ending.TIMEOUT, "after 0.5 s")
    child = int((tmp_path / "child").read_text())
    until(lambda: gone(child))


async def test_what_an_agent_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    outcome = await started(["/bin/sh", "-c", f"sleep 600 & echo $! > {tmp_path}/child"], tmp_path, timeout_s=60)
    assert outcome.ending is Ending.FINISHED
    child = int((tmp_path / "child").read_text())
    until(lambda: gone(child))


async def test_output_is_bounded_private_and_its_last_line_is_known(tmp_path: Path) -> None:
    code = 'print("first"); print("x" * 99 + "\\n", end="") or [print("x" * 99) for _ in range(50000)]; print("last")'
    outcome = await started([sys.executable, "-S", "-c", code], tmp_path)
    log = tmp_path / "log"
    text = log.read_text()
    assert (outcome.ending, outcome.last_line) == (Ending.FINISHED, b"last")
    assert "first" in text
    assert "bytes left out" in text
    assert log.stat().st_size < 300_000
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit an address space")
async def test_an_agent_that_takes_too_much_memory_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "x = bytearray(1 << 30)"]
    assert (await started(command, tmp_path, memory_bytes=512 << 20)).ending is Ending.EXIT_CODE
    assert b"MemoryError" in (tmp_path / "log").read_bytes()


async def test_a_program_that_is_not_there_fails_alone(tmp_path: Path) -> None:
    outcome = await started(["/no/such/program"], tmp_path)
    assert (outcome.ending, outcome.detail) == (Ending.NOT_STARTED, "No such file or directory")


def test_an_agent_sees_little_of_its_owners_environment() -> None:
    owner = {"PATH": "/bin", "AWS_SECRET": "s", "CLAWLOOP_EDGE_PASSPHRASE": "p", "WANTED": "w"}
    base = base_environment(["WANTED"], owner)
    assert base == {"PATH": "/bin", "WANTED": "w"}
    for name in ("CLAWLOOP_EDGE_PASSPHRASE", "NOT_SET"):
        with pytest.raises(ConfigError, match=name):
            base_environment([name], owner)
    url = "http://127.0.0.1:1/t/g/v1"
    found = agent_environment(base, base_url=url, task=b"{}", task_file="f", run="r", seed=None)
    assert (found["OPENAI_BASE_URL"], found["ANTHROPIC_BASE_URL"]) == (url, "http://127.0.0.1:1/t/g")


def test_a_killed_rollout_goes_on_where_it_was_and_does_nothing_twice(edge: Part, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    agent = AGENT + f'while number >= 2 and not os.path.exists("{gate}"): time.sleep(0.02)\nprint(ask("2+2?"))\n'
    typed = arguments(tmp_path, agent, "--n", "4", "--scorer", "exact")
    command = [str(Path(sys.executable).parent / "clawloop-edge"), "--home", str(edge.home), *typed]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until(lambda: Counter(event["type"] for event in events(tmp_path))["scored"] == 2)
        until(lambda: Counter(event["type"] for event in events(tmp_path))["begun"] == 4)
        first.kill()
    with (tmp_path / "out" / JOURNAL_NAME).open("ab") as journal:
        journal.write(b'{"type":"ended","run":"torn')
    again = run(edge, *typed)
    assert isinstance(again.exception, ConfigError)
    assert "--resume" in str(again.exception)
    gate.touch()
    done = run(edge, *typed, "--resume")
    assert done.exit_code == 0, done.output
    assert (report_of(tmp_path)["runs"], report_of(tmp_path)["passed"]) == (4, 4)
    begun = [event["trajectory_id"] for event in events(tmp_path) if event["type"] == "begun"]
    assert len(begun) == 6, "two were begun anew"
    signals = [len(kept(edge, trajectory_id)[1]) for trajectory_id in begun]
    assert sorted(signals) == [0, 0, 1, 1, 1, 1]
    other = run(edge, *arguments(tmp_path, agent, "--n", "5", "--scorer", "exact", "--resume"))
    assert "n was 4 and is 5" in str(other.exception)


def test_a_reward_that_was_told_and_not_written_down_is_not_told_again(edge: Part, tmp_path: Path) -> None:
    typed = arguments(tmp_path, SAYS, "--n", "2", "--scorer", "exact")
    assert run(edge, *typed).exit_code == 0
    path = tmp_path / "out" / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"type":"scored"' not in line))
    done = run(edge, *typed, "--resume")
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path)
    assert (report["judged"], report["passed"]) == (2, 2)
    assert [len(kept(edge, one["trajectory_id"])[1]) for one in report["tasks"][0]["runs"]] == [1, 1]


def test_ctrl_c_ends_the_agents_and_says_how_to_go_on(edge: Part, tmp_path: Path) -> None:
    agent = AGENT + f'open("{tmp_path}/pid-%d" % number, "w").write(str(os.getpid()))\ntime.sleep(600)\n'
    typed = arguments(tmp_path, agent, "--n", "3", "--scorer", "stdout")
    command = [str(Path(sys.executable).parent / "clawloop-edge"), "--home", str(edge.home), *typed]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: all((tmp_path / f"pid-{n}").exists() and (tmp_path / f"pid-{n}").read_text() for n in range(3)))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" in said
    for number in range(3):
        assert gone(int((tmp_path / f"pid-{number}").read_text()))


def test_without_an_edge_nothing_is_begun(edge: Part, tmp_path: Path) -> None:
    away = EdgeHome(tmp_path / "home")
    made = CliRunner().invoke(app, ["--home", str(away.folder), "setup", "--script", "x", "--key-file", "--yes"])
    assert made.exit_code or not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["--home", str(away.folder), *arguments(tmp_path, SAYS)])
    assert done.exit_code != 0
    assert not (tmp_path / "out").exists()


def test_a_program_that_is_not_there_is_named_before_anything_is_run(edge: Part, tmp_path: Path) -> None:
    command = [
        "rollout",
        "--agent",
        "no-such-program x",
        "--tasks",
        str(tmp_path / "t"),
        "--out",
        str(tmp_path / "out"),
    ]
    failed = run(edge, *command)
    assert "no program no-such-program can be started" in str(failed.exception)
    assert not (tmp_path / "out").exists()


def test_a_rule_that_cannot_be_imported_is_found_before_anything_is_run(
    edge: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rule.py").write_text("def judge(case):\n    return len(case['text']) + case['metadata']['more']\n")
    failed = run(edge, *arguments(tmp_path, SAYS, "--scorer", "own_rule:jugde"))
    assert isinstance(failed.exception, ScorerFailed)
    assert "own_rule:jugde cannot be imported" in str(failed.exception)
    assert not (tmp_path / "out").exists()
    tasks = [{"prompt": "right", "more": 0}, {"prompt": "out of bounds", "more": 9}]
    done = run(edge, *arguments(tmp_path, SAYS, "--n", "2", "--scorer", "own_rule:judge", tasks=tasks))
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path)
    assert [line["passed"] for line in report["tasks"]] == [2, 0]
    assert [line["judged"] for line in report["tasks"]] == [2, 0], "a rule that fails gives no reward, never a zero"
    assert list(report["problems"].values()) == [2]
    assert report["pass_at_k"] == {"1": 1.0, "2": 1.0}


SETTINGS = Settings(agent="a", n=2, channel="train", scorers=[])


def test_a_torn_journal_opens_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    with Journal.open(tmp_path, Opened(rollout_id="r", settings=SETTINGS), resume=False) as journal:
        journal.append(Begun(run="one-0", trajectory_id="t", group="g"))
        with pytest.raises(ConfigError, match="another rollout"):
            Journal.open(tmp_path, Opened(rollout_id="r", settings=SETTINGS), resume=True)
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"type":"ended","run":"one')
    with Journal.open(tmp_path, Opened(rollout_id="other", settings=SETTINGS), resume=True) as journal:
        assert journal.opened.rollout_id == "r"
        assert [begun.run for begun in journal.left] == ["one-0"]
    assert path.read_bytes() == whole
    path.write_bytes(
        whole.replace(b'"begun"', b'"begin"') + b'{"type":"begun","run":"b","trajectory_id":"t","group":""}\n'
    )
    with pytest.raises(StorageError, match="line 2 is damaged"):
        Journal.open(tmp_path, Opened(rollout_id="r", settings=SETTINGS), resume=True)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_choices_of_k_runs_in_which_one_passed(case: tuple[int, int, int]) -> None:
    n, c, k = case
    choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c=c, k=k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_a_task_that_was_changed_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"id": 1, "prompt": "a"}\n{"id": "b", "prompt": "a"}\r\n')
    (one, two), broken = read_tasks(file)
    assert (one.name, two.name, broken) == ("1", "b", [])
    file.write_text('{"prompt": "a", "id": 1}\n{"id": "b", "prompt": "c"}\n')
    (same, other), _ = read_tasks(file)
    assert (same.key == one.key, other.key == two.key) == (True, False)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="has no task"):
        read_tasks(file)

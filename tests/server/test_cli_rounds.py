"""What the operator sees of rounds: while they run (`rounds watch`, `status`) and afterwards (`rounds explain`)."""

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from clawloop_server import cli
from clawloop_server.bases import Base
from clawloop_server.cli import explaining, watching
from clawloop_server.cli.explaining import Explained
from clawloop_server.home import Home
from clawloop_server.hub.admin import AdminPort
from clawloop_server.hub.status import DeviceCounts, Part, RoundCounts, Running, ServerStatus, write_running
from clawloop_server.hub.training import TrainerEar
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import Round, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.observing import Observer
from clawloop_server.vault.groups import TrajectoryState
from clawloop_server.vault.store import Lesson, Vault
from clawloop_shared.files import publish_secret
from clawloop_shared.signals import Account, Reward

from .made_deltas import make_delta, send_delta

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")  # typer's own import of click

UPDATES: list[dict[str, Any]] = [
    {"update": float(n), "reward": n / 10, "kept": 1 - n / 10, "kept_veto": 1.0, "kept_opsm": 1 - n / 10, "lr": 1e-5}
    | {"hinted_steps": 0.0}
    for n in range(4)
]
METRICS = {
    "verdict": "refused",
    "reward": 0.15,
    "evaluation": {"suite": "t@1", "episodes": 8, "reward": 0.25, "reward_before": 0.5, "standard_error": 0.05},
    "updates": UPDATES,
    "set_aside": {"a" * 64: "logprobs are not finite", "b" * 64: "logprobs are not finite"},
    "rejected_steps": {"too long": 2, "bad logprob": 5},
}


@pytest.fixture
def run(home: Home, keys: ServerKeys, base: Base, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs one command on the home; what it printed, or with another exit code what it complained about."""

    def run(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--home", str(home.folder)])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        return err if code else out

    return run


@pytest.fixture
def refused_round(home: Home, vault: Vault, base: Base) -> str:
    """The id of a round that the gate refused."""
    registry = Registry(vault.database, home.adapters)
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=12, steps=20)
    registry.finish_round(round_id, RoundState.REFUSED, metrics=METRICS, reason="reward is worse")
    return round_id


def explained(metrics: dict[str, Any], **fields: Any) -> Explained:
    round_ = Round(
        round_id="r1",
        line_id="l",
        state=RoundState.PASSED,
        base_version=0,
        version=None,
        trajectories=1,
        steps=1,
        metrics=metrics,
        reason="",
        started_ms=1,
        finished_ms=2,
        attempts=1,
    )
    found = Explained(round=round_, built_on=None, made=None, updates=metrics.get("updates", []), trajectories=[])
    return msgspec.structs.replace(found, **fields)


# afterwards


@pytest.mark.parametrize("width", [80, 120])
def test_an_explained_round_fits_the_terminal_and_says_what_was_done_left_out_and_judged(
    width: int, run: Callable[..., str], refused_round: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.cli.common._PIPE_WIDTH", width)
    out = run("rounds", "explain", refused_round)
    assert max(map(len, out.splitlines())) <= width
    words = " ".join(out.replace("│", " ").split())
    assert "reward is worse" in words
    assert "0.500 before, 0.250 after: -0.250, 95 % within -0.348 .. -0.152" in words
    assert "built on the model line as it is" in words
    assert "made no adapter" in words
    assert "reward 0 0.3 0 0.3 ▁▃▆█" in words
    assert "kept opsm 1 0.7 0.7 1 █▆▃▁" in words
    assert "stopped no token: veto" in words
    assert "0 throughout: hinted steps" in words
    assert "2 trajectories logprobs are not finite" in words
    assert "5 steps bad logprob 2 steps too long" in words
    shown = run("rounds", "show", refused_round)
    assert "95 % within" in shown
    assert "▁▃▆█" in shown


def test_as_json_a_round_is_told_whole(run: Callable[..., str], refused_round: str) -> None:
    told = json.loads(run("rounds", "explain", refused_round, "--json"))
    assert told["round"]["metrics"] == json.loads(json.dumps(METRICS))
    assert told["updates"] == UPDATES
    assert told["evaluation"]["standard_error"] == 0.05
    assert (told["built_on"], told["made"], told["trajectories"]) == (None, None, [])
    shown = json.loads(run("rounds", "show", refused_round, "--json"))
    assert shown["updates"] == told["updates"]


def test_a_round_that_runs_is_explained_by_what_its_trainer_told_so_far(
    run: Callable[..., str], home: Home, vault: Vault, base: Base
) -> None:
    registry = Registry(vault.database, home.adapters)
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=12, steps=20)
    observer = Observer(home.trainer, board=lambda folder, first: None)
    observer._round_id = round_id
    observer.updated({"update": 5.0, "round_update": 1.0, "reward": 0.25, "tokens": 10.0})
    observer.close()
    told = json.loads(run("rounds", "explain", round_id, "--json"))
    assert [(u["update"], u["reward"]) for u in told["updates"]] == [(5, 0.25)]
    assert "0.25" in run("rounds", "explain", round_id)
    assert "none yet" in run("rounds", "show", round_id)


def test_times_are_added_to_the_updates_that_they_are_of() -> None:
    timed = [{"event": "update", "round_id": "r", "at_ms": 1, "update": 1.0, "reward": 9.0, "tokens_per_s": 5.0}]
    kept = [{"update": 0.0, "reward": 0.1}, {"update": 1.0, "reward": 0.2}]
    assert explaining.with_times(kept, timed) == [kept[0], {"update": 1.0, "reward": 0.2, "tokens_per_s": 5.0}]
    assert explaining.with_times([], timed) == [{"update": 1.0, "reward": 9.0, "tokens_per_s": 5.0}]


def test_metrics_that_are_new_missing_or_not_finite_are_shown_as_far_as_they_go() -> None:
    updates: list[dict[str, Any]] = [
        {"update": 0.0, "zeal": 1.0, "ess": None},
        {"update": 1.0, "reward": 0.5, "odd": "text"},
        {"zeal": 3.0},
    ]
    rows = {row[0]: tuple(str(cell).strip() for cell in row[1:]) for row in explaining.metric_rows(updates, width=80)}
    assert rows == {"reward": ("0.5", "0.5", "0.5", "0.5", "▁"), "zeal": ("1", "3", "1", "3", "▁ █")}
    assert explaining.metric_rows([], width=80) == []


@pytest.mark.parametrize("metrics", [{}, {"evaluation": 3, "updates": []}, {"evaluation": {"suite": ""}}])
def test_a_round_of_which_little_was_kept_is_shown_all_the_same(metrics: dict[str, Any]) -> None:
    found = explained(metrics)
    assert explaining.round_facts(found)["evaluation"] == "not played"
    assert explaining.left_out_rows(found) == []
    assert explaining.lesson_rows(found)[1] == []


def test_a_trajectory_that_taught_nothing_says_so_beside_its_reward() -> None:
    account = Account([], Reward(1.0, 0.5))
    lessons = [Lesson(c * 64, "device-1", "", TrajectoryState.CONSUMED, account) for c in "ab"]
    found = explained({"set_aside": {"b" * 64: "not finite"}}, trajectories=lessons)
    columns, rows = explaining.lesson_rows(found)
    assert columns == ("trajectory", "device", "reward", "weight", "how it came about")
    assert [row[-1] for row in rows] == ["", "not learned from (not finite): "]
    grouped = msgspec.structs.replace(found, trajectories=[Lesson("a", "d", "g1", TrajectoryState.CONSUMED, account)])
    assert explaining.lesson_rows(grouped)[0][2] == "group"


def test_a_round_that_was_cut_off_says_how_often() -> None:
    found = explained({})
    found = msgspec.structs.replace(found, round=msgspec.structs.replace(found.round, attempts=3))
    assert explaining.round_facts(found)["updates"] == "0, cut off and gone on with 2 times"


def test_courses_are_as_wide_as_the_terminal_allows() -> None:
    updates = [{"update": float(n), "a_metric_with_a_long_name": n % 7} for n in range(100)]
    for width, drawn in ((40, 8), (80, 9), (90, 19), (200, 40)):
        (row,) = explaining.metric_rows(updates, width=width)
        assert len(str(row[-1])) == drawn


def test_that_nothing_was_kept_is_shown() -> None:
    updates = [{"kept": 0.0, "kept_veto": 0.0, "groups": 0.0}] * 2
    assert [row[0] for row in explaining.metric_rows(updates, width=80)] == ["kept", "kept veto"]
    assert (explaining.zeros(updates), explaining.passed_masks(updates)) == (["groups"], [])


def test_evaluations_say_how_sure_they_are() -> None:
    few = {"suite": "t", "episodes": 1, "reward": 1.0, "reward_before": 0.0, "standard_error": 0.0}
    assert "no spread to judge by; 1 episode of t" in str(
        explaining.round_facts(explained({"evaluation": few}))["evaluation"]
    )


@example([0.0, 5e-324])
@given(st.lists(st.one_of(st.none(), st.floats(-1e300, 1e300)), max_size=60))
def test_a_course_is_as_long_as_its_numbers_up_to_its_width(values: list[float | None]) -> None:
    drawn = explaining.sparkline(values, width=20)
    known = [value for value in values if value is not None]
    assert len(drawn) == (min(len(values), 20) if known else 0)
    if known and len(values) <= 20 and max(known) > min(known):
        assert drawn[values.index(max(known))] == "█"
        assert drawn[values.index(min(known))] == "▁"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_stay_short(value: float) -> None:
    assert len(explaining.number(value)) <= 9


# while they run


class Server:
    """An admin API in a thread, with an ear that a test speaks into."""

    def __init__(self, home: Home) -> None:
        self.ear, self._home = TrainerEar(), home
        self.status = ServerStatus(
            running=True,
            url="https://x",
            line_id="l",
            devices=DeviceCounts(joined=1, revoked=0),
            ready_trajectories=3,
            round_trajectories=64,
            rounds=RoundCounts(running="r1"),
            adapter=None,
            parts=[Part(name="trainer", pid=7, restarts=0)],
        )
        self._loop = asyncio.new_event_loop()
        self._admin = AdminPort(token="secret", status=self._status, trainer=self.ear)

    async def _status(self) -> ServerStatus:
        return msgspec.structs.replace(self.status, training=self.ear.training)

    def tell(self, *events: dict[str, Any]) -> None:
        for event in events:
            line = msgspec.json.encode({"round_id": "r1", **event})
            asyncio.run_coroutine_threadsafe(self._hear(line), self._loop).result()

    async def _hear(self, line: bytes) -> None:
        self.ear.hear(line)

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        publish_secret(self._home.admin_token, b"secret\n")
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            port = asyncio.run_coroutine_threadsafe(self._admin.start(0), self._loop).result()
            write_running(self._home, Running(pid=1, url="https://x", port=1, admin_port=port))
            yield self
        finally:
            self.stop()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._admin.stop(), self._loop).result()


@pytest.fixture
def server(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("clawloop_server.cli.watching._EVERY_S", 0.0)
    with Server(home).running() as server:
        yield server


BEGAN = {"event": "began", "trajectories": 12, "updates": 4}
FIRST = {"event": "update", "round_update": 1, "round_updates": 4, "trajectories": 3, "reward": 0.5, "tokens_per_s": 9}
ENDED = {"event": "round", "state": "passed", "trajectories": 12, "updates": 4, "seconds": 2.0, "version": 1}


def test_a_watcher_sees_the_round_under_way_and_what_follows_as_lines_of_json(
    run: Callable[..., str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tell({"event": "began", "round_id": "r0"}, {"event": "round", "round_id": "r0"}, BEGAN, FIRST)
    told = [{"event": "update", "round_update": 2}, ENDED]
    monkeypatch.setattr("time.sleep", lambda seconds: server.tell(told.pop(0)) if told else None)
    lines = [json.loads(line) for line in run("rounds", "watch", "--json", "--rounds", "1").splitlines()]
    assert [line["event"] for line in lines] == ["began", "update", "update", "round"]
    assert {line["round_id"] for line in lines} == {"r1"}


def test_a_watcher_without_a_terminal_reads_lines(
    run: Callable[..., str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tell(BEGAN, FIRST)
    monkeypatch.setattr("time.sleep", lambda seconds: server.tell(ENDED))
    assert run("rounds", "watch", "--rounds", "1").splitlines() == [
        "round r1 begins with 12 trajectories",
        "round r1 update 1 of 4 reward=0.5 tokens_per_s=9",
        "round r1 passed: 12 trajectories in 4 updates, 2.0 s, adapter 1",
    ]


def test_ctrl_c_ends_a_watcher_without_a_complaint(
    run: Callable[..., str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert run("rounds", "watch") == ""


def test_without_a_server_a_watcher_says_what_to_do(run: Callable[..., str], home: Home) -> None:
    error = run("rounds", "watch", code=1)
    assert f"no server runs on {home.folder}; start it with `clawloop-server serve`" in error
    assert error.count("\n") == 1


def test_a_server_that_goes_away_ends_a_watcher(
    run: Callable[..., str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tell(BEGAN)
    monkeypatch.setattr("time.sleep", lambda seconds: server.stop())
    assert "the server went away" in run("rounds", "watch", code=1)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_a_bar_and_what_the_guards_look_at(width: int, server: Server) -> None:
    guards = {"kept": 0.5, "ess": 0.9, "entropy": 5.125, "k3": None, "something_new": 1.0}
    server.tell(BEGAN, {**FIRST, **guards})
    training = server.ear.training
    assert training is not None
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(watching.picture(training, console))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= width
    assert "1/4 updates" in text
    assert "9 tokens/s" in text
    assert "3 of 12 trajectories  reward 0.5  kept 0.5  ess 0.9  entropy 5.12" in text
    assert "k3" not in text


def test_a_terminal_is_drawn_until_the_round_ended(
    run: Callable[..., str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = [BEGAN, FIRST, ENDED]
    monkeypatch.setattr("time.sleep", lambda seconds: server.tell(told.pop(0)))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out = run("rounds", "watch", "--rounds", "1")
    assert "round r1 passed: 12 trajectories in 4 updates, 2.0 s, adapter 1" in out


def test_status_shows_the_round_under_way_in_one_line(run: Callable[..., str], server: Server) -> None:
    server.tell(BEGAN, FIRST)
    assert "r1: update 1 of 4, 9 tokens/s, about 0.0 s left" in run("status")
    assert "update 1 of 4" in run("train", "status")
    assert json.loads(run("train", "status", "--json"))["training"]["done"] == 1
    server.ear.lost()
    assert "r1, cut off" in run("status")


def test_a_watcher_who_waits_reads_for_what(home: Home, server: Server) -> None:
    listener = watching.Listener(home)
    assert listener.waiting(listener.new()) == "no round is under way; the trainer loads the model"
    server.tell({"event": "ready", "missing": 61})
    heard = listener.new()
    assert [watching.event_line(event) for event in heard.events] == ["the trainer has loaded the model"]
    assert listener.waiting(heard) == "no round is under way: 3 of 64 trajectories are ready for the next"
    down = Part(name="trainer", pid=0, restarts=2, last_exit=1, wait_s=4.0, log="t.log")
    server.status = msgspec.structs.replace(server.status, parts=[down])
    assert "the trainer is down, tried again in 4 s" in listener.waiting(heard)


def test_a_joined_round_tells_of_each_contribution(
    run: Callable[..., str], home: Home, vault: Vault, base: Base, add_device: Callable[..., str]
) -> None:
    registry, devices = Registry(vault.database, home.adapters), sorted(add_device() for _ in range(3))
    ids = [send_delta(vault, device, make_delta(base.shape, base.line_id, seed=n)) for n, device in enumerate(devices)]
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=12, steps=20)
    shares = [
        {"source": "own", "device_id": "", "weight": 0.5, "staleness": 0, "norm": 2.0, "cut_to": 2.0, "left_out": ""},
        {"source": ids[0], "device_id": devices[0], "weight": 0.25, "staleness": 2, "norm": 9.0, "cut_to": 2.0}
        | {"cosine_own": 0.625, "left_out": "", "alike": ["x", "y"]},
        {"source": ids[1], "device_id": devices[1], "norm": 9.0, "cosine_own": -0.5, "left_out": "its cosine is -0.50"},
    ]
    account = {"method": "svd", "robust": "gate", "shares": shares, "norm": 1.5, "rho": 0.25, "tail": 0.125}
    account |= {"tail_worst": 0.5, "tail_worst_layer": "model.layers.0.mlp.up_proj", "devices": devices[:1]}
    account |= {"conflict": {devices[0]: {devices[1]: -0.75, devices[2]: 0.5}}, "notes": ["the tail is large"]}
    fates = {ids[0]: "", ids[1]: "its cosine is -0.50", ids[2]: "cannot be used: a number in it is infinite, or none"}
    vault.deltas.use(round_id, fates)
    registry.finish_round(round_id, RoundState.PASSED, metrics=METRICS | {"joined": account, "deltas": fates})

    shown = run("rounds", "explain", round_id)
    for told in (
        *("12 trajectories, 20 steps, 1 delta, 2 left out", "the server itself", "its cosine is -0.50"),
        *("it stands for 2 copies", "0.625", "-0.750", "12.5% of the update was lost", "50.0% in model.layers.0.mlp"),
        *("25.0% would have been wrong", "infinite", "the tail is large", "svd, defence gate"),
    ):
        assert told in shown, told
    assert "1 delta, 2 left out" in run("rounds", "list")
    assert "1 delta, 2 left out" in run("rounds", "show", round_id)
    facts = json.loads(run("rounds", "explain", round_id, "--json"))
    assert [d["state"] for d in facts["deltas"]] == ["joined", "left out", "left out"]
    assert facts["joined"]["tail"] == 0.125
    vault.delete_device(devices[0])
    assert "shredded" in run("rounds", "explain", round_id)


def test_what_waits_and_for_what_is_told(
    run: Callable[..., str], vault: Vault, base: Base, add_device: Callable[..., str]
) -> None:
    devices = [add_device() for _ in range(20)]
    with vault.database.write() as database:  # the other twelve let no delta out
        database.run_each("UPDATE devices SET level = 'deltas' WHERE device_id = ?", [[d] for d in devices[:8]])
    assert "waiting deltas" in run("status")
    send_delta(vault, devices[0], make_delta(base.shape, base.line_id))
    assert "1, of 1 of 5 devices for a round; they wait for other devices, [federate] min_devices is 2" in run("status")
    send_delta(vault, devices[1], make_delta(base.shape, base.line_id))
    shown = run("train", "status")
    assert "2, of 2 of 5 devices for a round, or in " in shown
    assert devices[1] in shown
    facts = json.loads(run("train", "status", "--json"))
    assert (facts["deltas"]["states"], len(facts["waiting_deltas"])) == ({"waiting": 2}, 2)
    assert "2 waiting" in run("data", "stats")
    for device in devices[2:5]:
        send_delta(vault, device, make_delta(base.shape, base.line_id))
    assert "5, of 5 of 5 devices for a round" in run("status")


def test_deleting_a_device_names_the_adapters_that_had_used_it(
    run: Callable[..., str], vault: Vault, device: str, base: Base
) -> None:
    send_delta(vault, device, make_delta(base.shape, base.line_id))
    shown = run("devices", "delete", device, "--yes")
    assert "0 steps, 0 signals and 1 delta" in shown
    assert "no adapter had used any of it" in shown

"""What the hub makes of what its trainer says: the round under way, the page for Prometheus, a line a round."""

import io
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from clawloop_server.cli import watching
from clawloop_server.hub.metrics import metrics_page
from clawloop_server.hub.status import CurrentAdapter, DeviceCounts, Part, RoundCounts, ServerStatus
from clawloop_server.hub.training import KEPT_EVENTS, TrainerEar, duration
from clawloop_server.trainer.observing import Observer

BEGAN = {"event": "began", "round_id": "r1", "at_ms": 5, "base_version": 3, "trajectories": 12, "updates": 4}
ENDED = {
    "event": "round",
    "round_id": "r1",
    "state": "refused",
    "reason": "it collapsed",
    "trajectories": 12,
    "updates": 4,
    "reward": 0.25,
    "seconds": 200.0,
    "set_aside": 1,
    "version": None,
}


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def update(number: int, **metrics: object) -> dict[str, object]:
    fields = {"event": "update", "round_id": "r1", "round_update": number, "round_updates": 4.0, "trajectories": 3.0}
    return fields | metrics


def tell(ear: TrainerEar, *events: dict[str, Any]) -> None:
    for event in events:
        ear.hear(msgspec.json.encode(event) + b"\n")


def test_how_long_a_round_will_take_follows_from_the_updates_that_were_heard() -> None:
    clock = Clock()
    ear = TrainerEar(clock=clock)
    assert not ear.after(0).ready
    tell(ear, {"event": "ready", "missing": 0})
    assert ear.after(0).ready
    tell(ear, BEGAN | {"done": 1, "learned": 3})  # it goes on after a crash
    resumed = ear.training
    assert resumed is not None
    assert (resumed.done, resumed.learned, resumed.left_s) == (1, 3, None)
    tell(ear, BEGAN)
    first = ear.training
    assert first is not None
    assert (first.done, first.updates, first.left_s, first.judging) == (0, 4, None, False)
    clock.now_s += 10
    tell(ear, update(2, tokens_per_s=1234.5))  # a round that goes on after a crash: update 1 was made before
    clock.now_s += 4
    now = ear.training
    assert now is not None
    assert (now.done, now.learned, now.elapsed_s, now.left_s) == (2, 3, 14.0, 16.0)
    assert now.summary == "r1: update 2 of 4, 1,234 tokens/s, about 16 s left"
    tell(ear, update(3), update(4))
    judged = ear.training
    assert judged is not None
    assert judged.summary == "r1: 4 updates made, the gate judges"
    tell(ear, ENDED)
    assert ear.training is None


def test_a_trainer_that_dies_leaves_no_round_under_way() -> None:
    ear = TrainerEar()
    tell(ear, BEGAN, update(1))
    ear.lost()
    assert ear.training is None
    assert not ear.after(0).ready
    tell(ear, update(2, reward=0.5))  # of no round that is known
    assert ear.training is None
    assert ear.update["reward"] == 0.5


def test_events_can_be_asked_for_from_a_number_on_and_are_bounded() -> None:
    ear = TrainerEar()
    tell(ear, BEGAN, update(1), update(2))
    assert [event["event"] for event in ear.after(0).events] == ["began", "update", "update"]
    heard = ear.after(2)
    assert ([event["round_update"] for event in heard.events], heard.last) == ([2], 3)
    assert ear.after(3).events == []
    assert ear.after(99).events == []
    tell(ear, *(update(n) for n in range(KEPT_EVENTS)))
    assert len(ear.after(0).events) == KEPT_EVENTS


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"a library prints something\n",
        b"[]\n",
        b'{"event": "began"}\n',
        b'{"event": "update"}\n',
        b'{"event": "update", "round_id": 7}\n',
        b'{"event": "began", "round_id": "r", "updates": "many", "trajectories": null}\n',
        b'{"event": "update", "round_id": "r1", "round_update": {}, "tokens_per_s": null}\n',
        b'{"event": "round", "round_id": "r", "seconds": "?", "reward": []}\n',
    ],
)
def test_no_line_breaks_the_ear(line: bytes) -> None:
    ear = TrainerEar()
    tell(ear, BEGAN)
    ear.hear(line)
    training = ear.training
    assert training is None or training.summary


def test_the_console_gets_a_line_when_a_round_begins_and_one_when_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tell(TrainerEar(), BEGAN, update(1), ENDED, {"event": "round", "round_id": "r2", "state": "passed", "version": 4})
    assert caplog.messages == [
        "round r1 begins with 12 trajectories",
        "round r1 refused: 12 trajectories in 4 updates, 3 min 20 s, reward +0.250, 1 set aside; it collapsed",
        "round r2 passed: 0 trajectories in 0 updates, 0.0 s, adapter 4",
    ]


def test_times_are_for_people() -> None:
    assert [duration(s) for s in (0.04, 9.96, 59.4, 59.6, 3599.0, 7500.0)] == [
        "0.0 s",
        "10.0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


def test_a_server_that_was_started_again_remembers_the_latest_update(tmp_path: Path) -> None:
    observer = Observer(tmp_path, board=lambda folder, first: None)
    observer.updated({"update": 8.0, "reward": 0.75})
    observer.close()
    ear = TrainerEar()
    ear.remember(tmp_path)
    assert (ear.update["reward"], ear.round, ear.training) == (0.75, {}, None)
    ear.remember(tmp_path / "nothing")
    assert ear.update == {}


STATUS = ServerStatus(
    running=True,
    url="https://x",
    line_id="l",
    devices=DeviceCounts(joined=2, revoked=1, online=1),
    ready_trajectories=40,
    round_trajectories=64,
    rounds=RoundCounts(passed=3, refused=2, failed=1),
    adapter=None,
)


def samples(page: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_prometheus_reads_rounds_the_latest_update_and_the_adapter() -> None:
    ear = TrainerEar()
    tell(
        ear, BEGAN, update(1, reward=0.5, ess=0.9, kept=None, something_new=7.5), ENDED, BEGAN, update(2, reward=0.625)
    )
    adapter = CurrentAdapter(version=4, round_id="r0", released_ms=9000, reward=0.75, reward_before=0.5, in_use=2)
    parts = [Part(name="trainer", pid=7, restarts=3), Part(name="bridge", pid=0, restarts=0)]
    status = msgspec.structs.replace(STATUS, adapter=adapter, parts=parts, training=ear.training)
    page = metrics_page(status, ear)
    found = samples(page)
    assert found["clawloop_rounds_total{passed}"] == 3
    assert found["clawloop_rounds_total{refused}"] == 2
    assert (found["clawloop_trajectories_ready"], found["clawloop_trajectories_missing"]) == (40, 24)
    assert found["clawloop_round_running"] == 1
    assert (found["clawloop_round_updates_made"], found["clawloop_round_updates"]) == (2, 4)
    assert found["clawloop_last_update{reward}"] == 0.625
    assert "clawloop_last_update{kept}" not in found
    assert (found["clawloop_last_round{reward}"], found["clawloop_last_round{seconds}"]) == (0.25, 200.0)
    assert (found["clawloop_adapter_version"], found["clawloop_adapter_in_use"]) == (4, 2)
    assert found["clawloop_adapter_evaluated{before}"] == 0.5
    assert found["clawloop_adapter_evaluated{after}"] == 0.75
    assert (found["clawloop_part_up{trainer}"], found["clawloop_part_up{bridge}"]) == (1, 0)
    assert found["clawloop_part_restarts_total{trainer}"] == 3
    assert b"r1" not in page
    assert b"r0" not in page


def test_a_server_that_never_trained_has_a_page_too() -> None:
    found = samples(metrics_page(STATUS, TrainerEar()))
    assert (found["clawloop_adapter_version"], found["clawloop_round_running"]) == (0, 0)
    assert not any(name.startswith("clawloop_last") for name in found)


def test_a_round_of_deltas_alone_is_told_as_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    began = BEGAN | {"trajectories": 0, "updates": 0, "deltas": 3}
    ear = TrainerEar()
    tell(ear, began)
    training = ear.training
    assert training is not None
    assert training.summary == "r1: joins 3 deltas, the gate judges"
    assert "joined and judged" in watching.guards_line(training)
    console = Console(file=io.StringIO(), width=100)
    console.print(watching.picture(training, console))
    assert "joins 3 deltas" in console.file.getvalue()  # type: ignore[attr-defined]
    tell(ear, {"event": "round", "round_id": "r1", "state": "passed", "version": 4, "deltas": 3, "seconds": 2.0})
    assert caplog.messages == [
        "round r1 begins with 0 trajectories, 3 deltas",
        "round r1 passed: 0 trajectories in 0 updates, 2.0 s, 3 deltas joined, adapter 4",
    ]
    assert watching.event_line(began).endswith("begins with 0 trajectories, 3 deltas")

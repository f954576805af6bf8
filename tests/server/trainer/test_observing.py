"""What training tells those who watch it: lines that survive a crash, and TensorBoard where it is installed."""

import builtins
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.trainer.observing import (
    MetricsFile,
    Observer,
    event_of,
    open_board,
    read_events,
    round_updates,
    second_file,
)


class Began(msgspec.Struct):
    round_id: str
    trajectories: int = 6


class Ended(msgspec.Struct):
    round_id: str
    verdict: str = "passed"
    reason: str = ""
    reward: float = 0.5
    version: int | None = 3


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def no_board(folder: Path, first_update: int) -> None:
    return None


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_round_is_a_line_for_its_start_each_update_and_its_end(tmp_path: Path) -> None:
    clock, told = Clock(), list[dict[str, Any]]()
    observer = Observer(tmp_path, emit=told.append, board=no_board, clock=clock)
    observer.began(Began("r1"))
    clock.now_s += 2
    observer.updated({"update": 7.0, "tokens": 50.0, "reward": 0.25, "round_id": 1.0})
    observer.updated({"update": 8.0, "tokens": 50.0, "seconds": 4.0, "tokens_per_s": 9.0})
    observer.ended(Ended("r1"))
    observer.close()
    found = lines(tmp_path)
    assert found == told
    assert [(line["event"], line["round_id"]) for line in found] == [
        ("began", "r1"),
        ("update", "r1"),
        ("update", "r1"),
        ("round", "r1"),
    ]
    assert (found[1]["seconds"], found[1]["tokens_per_s"], found[1]["reward"]) == (2.0, 25.0, 0.25)
    assert (found[2]["seconds"], found[2]["tokens_per_s"]) == (4.0, 9.0)
    assert (found[3]["verdict"], found[3]["version"]) == ("passed", 3)
    assert stat.S_IMODE((tmp_path / "metrics.jsonl").stat().st_mode) == 0o600


def test_metrics_that_nobody_knows_or_that_are_missing_are_no_error(tmp_path: Path) -> None:
    observer = Observer(tmp_path, board=no_board)
    observer.updated({"brand_new": 1.5, "not_finite": float("nan")})
    observer.updated({})
    observer.close()
    first, second = read_events(tmp_path)
    assert (first["brand_new"], first["not_finite"]) == (1.5, None)
    assert second["event"] == "update"


@given(torn=st.binary(max_size=200).filter(lambda data: b"\n" not in data), whole=st.integers(0, 3))
def test_what_a_crash_left_of_a_line_is_cut_off_and_the_rest_stays(
    tmp_path_factory: pytest.TempPathFactory, torn: bytes, whole: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    kept = b'{"event": "update", "round_id": "r", "update": 1}\n' * whole
    path.write_bytes(kept + torn)
    MetricsFile(path).close()
    assert path.read_bytes() == kept
    file = MetricsFile(path)
    file.append({"event": "round", "round_id": "r"})
    file.close()
    assert [event["event"] for event in read_events(path.parent)] == ["update"] * whole + ["round"]


def test_a_torn_line_longer_than_what_is_read_at_once_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    MetricsFile(path).close()
    assert path.read_bytes() == b"{}\n"


def test_the_file_never_grows_past_its_bound_and_the_one_before_it_stays_readable(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", max_bytes=400)
    for number in range(40):
        file.append({"event": "update", "round_id": "r", "update": number})
    file.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["metrics.1.jsonl", "metrics.jsonl"]
    assert max(sizes.values()) <= 400
    assert stat.S_IMODE(second_file(tmp_path / "metrics.jsonl").stat().st_mode) == 0o600
    numbers = [event["update"] for event in read_events(tmp_path)]
    assert numbers == list(range(40 - len(numbers), 40))


def test_an_update_that_was_made_again_after_a_crash_counts_once(tmp_path: Path) -> None:
    observer = Observer(tmp_path, board=no_board)
    observer.began(Began("other"))
    observer.updated({"update": 1.0, "reward": 0.9})
    for first, reward in ((1, 0.1), (2, 0.2), (2, 0.3), (3, 0.4)):
        observer.began(Began("mine"))
        observer.updated({"update": float(first), "reward": reward})
    observer.close()
    assert [event["reward"] for event in round_updates(tmp_path, "mine")] == [0.1, 0.3, 0.4]
    observer = Observer(tmp_path, board=no_board)
    observer.began(Began("mine"))  # from its beginning: something of it was forgotten meanwhile
    observer.updated({"update": 1.0, "reward": 0.5})
    observer.updated({"reward": 0.6})
    observer.close()
    assert [event["reward"] for event in round_updates(tmp_path, "mine")] == [0.5]


def test_what_is_no_event_is_passed_over(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'\x00\x00\n[1]\n{"event": 3}\n{"event": "round", "round_id": "r"}\n')
    assert [event["event"] for event in read_events(tmp_path)] == ["round"]
    assert event_of(b"not json") is None


class BrokenBoard:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        raise RuntimeError("the writer's thread has ended")

    def flush(self) -> None:
        raise RuntimeError

    def close(self) -> None:
        raise RuntimeError


def test_nothing_that_breaks_here_reaches_a_round(tmp_path: Path) -> None:
    def gone(event: dict[str, Any]) -> None:
        raise BrokenPipeError

    def make(folder: Path, first_update: int) -> BrokenBoard:
        boards.append(BrokenBoard())
        return boards[-1]

    boards = list[BrokenBoard]()
    observer = Observer(tmp_path, emit=gone, board=make)
    observer.began(Began("r1"))
    observer.updated({"update": 1.0, "reward": 0.25})
    observer.ended(Ended("r1"))
    assert [line["event"] for line in lines(tmp_path)] == ["began", "update", "round"]
    assert len(boards) == 1, "it is not tried again"
    observer.close()
    other = Observer(tmp_path, board=make)
    other._board = boards[0]
    other.close()


def test_a_disk_that_refuses_stops_no_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = list[Mapping[str, Any]]()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    observer = Observer(tmp_path, emit=told.append, board=no_board)
    observer.updated({"update": 1.0})
    observer.close()
    assert "training goes on unseen" in caplog.text
    assert not (tmp_path / "elsewhere").exists()
    assert len(told) == 1


def test_a_disk_that_is_full_stops_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(tmp_path, board=no_board)
    observer.updated({"update": 1.0})
    with monkeypatch.context() as patched:
        patched.setattr("os.write", lambda handle, data: 3)
        observer.updated({"update": 2.0})
    observer.updated({"update": 3.0})
    observer.close()
    assert "the disk is full" in caplog.text
    assert [event["update"] for event in read_events(tmp_path)] == [1.0]


def test_tensorboard_shows_metrics_over_updates_and_rounds(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 1):  # the second process makes update 1 again
        observer = Observer(tmp_path)
        observer.began(Began("r"))
        for update in (first, first + 1):
            observer.updated({"update": float(update), "reward": first + update / 10, "odd": float("inf")})
        observer.ended(Ended("r"))
        observer.close()
    accumulated = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in accumulated.Scalars("train/reward")] == [(0, 0.0), (1, 1.1), (2, 1.2)]
    assert "train/odd" not in accumulated.Tags()["scalars"]
    assert accumulated.Scalars("round/version")[-1].value == 3


def test_without_tensorboard_nothing_is_drawn_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert open_board(tmp_path / "tensorboard", 0) is None
    observer = Observer(tmp_path)
    observer.updated({"update": 0.0, "reward": 1.0})
    observer.close()
    assert not (tmp_path / "tensorboard").exists()
    assert not caplog.records
    assert len(list(read_events(tmp_path))) == 1


def test_old_event_files_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("clawloop_server.trainer.observing.MAX_BOARD_BYTES", 150)
    for age in range(3):
        path = tmp_path / f"events.out.tfevents.{age}"
        path.write_bytes(b"x" * 100)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    board = open_board(tmp_path, 0)
    assert board is not None
    board.close()
    assert [n for n in range(3) if (tmp_path / f"events.out.tfevents.{n}").exists()] == [0]

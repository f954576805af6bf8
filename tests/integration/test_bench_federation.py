"""scripts/bench-federation itself: a short run works, with a real server and real connections. No timing is judged."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from federation_bench import __main__ as bench
from federation_bench import joining
from federation_bench.report import Report, show

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_short_run_joins_devices_loses_nothing_and_is_as_near_as_can_be() -> None:
    command = [sys.executable, "-m", "federation_bench", "--quick", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    crowd = report["crowd"]
    assert crowd["active"] == crowd["devices"] == 6
    assert crowd["pick_ups"]["count"] == 6
    assert crowd["items"] == {"acknowledged": 12, "lost": 0, "doubled": 0, "waiting": 0}
    assert crowd["faults"] == crowd["refused"] == []
    assert {part["name"] for part in crowd["parts"]} >= {"hub", "superlink", "bridge"}
    assert all(part["rss_mib"] > 0 for part in crowd["parts"] if part["name"] != "guards")
    assert report["sizes"]["upload_bytes"] < 0.2 * report["sizes"]["raw_bytes"]
    assert abs(report["joining"]["error"] - report["joining"]["bound"]) < joining.CLOSE


def test_its_parts_without_a_server_are_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench-federation", "--quick", "--only", "joining", "sizes"])
    console = Console(file=io.StringIO(), width=150)
    report = bench._measure(bench._parser().parse_args(), tmp_path, console)
    assert report.sound
    assert report.joining is not None
    assert report.sizes is not None
    assert (report.sizes.steps, report.joining.devices) == (50, 8)
    assert report.sizes.ratio < 0.2
    show(report, console)
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "one layer joined, s (median of the rounds)" in shown
    assert "NOT sound" not in shown


def test_the_bound_is_what_an_svd_of_the_whole_matrix_says() -> None:
    found = joining.measure(devices=3, rank=4, outputs=40, inputs=30, keep=4, rounds=3)
    assert found.error == pytest.approx(found.bound, abs=joining.CLOSE)
    assert 0 < found.bound < 1
    assert found.best_s <= found.median_s <= max(found.wall_s)
    exact = joining.measure(devices=3, rank=4, outputs=40, inputs=30, keep=20, rounds=1)
    assert exact.error < joining.CLOSE, "three updates of rank 4, and the adapter before"


@pytest.mark.parametrize(
    "wrong", [{"error": 0.0}, {"error": 0.999}, {"told": 0.0}, {"error": 0.0, "told": 0.0}], ids=str
)
def test_a_result_that_is_better_or_worse_than_it_can_be_or_not_as_told_is_not_sound(wrong: dict[str, float]) -> None:
    good = joining.measure(devices=3, rank=4, outputs=40, inputs=30, keep=4, rounds=1)
    assert Report(machine="", load_average=0.0, joining=good).sound
    assert not Report(machine="", load_average=0.0, joining=msgspec.structs.replace(good, **wrong)).sound
    close = msgspec.structs.replace(good, error=good.error * 1.001)
    assert not Report(machine="", load_average=0.0, joining=close).sound, "a thousandth too much is too much"

"""scripts/bench-federation itself: a short run works, with a real server and real connections. No timing is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from federation_bench import joining
from federation_bench.report import Report

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
    assert report["joining"]["error"] < report["joining"]["bound"] * (1 + 1e-6)


def test_the_bound_is_what_an_svd_of_the_whole_matrix_says() -> None:
    found = joining.measure(devices=3, rank=4, outputs=40, inputs=30, keep=4, rounds=1)
    assert found.error == pytest.approx(found.bound, rel=1e-9)
    assert 0 < found.bound < 1
    exact = joining.measure(devices=3, rank=4, outputs=40, inputs=30, keep=12, rounds=1)
    assert exact.error < 1e-7


def test_a_result_that_is_better_than_it_can_be_is_not_sound() -> None:
    good = joining.measure(devices=3, rank=4, outputs=40, inputs=30, keep=4, rounds=1)
    cheat = joining.Joining(**{name: getattr(good, name) for name in good.__struct_fields__} | {"error": 0.0})
    assert Report(machine="", load_average=0.0, joining=good).sound
    assert not Report(machine="", load_average=0.0, joining=cheat).sound

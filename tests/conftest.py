"""How the whole suite runs: the longest files first, so that all workers end together, and none in another's way."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

from demoworld import stage

LONGEST_FIRST = (
    "integration/test_four_levels.py",
    "integration/test_wire_capture.py",
    "integration/test_mixed_load.py",
    "integration/test_chaos.py",
    "server/trainer/test_distributed.py",
    "server/trainer/test_resume.py",
    "integration/test_learn_check.py",
    "integration/test_loop.py",
    "server/trainer/test_trainer_process.py",
    "edge/learn/test_learn_process.py",
    "edge/learn/test_learn_gradients.py",
    "server/trainer/test_joining.py",
    "server/trainer/test_joining_lost.py",
    "server/trainer/test_joining_killed.py",
    "integration/test_bench_federation.py",
    "integration/test_federate_check.py",
    "integration/test_joining.py",
    "integration/test_flower.py",
    "integration/test_stock.py",
    "integration/test_forget.py",
    "integration/test_sdks.py",
    "integration/test_examples.py",
    "edge/pool/test_privacy_cli.py",
    "edge/test_engine_lasting.py",
    "edge/pool/test_backup.py",
    "integration/test_canaries.py",
    "server/trainer/test_trainer_quantised.py",
    "edge/gateway/test_trajectories.py",
    "edge/test_engine_grammar.py",
    "edge/test_upstream_exact.py",
    "edge/gateway/test_whitebox.py",
    "edge/gateway/test_bad_http.py",
    "edge/test_engine.py",
    "edge/test_engine_memory.py",
    "edge/test_rollout.py",
    "edge/gateway/test_bad_requests.py",
    "edge/test_curation_surface.py",
    "edge/test_signals_worker.py",
    "edge/test_signals_rule.py",
    "edge/test_signals_edge.py",
    "edge/test_client.py",
)
"""files of some ten seconds and more; a worker takes whole files, these in this order and then the others in theirs"""
LONGEST_S = 400
"""after which a test has failed: one that waits for what never comes must not hold up all the others"""
_HERE = Path(__file__).parent
_MOST_WORKERS = 4


def pytest_configure() -> None:
    """No test depends on how long one example takes, and no two workers give the same port to what they start."""
    settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    stage.PORTS = stage.PORTS[worker % _MOST_WORKERS :: _MOST_WORKERS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {_HERE / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """Leave the libraries' two million objects out of the garbage collections of every test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Break off a test that takes longer than any may."""

    def break_off(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} took more than {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, break_off)
    signal.alarm(LONGEST_S)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

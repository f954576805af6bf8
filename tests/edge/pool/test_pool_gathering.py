"""Steps that come one after another share a transaction, and nobody who waits for a write waits for that."""

from pathlib import Path

import pytest

from clawloop_edge.pool import writer
from clawloop_edge.pool.store import Pool

from .conftest import MakeKept


@pytest.fixture(autouse=True)
def _long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "GATHER_S", 30.0)


def test_a_step_waits_for_others_until_somebody_waits_for_a_write(pool: Pool, make_kept: MakeKept) -> None:
    first, second = pool.keep_step(make_kept()), pool.keep_step(make_kept())
    assert not first.done()
    pool.set_state("name", b"value").result(20)
    assert first.done()
    assert second.done()


def test_a_step_that_waits_is_kept_when_the_pool_is_closed(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    kept = make_kept()
    with Pool.open(tmp_path, key) as pool:
        future = pool.keep_step(kept)
        assert not future.done()
    future.result(0)
    with Pool.open(tmp_path, key) as pool:
        assert pool.step_ids() == [kept.step.step_id]


def test_a_step_waits_no_longer_than_it_may(pool: Pool, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "GATHER_S", 0.01)
    pool.keep_step(make_kept()).result(20)
    assert len(pool.step_ids()) == 1

"""kill -9 at any moment loses nothing that was acknowledged, and leaves a whole pool and never half a forgetting."""

from pathlib import Path

from clawloop_edge.pool.store import Pool
from pool_torture import WORKS, store_of, torturing

KILLS = 20


def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    with torturing(tmp_path / "home", seed=4) as torture:
        torture.run(KILLS, progress=lambda _: None)
        assert torture.problems == []
        assert torture.found.faults == 0
        assert [torture.found[work] for work in WORKS] == [KILLS // len(WORKS)] * len(WORKS)
        assert torture.found["kept"] > 0
        lose(tmp_path / "home", torture.acknowledged()[-1])
        torture.compare("nothing", "", whole=True)
        assert torture.found["lost"] == 1, "what is lost is found"
        assert torture.found["corrupt"] > 0


def lose(home: Path, step_id: str) -> None:
    """Take a step out of the pool behind its back."""
    with Pool.open(home, store_of(home)) as pool:
        pool.submit(lambda db: db.execute("DELETE FROM steps WHERE step_id = ?", (step_id,))).result()

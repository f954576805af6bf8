"""What a round is not published with."""

from clawloop_server.trainer.guards import unhealthy
from clawloop_server.trainer.settings import TrainSettings


def test_a_round_that_could_use_little_is_not_healthy() -> None:
    def said(**metrics: float) -> str:
        return unhealthy([metrics | {"trajectories": 4.0}], TrainSettings())

    assert said(ess=0.9, kept=0.9) == ""
    assert "effective sample size 0.20" in said(ess=0.2, kept=0.9)
    assert "0.10 of the tokens" in said(ess=0.9, kept=0.1)


def test_a_round_that_learned_from_nothing_is_not_healthy() -> None:
    assert "no trajectory" in unhealthy([], TrainSettings())
    assert "no trajectory" in unhealthy([{"trajectories": 0.0, "ess": 0.0, "kept": 0.0}], TrainSettings())

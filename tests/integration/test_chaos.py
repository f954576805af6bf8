"""Half a minute of `scripts/chaos`: children, server and edges are killed at random, and nothing is lost or doubled."""

from pathlib import Path

import fleet_chaos


def test_every_acknowledged_step_arrives_exactly_once_whoever_is_killed(tmp_path: Path) -> None:
    report = fleet_chaos.run(tmp_path, seconds=30.0, seed=7, edges=2, least=3)
    assert report.ok, report
    assert sum(report.kills.values()) >= 3, report
    assert report.acknowledged <= report.in_pools == report.in_vault

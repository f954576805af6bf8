"""The privacy ledger: what releases cost together, that none goes uncounted, and when learning is of no use."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from clawloop_edge.cli.root import app
from clawloop_edge.config import EdgeConfig, PoolConfig, PrivacyConfig
from clawloop_edge.errors import ConsentError, PoolError
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.counting import EntryState, commit_in, give_back_in
from clawloop_edge.privacy.ledger import (
    Ledger,
    Noise,
    epsilon_of,
    keep_cohort,
    part_used,
    read_cohort,
    sigma_for,
    useful,
)
from clawloop_shared import config

KEY = KnownKey.of(bytes(range(32)))
RESERVE_FOR_EVER = """
import sys
from functools import partial
from pathlib import Path
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.counting import commit_in
from clawloop_edge.privacy.ledger import Ledger
pool = Pool.open(Path(sys.argv[1]), KnownKey.of(bytes(range(32))))
ledger = Ledger(pool, epsilon=1e9)
while True:
    reserve = partial(ledger.reserve_in, line="line", sigma=1, clip=1, round_id="r")
    entry = pool.submit(reserve).result()
    print(entry, flush=True)
    pool.submit(partial(commit_in, entry_id=entry)).result()
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """An empty open pool."""
    with Pool.open(tmp_path, KEY) as opened:
        yield opened


@pytest.mark.parametrize(
    ("sigma", "releases", "epsilon", "digits"),
    [(2, 1, 4.4, 1), (2, 10, 17.9, 1), (2, 50, 54, 0), (8, 1, 0.93, 2), (8, 10, 3.3, 1), (8, 50, 8.6, 1)],
)
def test_releases_cost_what_the_research_measured_for_half_their_distance(
    sigma: float, releases: int, epsilon: float, digits: int
) -> None:
    assert round(epsilon_of([sigma] * releases), digits) == epsilon


def test_epsilon_holds_between_any_two_contents_that_a_device_may_have(pool: Pool) -> None:
    """Opposite deltas at the clip, told apart by the best test there is: a threshold on the line between them."""
    clip, sigma = 0.7, sigma_for(2.0, rounds=1)
    epsilon = epsilon_of([sigma])
    one = NormalDist(clip, sigma * clip)
    other = NormalDist(-clip, sigma * clip)
    worst = 0.0
    for at in (clip * (step / 100) for step in range(-3000, 3000)):
        worst = max(worst, (1 - one.cdf(at)) - math.exp(epsilon) * (1 - other.cdf(at)))
    assert worst <= 1e-5 * (1 + 1e-6)
    assert worst > 0.9e-5, "no more noise than it takes"
    assert epsilon == pytest.approx(2.0, rel=1e-6)


def test_unlike_releases_cost_what_a_numerical_composition_of_them_says() -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    sigmas = [2.0, 3.5, 8.0]
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma in sigmas:
        accountant.compose(GaussianDpEvent(sigma / 2))
    assert epsilon_of(sigmas) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.3, 50), min_size=1, max_size=30))
def test_one_more_release_always_costs_more(sigmas: list[float]) -> None:
    assert 0 < epsilon_of(sigmas[:1]) <= epsilon_of(sigmas) < epsilon_of([*sigmas, 50.0])


def reserve(pool: Pool, ledger: Ledger, line: str, **facts: Any) -> str:
    return pool.submit(partial(ledger.reserve_in, line=line, **facts)).result()


def commit(pool: Pool, entry_id: str) -> None:
    pool.submit(partial(commit_in, entry_id=entry_id)).result()


def give_back(pool: Pool, entry_id: str) -> bool:
    return pool.submit(partial(give_back_in, entry_id=entry_id)).result()


def test_no_release_costs_nothing(pool: Pool) -> None:
    ledger = Ledger(pool)
    assert (ledger.spent("line").epsilon, ledger.spent_all().releases, ledger.lines()) == (0.0, 0, {})


def test_a_reserved_release_counts_until_it_is_given_back(pool: Pool) -> None:
    ledger = Ledger(pool)
    entry = reserve(pool, ledger, "line", sigma=8, clip=0.5, round_id="7")
    assert ledger.spent("line").epsilon == pytest.approx(0.926, abs=0.001)
    (kept,) = ledger.entries()
    assert (kept.model_line, kept.mechanism, kept.sigma, kept.clip, kept.round_id, kept.delta) == (
        "line", "gaussian", 8, 0.5, "7", 1e-5,
    )  # fmt: skip
    assert give_back(pool, entry)
    assert ledger.spent("line").releases == 0
    with pytest.raises(PoolError, match="is not counted by the ledger, so it may not leave"):
        commit(pool, entry)


def test_a_release_that_left_is_never_taken_off_the_count(pool: Pool) -> None:
    ledger = Ledger(pool)
    entry = reserve(pool, ledger, "line", sigma=4, clip=1, round_id="7")
    commit(pool, entry)
    commit(pool, entry)
    assert not give_back(pool, entry)
    assert not give_back(pool, "nobody")
    with pytest.raises(PoolError, match="is not counted"):
        commit(pool, "nobody")
    assert ledger.spent("line").releases == 1


def test_no_release_passes_the_budget(pool: Pool) -> None:
    ledger = Ledger(pool, epsilon=8.0)
    sigma = sigma_for(8.0, rounds=5)
    for round_id in range(5):
        ledger.check("line", sigma=sigma, clip=1)
        reserve(pool, ledger, "line", sigma=sigma, clip=1, round_id=str(round_id))
    for ask in (
        lambda: ledger.check("line", sigma=sigma, clip=1),
        lambda: reserve(pool, ledger, "line", sigma=sigma, clip=1, round_id="5"),
    ):
        with pytest.raises(ConsentError, match=r"from 8\.00 to 8\.9\d, over the budget of 8"):
            ask()
    assert ledger.spent("line").epsilon == pytest.approx(8)


def test_the_part_that_is_used_grows_by_the_same_with_each_release(pool: Pool) -> None:
    ledger = Ledger(pool, epsilon=8.0)
    used = [part_used(ledger.spent("line"), 8.0)]
    for round_id in range(4):
        reserve(pool, ledger, "line", sigma=sigma_for(8.0, rounds=4), clip=1, round_id=str(round_id))
        used.append(part_used(ledger.spent("line"), 8.0))
    assert used == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_another_line_has_its_own_budget_and_the_sum_over_lines_is_shown(pool: Pool) -> None:
    ledger = Ledger(pool, epsilon=5.0)
    for line in ("one", "other"):
        reserve(pool, ledger, line, sigma=2, clip=1, round_id="1")
    assert {line: spent.releases for line, spent in ledger.lines().items()} == {"one": 1, "other": 1}
    assert ledger.spent("one").epsilon < 5 < ledger.spent_all().epsilon == pytest.approx(epsilon_of([2, 2]))


@pytest.mark.parametrize(
    ("sigma", "clip"), [(0, 1), (0.001, 1), (-1, 1), (math.inf, 1), (math.nan, 1), (1, 0), (1, math.inf)]
)
def test_a_release_without_noise_or_bound_is_refused(pool: Pool, sigma: float, clip: float) -> None:
    with pytest.raises(ConsentError, match="is not private"):
        reserve(pool, Ledger(pool), "line", sigma=sigma, clip=clip, round_id="1")


def test_noise_that_drowns_everything_costs_nothing(pool: Pool) -> None:
    ledger = Ledger(pool)
    reserve(pool, ledger, "line", sigma=1e200, clip=1, round_id="1")
    assert (ledger.spent("line").epsilon, part_used(ledger.spent("line"), 8.0)) == (0.0, 0.0)


def test_a_mechanism_that_cannot_be_accounted_for_is_refused(pool: Pool) -> None:
    with pytest.raises(ConsentError, match="'laplace' cannot be accounted for"):
        reserve(pool, Ledger(pool), "line", sigma=1, clip=1, round_id="1", mechanism="laplace")


def test_two_ledgers_of_one_pool_together_stay_in_the_budget(tmp_path: Path) -> None:
    with Pool.open(tmp_path, KEY) as one, Pool.open(tmp_path, KEY) as other:
        reserve(one, Ledger(one, epsilon=5.0), "line", sigma=2, clip=1, round_id="1")
        with pytest.raises(ConsentError, match="over the budget"):
            reserve(other, Ledger(other, epsilon=5.0), "line", sigma=2, clip=1, round_id="1")


def test_the_ledger_is_in_the_chain_and_a_missing_entry_is_seen(pool: Pool) -> None:
    ledger = Ledger(pool)
    entry = reserve(pool, ledger, "line", sigma=4, clip=1, round_id="1")
    commit(pool, entry)
    assert pool.verify().ok
    pool.submit(lambda database: database.conn.execute("DELETE FROM ledger").rowcount).result()
    assert any("ledger" in problem and entry in problem for problem in pool.verify().problems)


def test_a_killed_edge_leaves_no_release_uncounted(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for kill in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", RESERVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(3 + kill):
            acknowledged.append(child.stdout.readline().strip())
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += child.stdout.read().split()  # printed before it died
        child.wait()
        child.stdout.close()
    with Pool.open(tmp_path, KEY) as pool:
        assert {entry.entry_id for entry in Ledger(pool).entries()} >= set(acknowledged)
        assert pool.verify().ok


def test_entries_survive_being_opened_again(tmp_path: Path) -> None:
    with Pool.open(tmp_path, KEY) as pool:
        entry = reserve(pool, Ledger(pool), "line", sigma=2, clip=1, round_id="1")
    with Pool.open(tmp_path, KEY) as pool:
        assert [kept.entry_id for kept in Ledger(pool).entries()] == [entry]
        row = pool.submit(lambda database: database.conn.execute("SELECT state FROM ledger").fetchone()).result()
        assert row == (EntryState.RESERVED,)


@pytest.mark.parametrize(
    ("devices", "rounds", "parameters", "snr"),
    [(40, 20, 10**4, 0.33), (200, 50, 10**4, 1.7), (200, 50, 10**5, 0.53), (200, 50, 10**6, 0.17)],
)
def test_usefulness_of_noise_added_once_is_that_of_the_research_for_half_as_many(
    devices: int, rounds: int, parameters: int, snr: float
) -> None:
    found = useful(devices, parameters, rounds=rounds, epsilon=8, noise=Noise.TOGETHER)
    assert found.snr == pytest.approx(snr, rel=0.03)
    assert found.useful == (snr >= 1)


def test_few_devices_are_told_that_they_learn_nothing() -> None:
    found = useful(3, 10_000, rounds=50, epsilon=8, noise=Noise.TOGETHER)
    assert not found.useful
    assert found.devices == 120
    assert found.words == (
        "with 3 devices and a budget of epsilon 8, noise hides what 10,000 weights learn: "
        "no use with fewer than ~120 devices"
    )


def test_devices_that_trust_nobody_need_many_more_of_them() -> None:
    alone, together = useful(100, 10_000), useful(100, 10_000, noise=Noise.TOGETHER)
    assert alone.snr == pytest.approx(together.snr / 10)
    assert (alone.devices, useful(14_000, 10_000).useful, useful(14_800, 10_000).useful) == (14_000, False, True)


def test_advice_waits_for_the_servers_word_on_how_many_there_are(pool: Pool) -> None:
    ledger = Ledger(pool)
    assert (read_cohort(pool), ledger.advice(10_000)) == (0, "")
    keep_cohort(pool, 3)
    assert ledger.advice(10_000).startswith("with 3 devices and a budget of epsilon 8, noise hides")


def test_the_budget_is_shown_in_plain_words(tmp_path: Path) -> None:
    home = EdgeHome(tmp_path)
    config.save(home.config_file, EdgeConfig(pool=PoolConfig(key="file"), privacy=PrivacyConfig(epsilon=4.0)))
    empty = CliRunner().invoke(app, ["--home", str(tmp_path), "privacy", "budget"])
    assert empty.exit_code == 0, empty.output
    assert "nothing noised has left: no privacy is spent" in empty.output
    assert "no server has said yet how many devices learn together" in empty.output
    with open_pool(home, writer=False) as pool:
        reserve(pool, Ledger(pool), "one", sigma=8, clip=1, round_id="1")
        reserve(pool, Ledger(pool), "other", sigma=8, clip=1, round_id="1")
        keep_cohort(pool, 3)
    shown = CliRunner().invoke(app, ["--home", str(tmp_path), "privacy", "budget"])
    assert "all together" in shown.output
    assert "no use with fewer than" in shown.output.replace("\n", " ")
    facts = json.loads(CliRunner().invoke(app, ["--home", str(tmp_path), "privacy", "budget", "--json"]).output)
    assert facts["lines"]["one"] == {"releases": 1, "epsilon": pytest.approx(0.926, abs=0.001), "delta": 1e-5}
    assert (facts["epsilon"], facts["cohort"], facts["together"]["releases"]) == (4.0, 3, 2)

"""scripts/federate-check itself: a slice of each part, and its verdicts can fail."""

import math
from pathlib import Path

import msgspec
import pytest
import torch

from clawloop_server.aggregate.updates import Contribution, Factors
from federate_check.attacked import DEFENCES, PLAIN, Attacked, attacked
from federate_check.attacks import ATTACKS, Known, norm_of
from federate_check.home import Home
from federate_check.together import BATCH, OTHER, OneWorld, TwoWorlds, search, two_sides
from federate_check.verdict import judge
from learn_check import world
from learn_check.runs import make_models, models_of


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federate")
    return models_of(folder, make_models(folder, 0)) / "device"


@pytest.mark.slow
def test_two_devices_of_ten_that_send_the_opposite_are_left_out_and_harm_without_defence(device: Path) -> None:
    found = attacked(device, seed=0, attacks=["flip-10"], devices=10)
    assert found.counted == {"flip-10": 0}
    missed = [verdict for verdict in judge([found], [], []) if not verdict.holds]
    assert not missed


@pytest.mark.slow
def test_the_two_worlds_of_six_devices_are_found_from_their_deltas(device: Path) -> None:
    found = search(Home(device, batch=BATCH), two_sides(), seed=0, rounds=12, until_found=True)
    assert [sorted(cohort.devices) for cohort in found.cohorts] == [
        ["device-0", "device-2", "device-4"],
        ["device-1", "device-3", "device-5"],
    ]
    assert found.cohorts[0].since < len(found.versions) - 1
    assert found.cosines[-1][0] > 0.2
    assert found.cosines[-1][1] < -0.1


def test_what_a_device_learns_is_beside_what_it_serves_and_leaves_that_alone(device: Path) -> None:
    home = Home(device, batch=8)
    home.serve({})
    before = home.score(world.HELD_OUT[:4])
    learned = home.learn(world.TRAIN, updates=2, seed=1, drawn=5)
    assert home.score(world.HELD_OUT[:4]) == before
    again = home.learn(world.TRAIN, updates=2, seed=1, drawn=5)
    other = home.learn(OTHER, updates=2, seed=1, drawn=5)
    assert all(torch.equal(learned[path].b, again[path].b) for path in learned)
    assert not all(torch.equal(learned[path].b, other[path].b) for path in learned)
    assert 0 < norm_of(learned) < 10


def test_the_other_world_agrees_in_no_kind() -> None:
    for kind in range(world.KINDS):
        paid = set()
        for tool in range(world.TOOLS):
            call = world.ids_of("<call>", f"tool{tool}", "thing3", "<end>")
            value = world.WORDS[world.result_of(call)[1]]
            turns = [call, world.ids_of("<ans>", value, "<end>")]
            paid |= {(tool, other) for other in (False, True) if world.reward(world.Task(kind, 3, other), turns)}
        assert len(paid) == 2
        assert len({tool for tool, _ in paid}) == 2


def test_every_attack_is_one() -> None:
    update = {"q": Factors(torch.ones(4, 2), torch.ones(2, 3))}
    harm = [{"q": Factors(-torch.ones(4, 2), torch.ones(2, 3))}] * 2
    turned = [Contribution(f"delta-{n}", f"device-{n}", update, weight=8.0) for n in range(2)]
    made = {name: attack(turned, Known(harm, harm[0])) for name, attack in ATTACKS.items()}
    assert math.isnan(float(made["nan"][0].update["q"].b.sum()))
    assert norm_of(made["huge"][0].update) == pytest.approx(100 * norm_of(update))
    assert norm_of(made["flip-10"][0].update) == pytest.approx(10 * norm_of(update))
    assert len({c.device_id for c in made["sybils-100"]}) == 100
    assert {c.weight for c in made["harm"]} == {1e6}
    assert made["misfit"][0].update["q"].b.shape == (3, 2)


FOUND = dict.fromkeys([*DEFENCES, PLAIN], 0.7)
ATTACKED = Attacked(
    seed=0,
    before=0.5,
    free=FOUND,
    found={"flip-10": {**FOUND, "none": 0.3}},
    counted={"flip-10": 0},
    free_first=0.7,
    first={"flip-10": 0.68, "harm": 0.3},
    few={"flip-10": 0.3, "harm": 0.3},
)
ONE = OneWorld(
    seed=0, before=0.2, deltas=0.85, trajectories=0.9, pooled=0.88, alone=0.5, curve=[0.85], rho=0.1, tail=0.1
)
TWO = TwoWorlds(
    seed=0,
    shared=(0.6, 0.3),
    apart=(0.85, 0.84),
    pooled=(0.88, 0.87),
    cohorts=[["device-0", "device-2", "device-4"], ["device-1", "device-3", "device-5"]],
    found_after=8,
    why=["because"],
    cosines=[(0.5, -0.4)],
)


def failed(*, attacks: Attacked = ATTACKED, one: OneWorld = ONE, two: TwoWorlds = TWO) -> list[str]:
    return [verdict.demand for verdict in judge([attacks], [one], [two]) if not verdict.holds]


def test_what_does_all_that_is_demanded_passes() -> None:
    assert not failed()


@pytest.mark.parametrize(
    ("changed", "demand"),
    [
        ({"found": {"flip-10": {**FOUND, "gate": 0.64, "none": 0.3}}}, "flip-10: with gate within 0.05"),
        ({"found": {"flip-10": FOUND}}, "flip-10: succeeds with none"),
        ({"before": 0.65}, "a cycle without attack gains"),
        ({"first": {"flip-10": 0.6}}, "flip-10: with the server's buffer within 0.05"),
        ({"few": {"flip-10": 0.65}}, "flip-10: succeeds with one honest device"),
    ],
)
def test_an_attack_that_works_and_one_that_never_does_fail(changed: dict[str, object], demand: str) -> None:
    (missed,) = failed(attacks=msgspec.structs.replace(ATTACKED, **changed))
    assert missed.startswith(demand)


@pytest.mark.parametrize(
    ("changed", "demand"),
    [
        ({"deltas": 0.82}, "six devices' deltas"),
        ({"trajectories": 0.8}, "six devices' trajectories"),
        ({"alone": 0.7}, "one of them alone does not"),
    ],
)
def test_devices_that_do_not_learn_together_fail(changed: dict[str, object], demand: str) -> None:
    (missed,) = failed(one=msgspec.structs.replace(ONE, **changed))
    assert missed.startswith(demand)


@pytest.mark.parametrize(
    ("changed", "demand"),
    [
        ({"shared": (0.8, 0.8)}, "one adapter for both fails"),
        ({"cohorts": []}, "the cohorts that are found"),
        ({"apart": (0.85, 0.6)}, "apart, the other comes within"),
    ],
)
def test_worlds_that_stay_mixed_fail(changed: dict[str, object], demand: str) -> None:
    (missed,) = failed(two=msgspec.structs.replace(TWO, **changed))
    assert missed.startswith(demand)


def test_a_round_that_is_refused_withstood_the_attack() -> None:
    found: dict[str, dict[str, float | None]] = {"flip-10": {**FOUND, "gate": None, "none": 0.3}}
    assert not failed(attacks=msgspec.structs.replace(ATTACKED, found=found))

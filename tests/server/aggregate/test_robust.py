"""Rules on Gram matrices, and the attacks of the threat model with numbers: the cosine to the truth that is left."""

import math

import pytest
import torch
from torch import Tensor

from clawloop_server.aggregate import robust
from clawloop_server.aggregate.round import Joined, JoinRefused, join
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import OWN, Contribution, Factors, Update

from .aggregates import dense, factors, near, sent

TRUTH: Update = {"q": factors(1, 24, 16, 2), "v": factors(2, 12, 16, 2)}
NONE = FederateSettings(robust="mean", max_norm=math.inf, duplicate_cosine=2.0)


def gram_of(vectors: list[list[float]]) -> Tensor:
    flat = torch.tensor(vectors, dtype=torch.float64)
    return flat @ flat.T


def honest(count: int, *, noise: float = 1.0) -> list[Contribution]:
    return [sent(f"d{n:02}", near(TRUTH, n + 1, noise=noise)) for n in range(count)]


def times(update: Update, by: float) -> Update:
    return {path: Factors(by * pair.b, pair.a) for path, pair in update.items()}


def truth_of(joined: Joined) -> float:
    """The cosine of what was joined with the truth."""
    both = sum(float((dense(joined.factors[path]) * dense(pair)).sum()) for path, pair in TRUTH.items())
    lengths = [math.sqrt(sum(float(dense(p).norm()) ** 2 for p in u.values())) for u in (joined.factors, TRUTH)]
    return both / (lengths[0] * lengths[1])


def attacked(kind: str, attackers: int) -> list[Contribution]:
    members = honest(20)
    for n in range(attackers):
        device, update = members[n].device_id, members[n].update
        members[n] = sent(device, forged(kind, n, update))
    return members


def forged(kind: str, n: int, update: Update) -> Update:
    wrong = {"q": factors(901, 24, 16, 2), "v": factors(902, 12, 16, 2)}
    kinds = {
        "nan": lambda: times(update, math.nan),
        "inf": lambda: times(update, math.inf),
        "huge": lambda: times({"q": factors(500 + n, 24, 16, 2), "v": factors(700 + n, 12, 16, 2)}, 100.0),
        "flip-10": lambda: times(update, -10.0),
        "flip": lambda: times(update, -1.0),
        "sybils": lambda: times(wrong, 1.5),
    }
    return kinds[kind]()


@pytest.mark.parametrize("rule", ["gate", "multi-krum", "geometric-median"])
@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "flip-10", "flip", "sybils"])
def test_four_attackers_of_twenty_move_the_joined_update_little(kind: str, rule: str) -> None:
    settings = FederateSettings(robust=rule)
    free = truth_of(join(None, honest(20), settings=settings, rank=32))
    found = truth_of(join(None, attacked(kind, 4), settings=settings, rank=32))
    assert free > 0.95
    assert found > free - 0.05


@pytest.mark.parametrize(("kind", "most"), [("huge", 0.3), ("flip-10", 0.0), ("sybils", 0.93)])
def test_without_defences_the_same_attacks_succeed(kind: str, most: float) -> None:
    assert truth_of(join(None, attacked(kind, 4), settings=NONE, rank=32)) < most


def test_with_an_update_of_the_servers_own_even_a_majority_that_lies_is_left_out() -> None:
    members = [*attacked("flip", 0)[:3], *(sent(f"x{n}", times(near(TRUTH, 50 + n, noise=1.0), -1)) for n in range(8))]
    own = Contribution(OWN, "", near(TRUTH, 77, noise=1.0), weight=10.0, devices=frozenset({"d20", "d21"}))
    joined = join(None, [*members, own], settings=FederateSettings(), rank=32)
    left_out = [share for share in joined.account.shares if share.left_out]
    assert {share.device_id for share in left_out} == {f"x{n}" for n in range(8)}
    assert "the server's own update" in left_out[0].left_out
    assert "min_cosine" in left_out[0].left_out
    assert joined.account.devices == ("d00", "d01", "d02", "d20", "d21")
    assert truth_of(joined) > 0.85


def test_a_hundred_identical_devices_count_as_one() -> None:
    wrong = {**times(TRUTH, -1.0), "q": factors(901, 24, 16, 2)}
    sybils = [sent(f"s{n:03}", wrong, weight=1e6) for n in range(100)]
    joined = join(None, [*honest(16), *sybils], settings=FederateSettings(robust="mean"), rank=32)
    counted = [share for share in joined.account.shares if not share.left_out]
    assert len(counted) == 17
    (one,) = [share for share in counted if share.alike]
    assert len(one.alike) == 99
    assert one.weight <= 1 / 17 + 1e-9
    assert truth_of(joined) > 0.9


def test_one_device_cannot_drown_the_others_by_saying_how_much_it_learned() -> None:
    members = [*honest(4), sent("liar", times(TRUTH, -1.0), weight=1e6)]
    joined = join(None, members, settings=FederateSettings(robust="mean"), rank=32)
    assert joined.account.shares[-1].weight == pytest.approx(1 / 5)


def test_who_is_a_little_longer_is_cut_and_who_is_far_longer_is_left_out() -> None:
    members = [
        *honest(3),
        sent("long", near(TRUTH, 8, noise=1, scale=3)),
        sent("wild", near(TRUTH, 9, noise=1, scale=40)),
    ]
    shares = join(None, members, settings=FederateSettings(robust="mean"), rank=32).account.shares
    assert shares[3].cut_to == pytest.approx(sorted(share.norm for share in shares[:3])[2])
    assert shares[3].norm > shares[3].cut_to
    assert "times the most that counts" in shares[4].left_out


def test_the_median_of_two_is_the_lower_and_no_norm_is_zero() -> None:
    assert robust.usual([1.0, 100.0]) == 1.0
    assert robust.clip_scale(0.0, 1.0) == 1.0
    assert robust.clip_scale(4.0, 1.0) == 0.25
    assert robust.clip_scale(4.0, math.inf) == 1.0
    cosines = robust.cosines_of(gram_of([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]]))
    assert cosines.tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]]


def test_copies_are_found_through_others_and_only_between_devices() -> None:
    cosines = torch.tensor([[1.0, 0.99, 0.5, 0.0], [0.99, 1.0, 0.99, 0.0], [0.5, 0.99, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert robust.copies(cosines, ["a", "b", "c", "d"], 0.98) == [[0, 1, 2]]
    assert robust.copies(cosines, ["a", "a", "c", "d"], 0.98) == [[1, 2]]
    assert robust.copies(cosines, ["a", "b", "c", "d"], 2.0) == []


def test_multi_krum_leaves_out_who_is_far_from_the_others_and_knows_how_many_it_can_tell() -> None:
    gram = gram_of([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [1.0, -0.1], [-9.0, 4.0]])
    assert robust.multi_krum(gram, 1) == [0, 1, 2, 3]
    assert [robust.most_attackers(size, 0.25) for size in (1, 2, 4, 5, 6, 7, 20)] == [0, 0, 0, 1, 1, 2, 5]


def test_the_geometric_median_is_where_most_are_and_a_convex_combination() -> None:
    weights = robust.geometric_median(gram_of([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [1000.0, 1000.0]]), [1.0] * 4)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[3] < 1e-3
    assert robust.geometric_median(gram_of([[2.0]]), [3.0]) == [1.0]
    assert sum(robust.geometric_median(gram_of([[1.0, 0.0]] * 3), [1.0] * 3)) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["gate", "multi-krum", "geometric-median", "mean"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_rule_joins_one_two_and_three_updates(rule: str, count: int) -> None:
    settings = FederateSettings(robust=rule, min_devices=1)
    joined = join(None, honest(count), settings=settings, rank=8)
    assert len(joined.account.devices) == count
    assert all(math.isfinite(share.weight) for share in joined.account.shares)


@pytest.mark.parametrize("rule", ["gate", "multi-krum", "geometric-median", "mean"])
def test_where_all_are_broken_the_round_is_refused_with_every_reason(rule: str) -> None:
    broken = [sent("a", times(TRUTH, math.nan)), sent("b", times(TRUTH, 0.0)), sent("c", TRUTH, weight=math.nan)]
    with pytest.raises(JoinRefused, match="no contribution counts") as refused:
        join(None, broken, settings=FederateSettings(robust=rule), rank=8)
    reasons = [share.left_out for share in refused.value.account.shares]
    assert "not finite" in reasons[0]
    assert reasons[1] == "it changes nothing"
    assert "nan trajectories" in reasons[2]

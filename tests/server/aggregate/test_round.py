"""A joined round: what is made of it, who counts and why not, and what the account says."""

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_server.aggregate.account import Account
from clawloop_server.aggregate.round import JoinRefused, join
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import OWN, Contribution, Factors, Update

from .aggregates import dense, factors, near, sent

MEAN = FederateSettings(robust="mean", max_norm=float("inf"), duplicate_cosine=2.0)
TRUTH: Update = {"q": factors(1, 24, 16, 2), "v": factors(2, 12, 16, 2)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 1000), st.floats(0.1, 2.0))
def test_the_joined_adapter_is_the_dense_mean_on_the_base(ranks: list[int], seed: int, server_lr: float) -> None:
    base = {"q": factors(seed + 50, 24, 16, 3)}
    members = [
        sent(f"d{n}", {"q": factors(seed + n, 24, 16, rank)}, weight=7.0, staleness=n % 3)
        for n, rank in enumerate(ranks)
    ]
    joined = join(base, members, settings=msgspec.structs.replace(MEAN, server_lr=server_lr), rank=16)
    whole = sum(c.weight for c in members)
    mean = sum(
        (7.0 / whole * (1 + c.staleness) ** -0.5 * dense(c.update["q"]) for c in members),
        torch.zeros(24, 16, dtype=torch.float64),
    )
    made = dense(base["q"]) + server_lr * mean
    scale = float(made.norm())
    torch.testing.assert_close(dense(joined.factors["q"]) / scale, made / scale, rtol=0, atol=1e-6)
    assert joined.account.tail < 1e-6
    assert joined.account.norm == pytest.approx(server_lr * float(mean.norm()))


def test_who_learned_from_less_counts_less_and_nobody_more_than_most() -> None:
    members = [sent(f"d{n}", near(TRUTH, n, noise=1.0), weight=weight) for n, weight in enumerate((2, 8, 8, 8, 4000))]
    shares = join(None, members, settings=MEAN, rank=4).account.shares
    assert [share.weight for share in shares] == pytest.approx([2 / 34, 8 / 34, 8 / 34, 8 / 34, 8 / 34])


def test_the_account_says_what_the_cut_and_averaged_factors_lose() -> None:
    members = [sent(f"d{n}", {"q": factors(n, 24, 16, 3), "v": factors(n + 20, 10, 16, 3)}) for n in range(5)]
    account = join(None, members, settings=MEAN, rank=4).account
    tails, errors, norms = dict[str, float](), dict[str, float](), dict[str, float]()
    for path in ("q", "v"):
        exact = sum((dense(c.update[path]) for c in members), torch.zeros_like(dense(members[0].update[path]))) / 5
        b = sum((c.update[path].b for c in members), torch.zeros_like(members[0].update[path].b)) / 5
        a = sum((c.update[path].a for c in members), torch.zeros_like(members[0].update[path].a)) / 5
        norms[path], errors[path] = float(exact.norm()), float((exact - (b @ a).double()).norm())
        tails[path] = float(torch.linalg.svdvals(exact)[4:].norm())
    whole = (norms["q"] ** 2 + norms["v"] ** 2) ** 0.5
    assert account.tail == pytest.approx((tails["q"] ** 2 + tails["v"] ** 2) ** 0.5 / whole)
    assert account.rho == pytest.approx((errors["q"] ** 2 + errors["v"] ** 2) ** 0.5 / whole, rel=1e-5)
    worst = max(norms, key=lambda path: tails[path] / norms[path])
    assert account.tail_worst_layer == worst
    assert account.tail_worst == pytest.approx(tails[worst] / norms[worst])
    assert any("over max_tail" in note for note in account.notes)


def test_every_layer_has_the_rank_asked_for_and_what_is_missing_can_still_be_learned() -> None:
    joined = join(None, [sent("a", TRUTH), sent("b", TRUTH)], settings=MEAN, rank=6)
    again = join(None, [sent("a", TRUTH), sent("b", TRUTH)], settings=MEAN, rank=6)
    other = join(None, [sent("a", TRUTH), sent("b", TRUTH)], settings=MEAN, rank=6, seed=1)
    for path, pair in joined.factors.items():
        assert (pair.b.shape[1], pair.a.shape[0], pair.b.dtype) == (6, 6, torch.float32)
        torch.testing.assert_close(dense(pair), dense(TRUTH[path]), atol=1e-4, rtol=1e-5)
        assert bool((pair.b[:, 2:] == 0).all())
        assert float(pair.a[2:].abs().max()) <= 0.25
        assert bool((pair.a[2:].norm(dim=1) > 0.1).all())
        assert torch.equal(pair.a, again.factors[path].a)
        assert not torch.equal(pair.a[2:], other.factors[path].a[2:])


def test_a_layer_that_nobody_learned_stays_as_it_was() -> None:
    base = {"q": factors(3, 24, 16, 2), "o": factors(4, 9, 8, 2)}
    joined = join(base, [sent("a", TRUTH), sent("b", TRUTH)], settings=MEAN, rank=8)
    assert set(joined.factors) == {"q", "v", "o"}
    torch.testing.assert_close(dense(joined.factors["o"]), dense(base["o"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", ["a", "b"])
def test_updates_that_share_a_factor_are_joined_linearly_without_error(shared: str) -> None:
    def update(n: int) -> Update:
        own, first = factors(n, 24, 16, 4), factors(99, 24, 16, 4)
        return {"q": Factors(own.b, first.a) if shared == "a" else Factors(first.b, own.a)}

    account = join(None, [sent(f"d{n}", update(n)) for n in range(6)], settings=MEAN, rank=4).account
    assert account.method == "linear"
    assert account.tail < 1e-9
    assert account.rho < 1e-6


@pytest.mark.parametrize("shared", ["a", "b"])
def test_an_update_that_shares_a_factor_with_the_base_loses_nothing_at_its_rank(shared: str) -> None:
    base = factors(99, 24, 16, 4)
    members = [
        sent(f"d{n}", {"q": Factors(own.b, base.a) if shared == "a" else Factors(base.b, own.a)})
        for n, own in enumerate(factors(n, 24, 16, 4) for n in range(5))
    ]
    joined = join({"q": base}, members, settings=MEAN, rank=4)
    mean = sum((dense(c.update["q"]) for c in members), torch.zeros(24, 16).double()) / 5
    torch.testing.assert_close(dense(joined.factors["q"]), dense(base) + mean, atol=1e-4, rtol=1e-5)
    assert joined.account.tail < 1e-9


def test_a_sum_of_many_devices_counts_for_as_many() -> None:
    summed = Contribution("sum", "", near(TRUTH, 9, noise=1.0), weight=500.0, devices=frozenset("uvwxyz"))
    members = [*(sent(f"d{n}", near(TRUTH, n, noise=1.0), weight=10.0) for n in range(4)), summed]
    account = join(None, members, settings=MEAN, rank=4).account
    assert [share.weight for share in account.shares] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    assert len(account.devices) == 10


def test_averaging_factors_is_a_choice_where_ranks_agree_and_is_told_where_not() -> None:
    fedavg = msgspec.structs.replace(MEAN, aggregation="fedavg")
    members = [sent(f"d{n}", {"q": factors(n, 24, 16, 3)}) for n in range(3)]
    joined = join(None, members, settings=fedavg, rank=3)
    b = sum((c.update["q"].b for c in members), torch.zeros(24, 3)) / 3
    a = sum((c.update["q"].a for c in members), torch.zeros(3, 16)) / 3
    torch.testing.assert_close(dense(joined.factors["q"]), (b @ a).double(), atol=1e-5, rtol=1e-5)
    assert joined.account.method == "fedavg"
    assert joined.account.rho > 0.5
    mixed = join(None, [*members, sent("x", {"q": factors(9, 24, 16, 2)})], settings=fedavg, rank=3).account
    assert mixed.method == "svd"
    assert any("factors of ranks [2, 3] have no mean" in note for note in mixed.notes)


def test_older_updates_count_less_and_a_round_of_them_makes_a_smaller_step() -> None:
    members = [sent("a", TRUTH), sent("b", near(TRUTH, 1, noise=1), staleness=3), sent("c", TRUTH, staleness=5)]
    shares = join(None, members, settings=MEAN, rank=4).account.shares
    assert [share.weight for share in shares] == pytest.approx([0.5, 0.25, 0.0])
    assert "5 versions old, over max_staleness 4" in shares[2].left_out


def test_a_device_counts_once_with_its_newest() -> None:
    members = [sent("a", TRUTH, staleness=1), sent("a", TRUTH), sent("a", TRUTH, staleness=2), sent("b", TRUTH)]
    shares = join(None, members, settings=MEAN, rank=4).account.shares
    assert [bool(share.left_out) for share in shares] == [True, False, True, False]
    assert shares[0].left_out == "replaced by delta-a of the same device"


def test_what_does_not_fit_is_left_out_with_the_reason() -> None:
    misfit = {"q": Factors(torch.ones(23, 2), torch.ones(2, 16))}
    crooked = {"q": Factors(torch.ones(24, 2), torch.ones(3, 16))}
    empty = {"q": Factors(torch.ones(24, 0), torch.ones(0, 16))}
    members = [sent("x", misfit), sent("y", crooked), sent("z", empty), sent("a", TRUTH), sent("b", TRUTH)]
    shares = join({"q": factors(3, 24, 16, 2)}, members, settings=MEAN, rank=4).account.shares
    assert "q is (23, 16), the others' (24, 16)" in shares[0].left_out
    assert "do not fit" in shares[1].left_out
    assert "do not fit" in shares[2].left_out
    assert not shares[3].left_out


def test_too_few_devices_make_no_round_but_the_servers_own_update_does() -> None:
    strict = msgspec.structs.replace(MEAN, min_devices=3)
    members = [sent("a", TRUTH), sent("b", TRUTH)]
    with pytest.raises(JoinRefused, match="2 devices count, min_devices is 3"):
        join(None, members, settings=strict, rank=4)
    own = Contribution(OWN, "", near(TRUTH, 5, noise=0.5), weight=5.0, devices=frozenset({"b"}))
    alone = join(None, [*members, own], settings=strict, rank=4).account
    assert [bool(share.left_out) for share in alone.shares] == [True, True, False]
    assert alone.devices == ("b",)
    more = Contribution(OWN, "", own.update, weight=5.0, devices=frozenset({"b", "c"}))
    assert join(None, [*members, more], settings=strict, rank=4).account.devices == ("a", "b", "c")


def test_the_cosines_of_devices_are_kept_whether_they_count_or_not_and_the_account_is_json() -> None:
    against = {path: Factors(-pair.b, pair.a) for path, pair in TRUTH.items()}
    members = [sent("b", TRUTH), sent("a", against), sent("c", TRUTH), sent("d", near(TRUTH, 3, noise=1.0))]
    wild, none = near(TRUTH, 4, noise=1.0, scale=50.0), {"q": Factors(float("nan") * TRUTH["q"].b, TRUTH["q"].a)}
    account = join(None, [*members, sent("w", wild), sent("x", none)], settings=FederateSettings(), rank=4).account
    assert account.conflict["a"]["b"] == -1.0
    assert account.conflict["a"]["d"] == pytest.approx(-(0.5**0.5), abs=0.1)
    assert "what most agree on" in account.shares[1].left_out
    known = account.conflict.keys() | {other for row in account.conflict.values() for other in row}
    assert known == {"a", "b", "d"}, "no copy, nothing wild and no broken numbers are evidence of anything"
    assert [share.by_others for share in account.shares] == [False, True, True, False, True, False]
    assert msgspec.json.decode(msgspec.json.encode(account), type=Account) == account


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(JoinRefused, match="there is none"):
        join(None, [], settings=MEAN, rank=4)


@pytest.mark.parametrize("shorter", [0.1, 1e-6])
def test_of_two_updates_both_are_cut_to_the_shorter_and_neither_is_thrown_out(shorter: float) -> None:
    members = [sent("a", TRUTH), sent("b", near(TRUTH, 1, noise=1.0, scale=shorter))]
    one, other = join(None, members, settings=FederateSettings(), rank=4).account.shares
    assert not one.left_out
    assert not other.left_out
    assert one.norm > 6 * other.norm
    assert one.cut_to == pytest.approx(other.norm) == other.cut_to

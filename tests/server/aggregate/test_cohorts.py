"""Cohorts are found where updates keep conflicting, from nothing random, and not before several rounds said so."""

import itertools
import random
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_server.aggregate import cohorts
from clawloop_server.aggregate.account import Account
from clawloop_server.aggregate.cohorts import Evidence, find, names_of, only, split_of, update
from clawloop_server.aggregate.settings import FederateSettings

SETTINGS = FederateSettings()
SIX = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0, "f": 1}


def account(worlds: dict[str, int], *, inside: float = 0.5, across: float = -0.4, noise: float = 0.0) -> Account:
    rng = random.Random(str(worlds) + str(across))
    conflict: dict[str, dict[str, float]] = {}
    for x, y in itertools.combinations(sorted(worlds), 2):
        cosine = (inside if worlds[x] == worlds[y] else across) + rng.gauss(0, noise)
        conflict.setdefault(x, {})[y] = cosine
    return Account(method="svd", robust="gate", shares=(), conflict=conflict)


def after(accounts: list[Account], *, chosen: FederateSettings = SETTINGS) -> Evidence:
    evidence = Evidence()
    for version, each in enumerate(accounts):
        evidence = update(evidence, each, settings=chosen, version=version)
    return evidence


def groups(evidence: Evidence, chosen: FederateSettings = SETTINGS) -> list[frozenset[str]]:
    return [cohort.devices for cohort in find(evidence, chosen)]


def test_two_worlds_are_told_apart_after_three_rounds_in_a_row_and_not_before() -> None:
    rounds = [account(SIX, noise=0.1)] * 3
    assert groups(after(rounds[:2])) == []
    assert groups(after(rounds)) == [frozenset("ace"), frozenset("bdf")]
    (first, _) = find(after(rounds), SETTINGS)
    assert "3 rounds in a row" in first.why
    assert "3 devices agreed" in first.why
    assert (first.since, first.part) == (2, 0.5), "they never agreed, so that nobody goes back"


def test_cohorts_begin_with_the_newest_adapter_beside_which_they_still_agreed() -> None:
    good, less, bad = account(SIX, across=0.3), account(SIX, across=0.1), account(SIX, across=-0.6)
    evidence = after([good] * 3 + [less] * 2 + [bad] * 4)
    assert {cohort.since for cohort in find(evidence, SETTINGS)} == {2}
    assert {cohort.since for cohort in find(after([bad] * 4), SETTINGS)} == {3}
    assert len(after([bad] * 50).history) == cohorts.HISTORY


def test_a_round_of_agreement_begins_the_count_again() -> None:
    bad, good = account(SIX, across=-0.2), account(SIX, across=0.5)
    assert groups(after([bad, bad, good, bad])) == []
    assert after([bad, bad, good]).rounds == 0


def test_devices_with_other_work_are_no_conflict() -> None:
    assert groups(after([account(SIX, across=0.0, noise=0.05)] * 6)) == []
    assert groups(after([account(SIX, inside=0.0, across=0.0, noise=0.03)] * 6)) == []


def test_who_fits_nowhere_is_in_no_cohort() -> None:
    evidence = after([account({**SIX, "x": 2})] * 3)
    assert groups(evidence) == [frozenset("ace"), frozenset("bdf")]


def test_one_device_against_all_splits_nobody() -> None:
    assert groups(after([account({"a": 0, "b": 0, "c": 0, "x": 1})] * 5)) == []


def test_three_worlds_are_three_cohorts_the_largest_first() -> None:
    worlds = dict(zip("abcdefghij", (0, 0, 0, 1, 1, 1, 1, 2, 2, 2), strict=True))
    assert groups(after([account(worlds)] * 3)) == [frozenset("defg"), frozenset("abc"), frozenset("hij")]


def test_two_of_many_that_go_against_the_others_are_no_cohort_and_two_of_four_are() -> None:
    """Where many are compared two that lie together are soon found; they are left out by the defence all the same."""
    liars = dict.fromkeys("abcdefgh", 0) | {"x": 1, "y": 1}
    assert groups(after([account(liars, across=-0.9)] * 6)) == []
    assert groups(after([account({"a": 0, "b": 0, "x": 1, "y": 1})] * 3)) == [frozenset("ab"), frozenset("xy")]
    strict = FederateSettings(min_devices=4)
    assert groups(after([account(SIX)] * 3, chosen=strict), strict) == []


def test_who_lies_from_the_beginning_takes_nobody_back() -> None:
    liars = dict.fromkeys("abcdefgh", 0) | dict.fromkeys("xyz", 1)
    evidence = after([account(liars, across=-0.9)] * 9)
    assert [(c.devices, c.since) for c in find(evidence, SETTINGS)] == [
        (frozenset("abcdefgh"), 8),
        (frozenset("xyz"), 8),
    ]


def test_one_device_cannot_pull_another_into_a_cohort_of_two() -> None:
    """`v` does other work than five that agree; `a` sends what is near to it and against them."""
    rng = random.Random(3)
    conflict: dict[str, dict[str, float]] = {}
    for x, y in itertools.combinations("abcdev", 2):
        pair = {x, y}
        known = (0.33, 0.58) if pair == {"a", "v"} else (-0.58, -0.44) if "a" in pair else (0.18, 0.22)
        conflict.setdefault(x, {})[y] = rng.uniform(*(known if pair & {"a", "v"} else (0.6, 0.7)))
    made = Account(method="svd", robust="gate", shares=(), conflict=conflict)
    five = Account(method="svd", robust="gate", shares=(), conflict={x: row for x, row in conflict.items() if x != "b"})
    for each in (made, five):
        assert groups(after([each] * 9)) == []


def test_two_hundred_devices_take_well_under_a_second_and_more_than_are_compared_change_nothing() -> None:
    worlds = {f"d{n:03}": n % 2 for n in range(200)}
    made = account(worlds, noise=0.1)
    evidence = after([made] * 2)
    began = time.process_time()
    evidence = update(evidence, made, settings=SETTINGS, version=2)
    found = find(evidence, SETTINGS)
    assert time.process_time() - began < 1.0
    assert [len(cohort.devices) for cohort in found] == [100, 100]
    many = after([account({f"d{n:03}": n % 2 for n in range(300)}, noise=0.1)] * 3)
    assert len(names_of(many.pairs)) == cohorts.MOST_COMPARED
    assert [len(names_of(seen.cosines)) for seen in many.history] == [cohorts.REMEMBERED] * 3
    assert {device for group in many.split for device in group} == names_of(many.pairs)


def test_a_round_with_devices_of_one_side_says_nothing_of_the_split() -> None:
    both = account(SIX)
    one_side = account({"a": 0, "c": 0, "e": 0})
    assert after([both, both, one_side]).rounds == 2
    assert groups(after([both, one_side, both, one_side, both])) == [frozenset("ace"), frozenset("bdf")]


def test_pairs_that_never_met_are_placed_by_those_that_did() -> None:
    left = account({"a": 0, "b": 1, "c": 0})
    right = account({"b": 1, "c": 0, "d": 1})
    assert groups(after([left, right] * 3)) == [frozenset("ac"), frozenset("bd")]


def test_cohorts_can_be_switched_off_and_forget_who_left() -> None:
    evidence = after([account(SIX)] * 3)
    assert groups(evidence, FederateSettings(cohorts="off")) == []
    assert only(evidence, SIX) is evidence
    fewer = only(evidence, set("acdef"))
    assert groups(fewer) == [frozenset("ace"), frozenset("df")]
    assert b'"b"' not in msgspec.json.encode(fewer)


def test_the_mean_looks_back_on_some_rounds_only() -> None:
    early, late = account(SIX, across=0.9), account(SIX, across=-0.6)
    assert groups(after([early] * 50 + [late] * 12)) == [frozenset("ace"), frozenset("bdf")]
    pair = after([early] * 50).pairs["a"]["b"]
    assert pair.rounds == cohorts.MEMORY
    assert pair.cosine == pytest.approx(0.9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_groups_are_disjoint_conflict_and_do_not_depend_on_order(worlds: list[int], rng: random.Random) -> None:
    devices = [f"d{n}" for n in range(len(worlds))]
    made = account(dict(zip(devices, worlds, strict=True)), noise=0.3)
    evidence = after([made] * 3)
    shuffled = list(made.conflict.items())
    rng.shuffle(shuffled)
    assert (
        split_of(after([msgspec.structs.replace(made, conflict=dict(shuffled))] * 3).pairs, SETTINGS) == evidence.split
    )
    found = [device for group in evidence.split for device in group]
    assert len(found) == len(set(found))
    for one, other in itertools.combinations(evidence.split, 2):
        cosines = [made.conflict[min(x, y)][max(x, y)] for x in one for y in other]
        assert sum(cosines) / len(cosines) < SETTINGS.conflict_cosine
    assert msgspec.json.decode(msgspec.json.encode(evidence), type=Evidence) == evidence

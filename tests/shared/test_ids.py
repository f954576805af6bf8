"""Ids are ULIDs: they hold their time, sort by it, and do not repeat."""

import re
import time

from clawloop_shared.ids import new_id, new_step_id

LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def _milliseconds(ulid: str) -> int:
    return sum(LETTERS.index(letter) << 5 * (9 - place) for place, letter in enumerate(ulid[:10]))


def test_an_id_holds_the_time_it_was_made_at() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()
    assert re.fullmatch(f"[0-7][{LETTERS}]{{25}}", made)
    assert before <= _milliseconds(made) <= time.time_ns() // 1_000_000


def test_ids_sort_by_their_millisecond_and_do_not_repeat() -> None:
    made = [new_id() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert [_milliseconds(ulid) for ulid in made] == sorted(_milliseconds(ulid) for ulid in made)


def test_all_random_bits_are_used() -> None:
    places = list(zip(*(new_id()[10:] for _ in range(2_000)), strict=True))
    assert all(len(set(place)) == 32 for place in places)


def test_a_step_id_says_its_api() -> None:
    assert new_step_id("msg").startswith("msg-0")

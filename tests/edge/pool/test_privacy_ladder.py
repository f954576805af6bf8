"""A ladder says of each change the same as a plain list of levels would."""

from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.privacy.ladder import EVERYTHING, NOTHING, Ladder
from clawloop_shared.levels import Level, lower

LAST = 12
levels = st.sampled_from(list(Level))
moves = st.lists(st.tuples(st.booleans(), levels, st.integers(0, LAST)), max_size=8)


def played(start: Level, done: list[tuple[bool, Level, int]]) -> tuple[Ladder, list[Level]]:
    """A ladder and a plain list, changed alike."""
    ladder, plain = Ladder.flat(start), [start] * LAST
    for lowers, level, after in done:
        if lowers:
            ladder, plain = ladder.lowered(level), [lower(each, level) for each in plain]
        else:
            ladder, plain = ladder.followed_by(level, after_seq=after), plain[:after] + [level] * (LAST - after)
    return ladder, plain


@given(start=levels, done=moves)
def test_it_says_what_a_plain_list_of_levels_says(start: Level, done: list[tuple[bool, Level, int]]) -> None:
    ladder, plain = played(start, done)
    assert [ladder.at(seq) for seq in range(1, LAST + 1)] == plain
    assert ladder.rungs[0].after_seq == 0
    assert all(one.after_seq < two.after_seq for one, two in zip(ladder.rungs, ladder.rungs[1:], strict=False))
    assert all(one.level != two.level for one, two in zip(ladder.rungs, ladder.rungs[1:], strict=False))
    sending = [seq for seq in range(1, LAST + 1) if ladder.at(seq).sends_steps]
    if sending:
        assert ladder.sends_after == sending[0] - 1
    elif not ladder.latest.sends_steps:
        assert ladder.sends_after is None


@given(one=st.tuples(levels, moves), other=st.tuples(levels, moves))
def test_the_least_of_two_is_the_lower_level_everywhere(
    one: tuple[Level, list[tuple[bool, Level, int]]], other: tuple[Level, list[tuple[bool, Level, int]]]
) -> None:
    (first, plain_first), (second, plain_second) = played(*one), played(*other)
    both = first.least(second)
    assert [both.at(seq) for seq in range(1, LAST + 1)] == [
        lower(a, b) for a, b in zip(plain_first, plain_second, strict=True)
    ]
    assert both.latest is lower(first.latest, second.latest)
    assert first.least(EVERYTHING) == first
    assert first.least(NOTHING) == NOTHING

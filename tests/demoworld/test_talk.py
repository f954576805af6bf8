"""The user of the demo who only talks."""

import random
from collections import Counter

from demoworld import talk, world


def reactions(*, right: bool, flip: float = 0.0, count: int = 2000) -> Counter[str]:
    talker = talk.Talker(random.Random(7), flip=flip)
    task = world.Task(1, "Oslo", 0)
    return Counter(talker.reaction(task, right=right) for _ in range(count))


def test_who_was_helped_thanks_or_goes_on_and_who_was_not_says_so() -> None:
    thanks, others = set(talk.THANKS), set(reactions(right=False)) - {talk.SILENCE}
    assert set(reactions(right=True)) == thanks | {talk.SILENCE}
    assert not thanks & others
    assert world.question(1, "Oslo", phrasing=0) in others
    assert any("Oslo" in said and "travel approver" in said for said in others)


def test_words_are_the_opposite_of_what_is_meant_as_often_as_asked() -> None:
    thanked = sum(count for said, count in reactions(right=False, flip=0.2).items() if said in talk.THANKS)
    assert 0.11 < thanked / 2000 < 0.21  # a fifth, some of it silence


def test_no_word_is_a_score() -> None:
    said = set(reactions(right=True)) | set(reactions(right=False))
    assert not any(character.isdigit() for text in said for character in text)

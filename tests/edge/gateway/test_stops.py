"""Stop strings are found in text however it is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.gateway.stops import StopMatcher

texts = st.text("abc", max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3)


def matched(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        out += matcher.feed(piece)
        if matcher.stopped:
            return out, True
    return out + matcher.finish(), False


@given(st.lists(texts, max_size=5), stops)
def test_the_cut_of_the_pieces_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    assert matched(pieces, stops) == matched(list(text), stops) == matched([text], stops)


@given(texts, stops)
def test_what_is_delivered_holds_no_stop_string_and_is_all_if_there_was_none(text: str, stops: list[str]) -> None:
    out, stopped = matched(list(text), stops)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    assert stopped is any(stop in text for stop in stops)
    assert stopped or out == text


def test_text_behind_a_stop_string_in_the_same_piece_is_noticed() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one E") == "one "
    assert matcher.feed("NDLESS") == ""
    assert (matcher.stopped, matcher.rest) == (True, "LESS")

"""Whatever the pieces, the matcher shows what a search of the whole text would show."""

from hypothesis import given
from hypothesis import strategies as st

from serving.service.replies.stop_strings import StopMatcher

ALPHABET = "ab"
stops_of = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The earliest end wins, then the longest string."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            stop = max(here, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include)
    shown = [matcher.push(piece) for piece in pieces]
    if matcher.matched is None:
        shown.append(matcher.finish())
    return shown, matcher.matched


@given(st.lists(st.text(ALPHABET, max_size=4), max_size=12), stops_of, st.booleans())
def test_any_split_gives_the_same_text(pieces, stops, include):
    shown, matched = run(pieces, stops, include)
    assert ("".join(shown), matched) == expected("".join(pieces), stops, include)


@given(st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=12), stops_of)
def test_nothing_is_held_back_longer_than_needed(pieces, stops):
    matcher, seen, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        shown += matcher.push(piece)
        seen += piece
        if matcher.matched is not None:
            break
        held = seen[len(shown) :]
        assert shown + held == seen
        longest = max(
            (n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])),
            default=0,
        )
        assert len(held) == longest


def test_a_stop_string_across_pieces_never_shows():
    matcher = StopMatcher(["</answer>"])
    assert [matcher.push(p) for p in ("42", " </", "ans", "wer", "> more")] == ["42", " ", "", "", ""]
    assert matcher.matched == "</answer>"
    assert matcher.push("text behind it") == ""


def test_a_false_start_comes_out():
    matcher = StopMatcher(["abc"])
    assert matcher.push("xab") == "x"
    assert matcher.push("d") == "abd"
    assert (matcher.push("ab"), matcher.finish()) == ("", "ab")

"""However the text is cut into pieces, what is sent is the text before the first stop string."""

from hypothesis import given
from hypothesis import strategies as st

from fivefold.serve.stops import Stops

texts = st.text("ab.", max_size=30)


@given(st.lists(texts, max_size=8), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_the_same_as_cutting_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    """Oracle: feed the whole text character by character and cut at the first moment any stop is complete."""
    whole = "".join(pieces)
    scanner = Stops(tuple(stops))
    sent = ""
    for piece in pieces:
        sent += scanner.push(piece)
        if scanner.hit:
            break
    sent += scanner.flush()
    places = [whole.find(s) for s in stops if s in whole]
    assert scanner.hit == bool(places)
    if not places:
        assert sent == whole
    elif len(stops) == 1:
        assert sent == whole[: places[0]]
    else:
        assert whole.startswith(sent) and any(whole[len(sent) :].startswith(s) for s in stops)


def test_nothing_is_held_back_longer_than_needed() -> None:
    scanner = Stops(("END",))
    assert scanner.push("abcE") == "abc"
    assert scanner.push("x") == "Ex"

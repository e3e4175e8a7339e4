"""Stop strings: never a part of one is given out, and nothing else is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.errors import UsageError
from threefold.generation.stopping import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    machine = StopStrings(stops)
    out = []
    for piece in pieces:
        out.append(machine.feed(piece))
        if machine.stopped:
            return out, True
    return [*out, machine.finish()], False


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=4), max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    at = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    out, stopped = run(stops, pieces)
    # A stop string that begins earlier but ends later than another one may still be incomplete when the other one is
    # found.
    assert stopped == (at is not None)
    if at is None:
        assert "".join(out) == whole
    else:
        shown = "".join(out)
        assert whole.startswith(shown) and not any(stop in shown for stop in stops)
        assert len(shown) >= at


def test_parts_are_held_back_and_given_out_when_they_are_none() -> None:
    machine = StopStrings("<end>")
    assert machine.feed("a<e") == "a"
    assert machine.feed("n") == ""
    assert machine.feed("x<") == "<enx"
    assert machine.finish() == "<"


def test_nothing_follows_a_stop_string() -> None:
    machine = StopStrings(["\n\n", "User:"])
    assert machine.feed("hello Us") == "hello "
    assert machine.feed("er: hi") == ""
    assert machine.stopped
    assert machine.feed("more") == machine.finish() == ""


def test_without_stop_strings_text_passes() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], False)


@pytest.mark.parametrize("stops", ["", ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(stops: object) -> None:
    if stops == "":
        stops = [""]
    with pytest.raises(UsageError, match="stop string"):
        StopStrings(stops)  # type: ignore[arg-type]

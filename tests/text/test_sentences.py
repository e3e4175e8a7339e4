"""Where sentences end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threefold.text.sentences import sentences


@pytest.mark.parametrize("parts", [
    ["We propose a model.", "It learns fast!", "Does it?", "Yes."],
    ["Following Smith et al. (2019), e.g. with Fig. 3, we measure it.", "J. Smith agrees."],
    ["The rate is 0.5 of it.", "\"All of it.\"", "(So he said.)", "And more"],
    ["영화가 좋았다.", "다시 보고 싶다!", "왜 그럴까?"],
    ["A loss... that falls.", "The end…", "Or not."],
    ["one"],
])
def test_a_text_is_cut_where_its_sentences_end(parts: list[str]) -> None:
    assert sentences(" ".join(parts)) == parts == sentences("  " + "\n".join(parts) + " ")


@given(st.text(alphabet="ab. !?\n\"A한", max_size=60))
def test_together_they_are_the_text(text: str) -> None:
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split()) and all(one and one == one.strip() for one in found)

"""What is streamed is what is decoded, and no piece ends inside a character."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.helpers import EVERY_KIND, KOREAN, SAMPLES, small
from threefold.text.streaming import StreamDecoder
from threefold.text.tokenizer import Tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip)
    return [*map(decoder.push, ids), decoder.flush()]


@pytest.mark.parametrize("kind", EVERY_KIND)
@given(numbers=st.lists(st.integers(0, 10_000), max_size=30), skip=st.booleans())
@settings(deadline=None)
def test_any_ids_give_what_decode_gives(kind: str, numbers: list[int], skip: bool) -> None:
    tokenizer = small(kind)
    ids = [number % tokenizer.vocab_size for number in numbers]
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("name", SAMPLES)
def test_text_comes_in_whole_characters(kind: str, name: str) -> None:
    tokenizer = small(kind)
    pieces = streamed(tokenizer, tokenizer.encode(SAMPLES[name]))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(SAMPLES[name]))
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("path", ["gpt2_bpe", "gpt1_bpe", "bert_wordpiece", "sentencepiece_test/test_model.model"])
@given(numbers=st.lists(st.integers(0, 10**6), max_size=20))
@settings(deadline=None, max_examples=30)
def test_published_tokenizers_too(shared_data: Callable[[str], Path], path: str, numbers: list[int]) -> None:
    tokenizer = _loaded(shared_data(f"tokenizers/{path}"))
    ids = [number % tokenizer.vocab_size for number in numbers]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_byte_fallback_as_in_llama(shared_data: Callable[[str], Path]) -> None:
    tokenizer = _loaded(shared_data("stories260K/hf"))
    for text in ("Once upon a time", KOREAN, "🚀 a 🚀", "  two"):
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text
        broken = [number for number in ids if number % 3]
        assert "".join(streamed(tokenizer, broken)) == tokenizer.decode(broken)


def test_a_second_text_begins_anew() -> None:
    decoder = StreamDecoder(small("unigram"))
    for _ in range(2):
        ids = small("unigram").encode("It was the best")
        assert "".join(map(decoder.push, ids)) + decoder.flush() == "It was the best"


@functools.cache
def _loaded(path: Path) -> Tokenizer:
    return Tokenizer.load(path)

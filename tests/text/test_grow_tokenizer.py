"""A grown vocabulary: every old id as it was, new text shorter, special tokens where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.text.helpers import CODE, ENGLISH, KOREAN, SAMPLES, small
from threefold.errors import TokenizerError, UsageError
from threefold.text.tokenizer import Tokenizer


def check(old: Tokenizer, new: Tokenizer, count: int) -> None:
    assert new.vocab_size == old.vocab_size + count
    assert [new.piece(i) for i in range(old.vocab_size)] == [old.piece(i) for i in range(old.vocab_size)]
    assert len({new.piece(i) for i in range(new.vocab_size)} - {None}) == sum(
        new.piece(i) is not None for i in range(new.vocab_size)
    )
    assert (new.roles, new.special_ids, new.kind) == (old.roles, old.special_ids, old.kind)


def test_bpe_learns_the_words_of_new_text() -> None:
    old = Tokenizer.train("bpe", [ENGLISH, CODE], 600)
    new = old.grow([KOREAN] * 3, 60)
    check(old, new, 60)
    assert len(new.encode(KOREAN)) < 0.6 * len(old.encode(KOREAN))
    for text in (*SAMPLES.values(), KOREAN, CODE):
        assert new.decode(new.encode(text)) == text
        assert len(new.encode(text)) <= len(old.encode(text))
    assert new.encode_document("x").tolist()[0] == old.bos_id
    assert new.fingerprint != old.fingerprint


def test_growing_is_going_on_with_training() -> None:
    """On text of whole words, growing by n from m pieces gives the pieces that training to m + n gives."""
    words = "banana bandana cabana band ban can canal " * 5 + "band banana " * 3
    old, whole = Tokenizer.train("bpe", [words], 262), Tokenizer.train("bpe", [words], 268)
    new = old.grow([words], 6)
    assert {new.piece(i) for i in range(268)} == {whole.piece(i) for i in range(268)}


def test_the_same_text_gives_the_same_pieces() -> None:
    assert small("bpe").grow([KOREAN, CODE], 40).json == small("bpe").grow(iter([KOREAN, CODE]), 40).json


def test_what_is_grown_can_grow_again_and_be_saved(tmp_path: Path) -> None:
    once = small("bpe").grow([KOREAN] * 2, 20)
    twice = once.grow(["새로운 단어들이 여기 있습니다 새로운 단어들이"] * 3, 10)
    check(once, twice, 10)
    twice.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == twice.fingerprint


def test_text_that_yields_fewer_gives_fewer_with_a_note() -> None:
    grown = small("bpe").grow(["zzqq zzqq"], 500)
    assert small("bpe").vocab_size < grown.vocab_size < small("bpe").vocab_size + 10
    assert "fewer than the 500 allowed" in grown.notes[0]


def test_a_new_piece_is_never_a_special_token() -> None:
    old = Tokenizer.train("bpe", [CODE], 500, special=["zebra"])
    new = old.grow(["zebra zebra zebra zebrazebra"] * 9, 10)
    assert not set(new.encode("zebra zebra")) & new.special_ids
    check(old, new, new.vocab_size - old.vocab_size)


def test_char_takes_new_characters() -> None:
    old = Tokenizer.train("char", ["hello"], 100)
    new = old.grow(["héllo ☃☃"], 2)
    check(old, new, 2)
    assert new.decode(new.encode("h☃é")) in ("h☃é", "h☃")
    assert new.piece(old.vocab_size) == "☃"


@pytest.mark.parametrize("path", ["gpt2_bpe", "stories260K/hf"])
def test_published_vocabularies_grow(shared_data: Callable[[str], Path], path: str) -> None:
    old = Tokenizer.load(shared_data(path if "hf" in path else f"tokenizers/{path}"))
    new = old.grow([KOREAN] * 4, 30)
    check(old, new, new.vocab_size - old.vocab_size)
    assert new.vocab_size > old.vocab_size + 20
    assert len(new.encode(KOREAN)) < len(old.encode(KOREAN))
    assert new.decode(new.encode(KOREAN)) == KOREAN
    line = ENGLISH.split("\n")[0]
    assert new.encode(line) == old.encode(line)


def test_what_cannot_grow_says_so() -> None:
    for kind in ("wordpiece", "unigram", "byte"):
        with pytest.raises(TokenizerError, match=f"a {kind} vocabulary cannot grow"):
            small(kind).grow([KOREAN], 5)
    with pytest.raises(UsageError, match="by 0"):
        small("bpe").grow([KOREAN], 0)
    with pytest.raises(TokenizerError, match="no text"):
        small("bpe").grow([""], 5)

"""The split into train and validation, and the spool."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.helpers import Codes
from threefold.data.corpus import OVERSHOOT, content_hash, cut, encode_corpus, validation_of
from threefold.errors import TokenizerError


def test_a_single_document_is_cut_by_character() -> None:
    assert cut("abcdefghij", 0.1) == ("abcdefghi", "j")
    assert cut("abcdefghij", 0.25) == ("abcdefg", "hij")
    assert cut("a", 0.1) == ("", "a") and cut("ab", 0) == ("ab", "")
    n, text = 1_115_394, "x" * 1_115_394
    assert len(cut(text, 0.1)[0]) == int((1 - 0.1) * n) == 1_003_854


@given(texts=st.lists(st.text(min_size=1), min_size=2, max_size=30, unique=True), fraction=st.floats(0.001, 0.999))
def test_several_documents_are_taken_in_order_of_their_hash(texts: list[str], fraction: float) -> None:
    hashes, sizes = [content_hash(text.encode()) for text in texts], [len(text) for text in texts]
    side = validation_of(hashes, sizes, fraction)
    order, wanted = sorted(range(len(texts)), key=lambda i: hashes[i]), fraction * sum(sizes)
    taken = [i for i in order if side[i]]
    short = [i for i in order if sizes[i] <= max(OVERSHOOT * wanted, min(sizes))]
    assert 1 <= len(taken) < len(texts) and taken == short[:len(taken)]
    assert sum(sizes[i] for i in taken) >= wanted or len(taken) == len(short) - (len(short) == len(texts))
    assert sum(sizes[i] for i in taken[:-1]) < wanted
    assert not any(validation_of(hashes, sizes, 0))


def test_D10_a_novel_beside_notes_is_not_held_out() -> None:
    """Whichever of their hashes is the smaller."""
    for name in range(20):
        texts = [f"{name} " * 50_000, f"notes {name} " * 30]
        assert validation_of([content_hash(text.encode()) for text in texts], [len(text) for text in texts], 0.1) == [False, True]


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=2, max_size=30), st.floats(0, 0.999))
def test_D10_equal_documents_are_never_on_both_sides(texts: list[str], fraction: float) -> None:
    side = validation_of([content_hash(text.encode()) for text in texts], [len(text) for text in texts], fraction)
    train, validation = ({t for t, s in zip(texts, side, strict=True) if s == wanted} for wanted in (False, True))
    assert not train & validation
    assert not all(side)


def ids_of(tmp_path: Path, documents: list[tuple[int, str]], source: int, validation: bool,
           shares: bool = False) -> list[int]:
    corpus = encode_corpus(documents, Codes(), tmp_path / "spool", fraction=0.5,
                           group_of=(lambda s: s) if shares else (lambda s: 0))
    return [int(i) for piece in corpus.ids(source, validation) for i in piece]


def framed(*texts: str) -> list[int]:
    return [i for text in texts for i in (1, *map(ord, text), 1)]


def test_each_part_of_a_single_document_is_framed(tmp_path: Path) -> None:
    assert ids_of(tmp_path, [(0, "abcdef")], 0, False) == framed("abc")
    assert ids_of(tmp_path, [(0, "abcdef")], 0, True) == framed("def")


def test_sources_without_shares_are_one_corpus_with_shares_each_is_its_own(tmp_path: Path) -> None:
    documents = [(0, "abcd"), (1, "wxyz")]
    sides = [(source, validation) for source in (0, 1) for validation in (False, True)]
    one = [ids_of(tmp_path, documents, *side) for side in sides]
    assert sorted(map(len, one)) == [0, 0, 6, 6]
    own = [ids_of(tmp_path, documents, *side, shares=True) for side in sides]
    assert own == [framed("ab"), framed("cd"), framed("wx"), framed("yz")]


def test_reading_order_is_kept_on_each_side(tmp_path: Path) -> None:
    texts = [f"text number {i}" * (i % 5 + 1) for i in range(50)]
    side = validation_of([content_hash(text.encode()) for text in texts], [len(text) for text in texts], 0.5)
    for validation in (False, True):
        wanted = framed(*(text for text, s in zip(texts, side, strict=True) if s == validation))
        assert ids_of(tmp_path, [(0, text) for text in texts], 0, validation) == wanted


def test_empty_documents_are_not_documents(tmp_path: Path) -> None:
    assert ids_of(tmp_path, [(0, "")], 0, False) == []
    assert ids_of(tmp_path, [(0, "a")], 0, True) == framed("a")        # int(0.5 * 1) characters are for train: none


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="gave the id 98 and says that it has 98 ids"):
        encode_corpus([(0, "aaab")], Codes(98), tmp_path / "spool", fraction=0, group_of=lambda s: 0)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    encode_corpus([(0, "ab"), (0, "cde")], Codes(), tmp_path / "spool", fraction=0, group_of=lambda s: 0,
                  progress=lambda documents, characters: told.append((documents, characters)))
    assert told == [(2, 5)]

"""Cleaning changes what is broken and nothing else, and counts what it does."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threefold.text.clean import CleaningReport, clean, normalise
from threefold.text.sources import Document

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "quietly",
    "mix",
    "jugs",
    "of",
    "violet",
    "ink",
    "for",
    "their",
    "maps",
]


def document(text: str, source: str = "a.txt") -> Document:
    return Document(text, source, source)


def prose(seed: int, length: int = 80) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(length))


@given(st.text(alphabet=st.characters()))
def test_normalise_is_idempotent_and_leaves_clean_text_alone(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    if text.isascii() and text.isprintable():
        assert once is text


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("a\x00b\x07c\x7f\x9f", "abc"),
        ("\t\n  kept  \n\n", "\t\n  kept  \n\n"),
        ("e\u0301", "é"),
        ("\u1112\u1161\u11ab", "한"),
        ("a\x00\u0301", "á"),
        ("a\u2028b\x85c", "a\nb\nc"),
        ("👩‍👩‍👧", "👩‍👩‍👧"),
        ("", ""),
    ],
)
def test_normalise(text: str, cleaned: str) -> None:
    assert normalise(text) == cleaned


def test_D06_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert normalise("a\ud800b") == "a\ufffdb"


def test_clean_text_is_the_same_object() -> None:
    source = document("clean\ttext, 깨끗한 글\n")
    assert next(clean([source])) is source


def test_D10_duplicates_are_dropped_and_counted() -> None:
    report = CleaningReport()
    texts = [prose(1), prose(2), prose(1), "short", "short", prose(2) + " and one more word", "Short"]
    kept = list(clean([document(text, f"a:{i}") for i, text in enumerate(texts)], report))
    assert [found.text for found in kept] == [texts[0], texts[1], "short", "Short"]
    assert report.dropped == {"exact duplicate": 2, "near duplicate": 1}
    assert report.examples["near duplicate"] == ["a:5"]
    assert (report.read, report.kept) == (7, 4)
    assert report.characters_read == sum(map(len, texts)) and report.characters_kept == sum(
        len(found.text) for found in kept
    )
    assert report.to_dict()["dropped"] == report.dropped
    assert any("near duplicate" in reason for reason in report.dropped)


def test_duplicates_are_found_across_calls_with_one_report() -> None:
    report = CleaningReport()
    assert len(list(clean([document("x")], report))) == 1
    assert len(list(clean([document("x"), document("y")], report))) == 1


def test_what_is_kept_can_be_chosen() -> None:
    report = CleaningReport()
    assert [found.text for found in clean([document(text) for text in ("", " \n", "ab")], report)] == ["ab"] and report.dropped == {"empty": 2}
    near = [document(prose(1)), document(prose(1) + " more")]
    assert len(list(clean(near))) == 1 and len(list(clean(near, near_duplicates=False))) == 2


def test_what_was_mended_is_counted() -> None:
    report = CleaningReport()
    list(clean([document("a\r\nb"), document("a\x00"), document("e\u0301"), document("\ud800 x")], report))
    assert report.changed == {"line ends": 1, "control characters": 1, "not in NFC": 1, "lone surrogates": 1}


def test_a_clean_book_stays_as_it_is(shared_data: Callable[[str], Path]) -> None:
    text = shared_data("shakespeare/input.txt").read_text()
    (cleaned,) = clean([document(text)])
    assert cleaned.text == text

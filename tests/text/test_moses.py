"""Moses' rules as replacements give what the Moses tokenizer that transformers uses for BioGPT gives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.helpers import CODE, ENGLISH, KOREAN, SAMPLES
from tests.text.published import MEDICAL
from threefold.text import guard, moses

sacremoses = pytest.importorskip("sacremoses")
TEXTS = [
    *SAMPLES.values(), *CODE.split("\n"), *KOREAN.split("\n"), ENGLISH, *MEDICAL.split("\n"),
    "Dr. Smith vs. Mr. X. No. 5 and No. x, Art. 7 pp. 3 e.g. this. U.S.A. Ph.D. i.e. that. etc. And. so on...",
    "a,,b 5,,5 ,,, 1,000,000 a,5 5,a 5, ,x ²,³ Ⅷ,Ⅷ ٣,٣",
    "'a' 'b' rock'n'roll '' '\'\'\' x''y 'tis '90s 1990's 5's the boys' \"quoted\" it.' end.'",
    "a..b a...b .... . .. x.y. -- - a-b-c -a a- a--b well-known- 3-4 é-ü",
    "<s> & &amp; > [x] {y} `z` ``q'' http://a.b/c?d=e&f me@x.com |",
    "क्षत्रिय ◌̈ \u0560 ა ᲀ 中文，日本。 👩‍👩‍👧 \u00a0x\u3000y\x1cz\x85w \x01'x' \ufeff",
    "a\x00b \x07 'c' \ufffd x",
]
SIGNS = [*"aAbsSzZ059 '\",.-`&|<>[]();:?!$%@", *"éß²Ⅷ٣한가中ა◌क\u094d\u0345\u0301\u0560🚀\u200b\t\x01\x1c\u3000\xa0\ufffd", "'s", "..", "...",
         "Dr.", "No.", "e.g.", "x.", " ' ", "5,000", ",,", "'' ", "n't", " a ", "s' "]
WORDS = ["hello", "it", "'s", "boys", "'", '"', "&quot;", "&apos;", "&apos;s", "@-@", ".", ",", "(", ")", "[", "&#91;", "&#93;", "$",
         "€", "₾", "„", "“", "”", "`", "``", "''", "한", "가나", "中", "&amp;", "&lt;", "%", "?", "!", ":", "s", "¿", "...", "x's", "&#124;",
         "&amp;lt;", "yes'", "&bar;", "'5", "'é", ".)", "(["]


@cache
def ours() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": moses.splitting(), "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Sequence", "decoders": moses.joining()}, "model": {"type": "BPE", "vocab": {}, "merges": []}}))


@cache
def theirs() -> tuple[Any, Any]:
    return sacremoses.MosesTokenizer("en"), sacremoses.MosesDetokenizer("en")


def check_split(text: str) -> None:
    expected = theirs()[0].tokenize(text, aggressive_dash_splits=True, return_str=False, escape=True)
    assert ours().normalizer.normalize_str(text).split() == expected, ascii(text)


def check_joined(words: list[str]) -> None:
    text = "".join(f"{word} " for word in words)
    assert ours().decoder.decode([text]) == theirs()[1].detokenize(text.split()), words


def test_texts_are_cut_as_moses_does() -> None:
    for text in TEXTS:
        check_split(text)
        check_joined(ours().normalizer.normalize_str(text).split())


@given(parts=st.lists(st.sampled_from(SIGNS), max_size=16))
@settings(deadline=None, max_examples=600)
def test_signs_in_any_order_are_cut_as_moses_does(parts: list[str]) -> None:
    check_split("".join(parts))


@given(text=st.text(st.characters(exclude_characters="\ufdd0", exclude_categories=["Cs"]), max_size=12))
@settings(deadline=None, max_examples=400)
def test_any_text_is_cut_as_moses_does(text: str) -> None:
    check_split(text)


@given(words=st.lists(st.sampled_from(WORDS), max_size=14))
@settings(deadline=None, max_examples=600)
def test_words_in_any_order_are_joined_as_moses_does(words: list[str]) -> None:
    check_joined(words)


def test_books_are_cut_as_moses_does(shared_data: Callable[[str], Path]) -> None:
    for line in shared_data("tokenizers/sentencepiece_test/botchan.txt").read_text().split("\n")[::9]:
        check_split(line)
        check_joined(theirs()[0].tokenize(line, aggressive_dash_splits=True))


def test_long_words_cost_no_more_than_their_length() -> None:
    """Patterns that try every pair of signs would take minutes here, and be stopped by the library."""
    for text in ("a." * 20_000 + "a", "." * 20_000, "a'" * 20_000, "a-." * 20_000, "' " * 20_000, '" a ' * 9_000, ", " * 20_000):
        begun = time.perf_counter()
        words = ours().normalizer.normalize_str(text)
        assert len(ours().decoder.decode([words])) > 0
        assert time.perf_counter() - begun < 10, text[:4]


def test_a_longer_run_of_quotes_always_opens_here() -> None:
    """Moses counts each spelling of a run of its own; a rule of a tokenizer.json can count those that it names."""
    text = "''' a ''' b "
    assert theirs()[1].detokenize(text.split()) == "'''a''' b"
    assert ours().decoder.decode([text]) == "'''a '''b"


def test_a_mark_in_a_text_becomes_a_sign_that_is_as_unknown() -> None:
    assert theirs()[0].tokenize("a\ufdd0b c") == ["a", "\ufdd0", "b", "c"]
    assert ours().normalizer.normalize_str("a\ufdd0b c").split() == ["a", "\ufdd6", "b", "c"]


def test_the_word_that_moses_itself_uses_as_a_mark_stays_as_it_is() -> None:
    assert theirs()[0].tokenize("a DOTMULTI b") == ["a", ".", "b"]
    assert ours().normalizer.normalize_str("a DOTMULTI b") == "a DOTMULTI b"


def test_the_rules_are_known_by_heart_and_keep_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_probe", lambda *rest: pytest.fail("a known rule was tried"))
    words = {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "}
    guard.checked({"normalizer": moses.splitting(), "pre_tokenizer": {"type": "WhitespaceSplit"},
                   "decoder": {"type": "Sequence", "decoders": [words, {"type": "Fuse"}, *moses.joining()]},
                   "model": {"type": "BPE", "vocab": {}, "merges": []}}, "x")

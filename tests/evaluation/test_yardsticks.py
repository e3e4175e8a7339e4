"""Yardsticks: counting models against a plain dictionary, compressors against their tools, and in the order one
expects."""

from __future__ import annotations

import gzip
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from threefold.evaluation.yardsticks import compressors, ngram_bits, text_yardsticks, token_yardsticks


class WittenBell:
    """An interpolated n-gram model as it stands in the book: a recursion over dictionaries."""

    def __init__(self, train: list[list[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in train:
            for i in range(1, len(ids)):
                for n in range(min(order - 1, i) + 1):
                    self.counts[tuple(ids[i - n:i])][ids[i]] += 1

    def probability(self, history: tuple[int, ...], token: int) -> float:
        lower = 1 / self.vocab_size if not history else self.probability(history[1:], token)
        followers = self.counts.get(history)
        if not followers:
            return lower
        return (followers[token] + len(followers) * lower) / (followers.total() + len(followers))

    def bits(self, ids: list[int]) -> float:
        return -sum(
            math.log2(self.probability(tuple(ids[max(0, i - self.order + 1) : i]), ids[i])) for i in range(1, len(ids))
        )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngrams_equal_the_recursion(order: int) -> None:
    rng = np.random.default_rng(order)
    train, validation = (
        [rng.integers(0, 6, size=n).tolist() for n in sizes] for sizes in ([40, 1, 9, 2, 60], [20, 1, 2, 15])
    )
    expected = sum(WittenBell(train, order, 7).bits(ids) for ids in validation)
    assert ngram_bits([np.array(t) for t in train], [np.array(v) for v in validation], order, 7) == pytest.approx(
        expected, rel=1e-12
    )


def test_counting_in_a_table_and_by_sorting_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    train, validation = [rng.integers(0, 5, size=90)], [rng.integers(0, 5, size=30)]
    dense = ngram_bits(train, validation, 3, 6)
    monkeypatch.setattr("threefold.evaluation.yardsticks.DENSE", 0)
    assert ngram_bits(train, validation, 3, 6) == dense


def test_probabilities_sum_to_one() -> None:
    train = [np.array([0, 1, 2, 1, 0, 1])]
    for context in range(4):
        assert sum(2 ** -ngram_bits(train, [np.array([context, token])], 2, 4) for token in range(4)) == pytest.approx(
            1, rel=1e-12
        )


def test_without_training_text_every_symbol_is_alike() -> None:
    assert ngram_bits([], [np.array([1, 2, 3])], 2, 8) == 6


def test_token_figures_are_per_byte_of_the_predicted_ids() -> None:
    ids, sizes = np.array([0, 1, 2, 1, 0]), [None, b"ab", b"c"]
    figures = token_yardsticks([ids], [ids], 3, sizes)
    assert figures["token unigram"] == pytest.approx(ngram_bits([ids], [ids], 1, 3) / 5)
    assert token_yardsticks([ids], [np.array([0, 0])], 3, sizes) == {}


def test_compressors_are_the_ones_people_know() -> None:
    text = Path(__file__).read_bytes()
    figures = compressors(b"", text)
    assert figures["gzip"] == pytest.approx(
        8 * (len(gzip.compress(text)) - 18) / len(text), rel=1e-3
    )  # 18 bytes are gzip's header
    assert figures["gzip primed"] == figures["gzip"]
    known = compressors(text, text)
    assert known["gzip primed"] < 0.2 * known["gzip"] and known["xz primed"] < 0.2 * known["xz"]


def test_the_order_is_the_expected_one(shared_data: Callable[[str], Path]) -> None:
    text = shared_data("shakespeare/input.txt").read_bytes()
    cut = int(0.9 * len(text))
    started = time.process_time()
    figures = text_yardsticks([text[:cut]], [text[cut:]])
    assert time.process_time() - started < 6  # seconds of one processor; about one where nothing else runs
    assert 8 > figures["byte unigram"] > figures["byte bigram"] > figures["byte 4-gram"] > 1
    assert figures["byte unigram"] > figures["gzip"] > figures["gzip primed"] > figures["xz primed"]
    assert figures["byte unigram"] == pytest.approx(
        4.83, abs=0.01
    )  # its entropy, all but exactly: 1 M bytes fix 65 frequencies


def test_nothing_to_measure_gives_no_figure() -> None:
    assert text_yardsticks([b"abc"], []) == text_yardsticks([b"abc"], [b""]) == {}

"""Validation windows: each id but the first of a document once, never across documents, whatever shares a batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.helpers import numbered, shards_of
from threefold.data.windows import document_windows, validation_windows
from threefold.errors import DataError, UsageError


def reference(documents: list[list[int]], context: int) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The definition, in plain words: (inputs, what they predict) of each window."""
    windows: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for t in documents:
        for start in range(0, len(t) - 1, context):
            stop = min(start + context, len(t) - 1)
            windows[tuple(t[start:stop]), tuple(t[start + 1:stop + 1])] += 1
    return windows


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).filter(lambda n: max(n) > 1),
       context=st.integers(1, 45), batch_tokens=st.integers(1, 200), parts=st.integers(3, 50))
@settings(max_examples=150, deadline=None)
def test_windows_are_those_of_the_definition(lengths: list[int], context: int, batch_tokens: int, parts: int) -> None:
    documents = numbered(*lengths)
    shards = shards_of(numbered(5), validation=[documents], part_tokens=parts)
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for batch in validation_windows(shards, context, batch_tokens=batch_tokens):
        assert batch.input_ids.shape[1] <= context and (batch.input_ids.numel() <= batch_tokens or len(batch) == 1)
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            length = sum(label != -100 for label in labels)
            assert labels[length:] == [-100] * (len(labels) - length)
            found[tuple(ids[:length]), tuple(labels[:length])] += 1
    assert found == reference(documents, context)


def test_bytes_are_those_of_the_predicted_ids() -> None:
    token_bytes = [None, b"a", "é".encode(), b"", b"four"]
    batches = list(document_windows([[0, 4, 2, 0], [0, 1], [0]], 2, token_bytes=token_bytes))
    assert sum(batch.bytes for batch in batches) == 4 + 2 + 0 + 1
    assert sum(int((batch.labels != -100).sum()) for batch in batches) == 4
    assert all(batch.bytes == 0 for batch in document_windows([[0, 4, 2]], 2))


def test_short_documents_cost_little_padding() -> None:
    rng = np.random.default_rng(0)
    documents = [[2] * int(n) for n in rng.integers(2, 60, 5000)]
    batches = list(document_windows(documents, 128))
    places = sum(batch.labels.numel() for batch in batches)
    labels = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert labels == sum(len(document) - 1 for document in documents)
    assert places < 1.1 * labels and len(batches) < 30


def test_a_subset_is_always_the_same_and_part_of_the_whole() -> None:
    shards = shards_of(numbered(5), validation=[numbered(300, 50, 7)])

    def names(subset: int | None) -> list[int]:
        return [int(s) for batch in validation_windows(shards, 8, subset=subset) for s in batch.samples]

    assert names(10) == names(10) and len(set(names(10))) == 10
    assert sorted(names(None)) == sorted(names(10_000)) == list(range(38 + 7 + 1))


def test_several_sources_come_one_after_another_or_alone() -> None:
    shards = shards_of(numbered(5), numbered(5), validation=[numbered(20), numbered(12, first=900)])
    sources = [int(s) for batch in validation_windows(shards, 8) for s in batch.sources]
    assert sources == [0] * 3 + [1] * 2
    assert [int(s) for batch in validation_windows(shards, 8, source=1) for s in batch.sources] == [1] * 2
    assert sum(len(batch) for batch in validation_windows(shards, 8, split="train")) == 2


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        list(validation_windows(shards_of(numbered(5)), 8))
    with pytest.raises(DataError, match="nothing to predict"):
        list(document_windows([[5], []], 8))
    with pytest.raises(UsageError):
        list(document_windows([[5, 6]], 0))

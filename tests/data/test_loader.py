"""Batches: every token a target exactly once an epoch, the same rows however they are asked for."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.helpers import numbered, shards_of
from threefold.data.loader import Batch, Loader
from threefold.data.mixture import PATTERN, largest_remainder
from threefold.errors import ConfigError, DataError, UsageError

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 1)


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in every field, bit by bit."""
    def equal(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        return x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y)

    tensors = ("input_ids", "labels", "documents", "positions")
    return (all(equal(getattr(a, name), getattr(b, name)) for name in tensors)
            and np.array_equal(a.samples, b.samples) and np.array_equal(a.sources, b.sources))


def epoch_of(loader: Loader, epoch: int) -> Batch:
    """All samples of one epoch as one batch, from a loader with batches of one row."""
    assert loader.batch_size == 1
    rows = [loader.batch(step) for step in range(epoch * loader.samples, (epoch + 1) * loader.samples)]
    return Batch(torch.cat([b.input_ids for b in rows]), torch.cat([b.labels for b in rows]), None, None,
                 np.concatenate([b.samples for b in rows]), np.concatenate([b.sources for b in rows]))


# Exactly once


@given(lengths=lengths, context=st.integers(1, 40), seed=st.integers(0, 3), epoch=st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_every_token_with_a_predecessor_is_a_target_once_an_epoch(lengths: list[int], context: int, seed: int,
                                                                  epoch: int) -> None:
    documents = numbered(*lengths)
    batch = epoch_of(Loader(shards_of(documents), context, 1, seed), epoch)
    pairs = Counter(zip(batch.input_ids.ravel().tolist(), batch.labels.ravel().tolist(), strict=True))
    wanted = Counter(pair for document in documents for pair in itertools.pairwise(document))
    assert {pair: count for pair, count in pairs.items() if pair[1] != -100} == wanted


@given(lengths=lengths, context=st.integers(1, 12), batch_size=st.integers(1, 5), parts=st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_documents_and_positions_tell_pieces_apart(lengths: list[int], context: int, batch_size: int,
                                                   parts: int) -> None:
    """Within a piece ids follow one another; a piece ends where a document or the ring ends, and nowhere else."""
    documents = numbered(*lengths)
    document_of = {token: number for number, document in enumerate(documents) for token in document}
    loader = Loader(shards_of(documents, part_tokens=parts), context, batch_size, 1)
    for step in range(2 * loader.epoch_steps):
        batch = loader.batch(step)
        pieces = torch.zeros_like(batch.input_ids) if batch.documents is None else batch.documents
        positions = torch.arange(context).expand(batch_size, -1) if batch.positions is None else batch.positions
        assert (batch.documents is None) == (batch.positions is None) == (int(pieces.max()) == 0)
        rows = (x.tolist() for x in (batch.input_ids, batch.labels, pieces, positions))
        for ids, labels, piece, position in zip(*rows, strict=True):
            assert piece[0] == 0 and position[0] == 0
            length = max((t + 1 for t in range(context) if ids[t] != 1), default=0)         # 1 is the filler
            assert labels[length:] == [-100] * (context - length)
            for t in range(1, context):
                inside = t < length and ids[t] == ids[t - 1] + 1 and document_of[ids[t]] == document_of[ids[t - 1]]
                assert piece[t] - piece[t - 1] == (0 if inside or t > length else 1)
                assert position[t] == (position[t - 1] + 1 if piece[t] == piece[t - 1] else 0)


def test_positions_stay_below_the_context_and_types_are_as_promised() -> None:
    loader = Loader(shards_of(numbered(50, 3, 40)), 16, 3, 0)
    batch = loader.batch(0)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64 and batch.input_ids.shape == (3, 16)
    assert batch.documents is not None and batch.documents.dtype == torch.int32
    assert batch.positions is not None and batch.positions.dtype == torch.int64 and int(batch.positions.max()) < 16
    assert len(batch) == 3 and batch.samples.shape == batch.sources.shape == (3,)


def test_one_long_document_needs_no_mask_but_where_the_ring_closes() -> None:
    loader = Loader(shards_of(numbered(1000)), 10, 1, 0)
    masked = sum(loader.batch(step).documents is not None for step in range(loader.samples))
    assert masked <= 2                      # the row over the end of the ring, and the last sample of the epoch


def test_windows_differ_between_epochs() -> None:
    loader = Loader(shards_of(numbered(500)), 50, 1, 0)
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not set(first.input_ids[:, 0].tolist()) & set(second.input_ids[:, 0].tolist())
    assert [int(s) % loader.samples for s in first.samples] != [int(s) % loader.samples for s in second.samples]


def test_the_order_depends_on_data_and_seed() -> None:
    def order(loader: Loader) -> list[int]:
        return [int(loader.batch(step).samples[0]) for step in range(loader.samples)]

    documents = numbered(500)
    assert order(Loader(shards_of(documents), 10, 1, 0)) == order(Loader(shards_of(documents), 10, 1, 0))
    assert order(Loader(shards_of(documents), 10, 1, 0)) != order(Loader(shards_of(documents), 10, 1, 1))
    assert order(Loader(shards_of(documents), 10, 1, 0)) != order(Loader(shards_of(numbered(500, first=7)), 10, 1, 0))


# Resuming, workers, micro-batches


def test_D02_resume_at_every_step_of_two_epochs() -> None:
    shards = shards_of(numbered(37, 5, 1, 60), numbered(21, 2, first=900))
    loader = Loader(shards, 8, 4, 3)
    steps = -(-2 * loader.samples // 4)
    whole = [loader.batch(step) for step in range(steps)]
    for k in range(steps):
        resumed = Loader(shards, 8, 4, 3)
        assert all(same(resumed.batch(step), whole[step]) for step in range(k, min(k + 3, steps)))
    ids = np.concatenate([batch.samples for batch in whole])
    for epoch in (0, 1):
        span = range(epoch * loader.samples, (epoch + 1) * loader.samples)
        assert sorted(ids[span.start:span.stop].tolist()) == list(span)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_D03_worker_count_does_not_change_the_batches(workers: int) -> None:
    loader = Loader(shards_of(numbered(37, 5, 1, 60)), 8, 4, 3)
    got = list(loader.follow(range(2, 11), workers))
    assert [step for step, _ in got] == list(range(2, 11))
    assert all(same(batch, loader.batch(step)) for step, batch in got)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_D03_micro_batches_and_ranks_are_the_same_rows(size: int) -> None:
    loader = Loader(shards_of(numbered(37, 5, 1, 60), numbered(30, first=900), shares=[0.7, 0.3]), 8, 7, 3)
    for step in range(6):
        whole = loader.batch(step)
        pieces = list(whole.split(size))
        rows = [slice(size * i, size * (i + 1)) for i in range(len(pieces))]
        assert all(same(piece, loader.batch(step, rows=part)) for piece, part in zip(pieces, rows, strict=True))
        assert [len(piece) for piece in pieces] == [min(size, 7 - start) for start in range(0, 7, size)]
        assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), whole.input_ids)
        assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)
        assert np.concatenate([piece.samples for piece in pieces]).tolist() == whole.samples.tolist()
        for piece, start in zip(pieces, range(0, 7, size), strict=True):
            if piece.documents is not None:
                assert whole.documents is not None and torch.equal(piece.documents, whole.documents[start:start + size])
            elif whole.documents is not None:
                assert not whole.documents[start:start + size].any()
    assert loader.batch(0, rows=slice(1, None, 3)).samples.tolist() == loader.batch(0).samples[1::3].tolist()


def test_D03_another_batch_size_takes_the_same_samples_in_the_same_order() -> None:
    shards = shards_of(numbered(100, 50))
    orders = [np.concatenate([Loader(shards, 8, size, 3).batch(step).samples for step in range(24 // size)])
              for size in (1, 2, 4, 8)]
    assert all(np.array_equal(order, orders[0]) for order in orders)


def test_following_goes_on_without_end_and_stops_cleanly() -> None:
    loader = Loader(shards_of(numbered(37)), 8, 2, 0)
    before = threading.active_count()
    batches = loader.follow(itertools.count(5), workers=2)
    assert [next(batches)[0] for _ in range(20)] == list(range(5, 25))
    batches.close()                                                     # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert [step for step, _ in loader.follow([4, 9, 2], workers=2)] == [4, 9, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_caller(workers: int) -> None:
    with pytest.raises(UsageError):
        list(Loader(shards_of(numbered(37)), 8, 2, 0).follow([0, -1], workers))


def test_R03_no_threads_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    loader = Loader(shards_of(numbered(37, 20)), 8, 2, 0)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    got = list(loader.follow(range(6), workers=4))
    assert [step for step, _ in got] == list(range(6)) and all(same(batch, loader.batch(step)) for step, batch in got)


def test_D03_threads_share_a_loader_and_leave_nothing_in_it() -> None:
    """Data so small that each row is an epoch of its own."""
    loader, fresh = (Loader(shards_of(numbered(9), numbered(5, first=900)), 16, 3000, 1) for _ in range(2))
    before = {name: repr(value) for name, value in vars(loader).items()}
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(loader.batch, [*range(8), *range(8)]))
    assert {name: repr(value) for name, value in vars(loader).items()} == before
    assert all(same(batch, fresh.batch(number % 8)) for number, batch in enumerate(batches))


# Mixtures


@given(sizes=st.lists(st.integers(2, 60), min_size=1, max_size=4), context=st.integers(1, 9), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_without_shares_an_epoch_takes_every_sample_once(sizes: list[int], context: int, seed: int) -> None:
    loader = Loader(shards_of(*(numbered(size, first=100 * (i + 1)) for i, size in enumerate(sizes))), context, 1, seed)
    for epoch in (0, 2):
        batch = epoch_of(loader, epoch)
        assert sorted(batch.samples.tolist()) == list(range(epoch * loader.samples, (epoch + 1) * loader.samples))
        assert Counter(batch.sources.tolist()) == {i: -(-(size - 1) // context) for i, size in enumerate(sizes)}
        assert ((batch.input_ids[:, 0].numpy() // 100 - 1) == batch.sources).all()


def test_shares_can_be_set_aside() -> None:
    loader = Loader(shards_of(numbered(90), numbered(900, first=1000), shares=[0.9, 0.1]), 9, 1, 2, shares=False)
    assert sorted(epoch_of(loader, 0).samples.tolist()) == list(range(loader.samples)) == list(range(110))


def test_shares_are_kept_exactly_and_each_source_has_epochs_of_its_own() -> None:
    documents = numbered(90), numbered(900, first=1000), numbered(50, first=5000)
    loader = Loader(shards_of(*documents, shares=[0.25, 0.7, 0.05]), 9, 10, 2)
    batches = [loader.batch(step) for step in range(PATTERN // 10)]
    sources = np.concatenate([batch.sources for batch in batches])
    assert np.bincount(sources).tolist() == [2500, 7000, 500]
    assert np.bincount(sources[:1000]).tolist() == pytest.approx([250, 700, 50], abs=60)
    ids = np.concatenate([batch.samples for batch in batches])
    for source, n in enumerate((10, 100, 6)):  # ceil((tokens - 1) / context)
        mine = ids[sources == source]
        described = [loader.describe(sample) for sample in mine[:2 * n]]
        assert [d["epoch"] for d in described] == [0] * n + [1] * n
        for epoch in (described[:n], described[n:]):
            assert sorted(d["sample"] for d in epoch) == list(range(n))


def test_a_source_without_a_share_gets_what_is_left() -> None:
    documents = numbered(91), numbered(181, first=1000), numbered(50, first=5000)
    loader = Loader(shards_of(*documents, shares=[None, None, 0.4]), 9, PATTERN, 2)
    assert np.bincount(loader.batch(0).sources).tolist() == [2000, 4000, 4000]


@pytest.mark.parametrize(("shares", "word"), [
    ([0.5, 0.00001], "less than one sample"), ([1.0, None], "leaves nothing"), ([-0.1, 1.1], "-0.1"),
    ([float("nan"), 0.5], "nan"), ([0.0, 0.0], "all shares are 0"),
])
def test_shares_that_cannot_be_kept(shares: list[float | None], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Loader(shards_of(numbered(90), numbered(90, first=1000), shares=shares), 9, 1, 0)


def test_a_share_of_a_source_without_text_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"`source-1` has the share 0.5 and no text"):
        Loader(shards_of(numbered(90), [], shares=[0.5, 0.5]), 9, 1, 0)


def test_a_source_without_text_and_share_takes_no_part() -> None:
    loader = Loader(shards_of(numbered(90), [], numbered(40, first=900)), 9, 5, 0)
    assert {int(s) for step in range(20) for s in loader.batch(step).sources} == {0, 2}


@given(shares=st.lists(st.floats(0.001, 10), min_size=1, max_size=9))
def test_largest_remainder_is_within_one(shares: list[float]) -> None:
    counts = largest_remainder(shares, 1000)
    assert sum(counts) == 1000
    assert all(abs(count - share * 1000 / sum(shares)) < 1 for count, share in zip(counts, shares, strict=True))


# Small data


def test_D08_data_smaller_than_a_batch_is_gone_through_several_times_and_noted() -> None:
    loader = Loader(shards_of(numbered(20)), 8, 10, 0)
    batch = loader.batch(0)
    assert loader.samples == 3 and Counter((batch.samples // 3).tolist()) == {0: 3, 1: 3, 2: 3, 3: 1}
    assert loader.notes == ["the data holds 3 samples of 8 tokens, fewer than a batch of 10: "
                            "a step goes through it 3.3 times"]


def test_D08_a_context_longer_than_the_data_is_filled_and_noted() -> None:
    loader = Loader(shards_of(numbered(5)), 16, 2, 0)
    batch = loader.batch(0)
    assert (batch.labels != -100).sum(1).tolist() == [4, 4]
    assert loader.notes[0] == ("`source-0` holds 5 tokens, fewer than a context of 16: "
                               "12 places of each of its samples stay empty")


@pytest.mark.parametrize("documents", [[], [[5]]])
def test_D08_nothing_to_predict_is_an_error(documents: list[list[int]]) -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        Loader(shards_of(documents), 8, 2, 0)


def test_D08_documents_of_one_token_are_never_targets_and_never_end_an_epoch_early() -> None:
    loader = Loader(shards_of([[5], [6], [7]]), 8, 2, 0)
    assert (loader.batch(0).labels == -100).all()


@pytest.mark.parametrize(("context", "batch_size"), [(0, 1), (1, 0), (-3, 4)])
def test_sizes_below_one_are_refused(context: int, batch_size: int) -> None:
    with pytest.raises(UsageError):
        Loader(shards_of(numbered(9)), context, batch_size, 0)


# Names


def test_a_sample_id_says_where_the_sample_comes_from() -> None:
    documents = [numbered(37, 5, 60), numbered(30, 4, first=900)]
    loader = Loader(shards_of(*documents), 8, 1, 3)
    flat = [np.concatenate([np.asarray(d) for d in source]) for source in documents]
    for step in range(3 * loader.samples):
        batch = loader.batch(step)
        said = loader.describe(int(batch.samples[0]))
        source = int(batch.sources[0])
        ids = np.concatenate([flat[source][a:b] for a, b in said["tokens"]])
        assert said["source"] == f"source-{source}" and said["epoch"] == step // loader.samples
        assert batch.input_ids[0, :len(ids)].tolist() == ids.tolist()
        for (a, b), (first, last) in zip(said["tokens"], said["documents"], strict=True):
            assert flat[source][a] in documents[source][first] and flat[source][b - 1] in documents[source][last]


def test_helpers_for_the_log() -> None:
    loader = Loader(shards_of(numbered(801)), 8, 16, 0)
    assert (loader.samples, loader.epoch_steps, loader.tokens_per_step) == (100, 7, 128)

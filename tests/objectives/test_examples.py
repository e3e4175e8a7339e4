"""What each objective makes of a row: nothing is lost, and the shares are those of the papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.objectives.conftest import (
    CLS,
    CONTEXT,
    EOS,
    MASK,
    PAD,
    PAIRS,
    SENTINELS,
    SEP,
    SIZE,
    SPECIAL,
    learner,
    loader_of,
    text_shards,
    vocabulary,
)
from threefold.data.loader import IGNORED, Batch, Loader
from threefold.errors import TokenizerError
from threefold.objectives import Masked, Prefix, Replaced, Seq2Seq, Span, masked
from threefold.objectives.replaced import Duel
from threefold.objectives.span import counts, stretches

MANY = text_shards(documents=4, length=4000)


def rows_of(objective: object, steps: int = 40, rows: int = 16) -> list:
    loader = loader_of(objective, rows=rows, shards=MANY)  # type: ignore[arg-type]
    return [loader.batch(step) for step in range(steps)]


def originals(objective: object, steps: int = 40, rows: int = 16) -> list:
    loader = Loader(MANY, objective.span(CONTEXT), rows, 0)  # type: ignore[attr-defined]
    return [loader.batch(step) for step in range(steps)]


def text_of(batch: Batch, row: int) -> list[int]:
    """A row as the loader cuts it, without what fills it up."""
    assert batch.lengths is not None
    return batch.input_ids[row].tolist()[:batch.lengths[row]]


# -- masked ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_fifteen_in_a_hundred_are_chosen_of_which_eight_in_ten_are_hidden(whole: bool) -> None:
    """Over 14,000 tokens the shares lie within four standard deviations."""
    objective = Masked(vocabulary(), seed=0, whole_words=whole)
    chosen = hidden = kept = places = 0
    for batch, before in zip(rows_of(objective), originals(objective), strict=True):
        learnt = batch.labels != IGNORED
        chosen += int(learnt.sum())
        hidden += int((batch.input_ids[learnt] == MASK).sum())
        kept += int((batch.input_ids[learnt] == batch.labels[learnt]).sum())
        places += before.input_ids.numel()
        text = batch.labels.where(learnt, batch.input_ids)[:, 1:-1]
        assert torch.equal(text, before.input_ids), "what is seen and what is learnt are together the text"
        assert (batch.input_ids[:, 0] == CLS).all() and (batch.input_ids[:, -1] == SEP).all()
    assert 0.13 < chosen / places < (0.17 if whole else 0.15), "a row of 22 has 3, or as many as whole words come near to"
    deviation = (0.8 * 0.2 / chosen) ** 0.5
    assert abs(hidden / chosen - 0.8) < 4 * deviation and abs(kept / chosen - 0.1) < 4 * (0.09 / chosen) ** 0.5 + 1 / SIZE


def test_special_tokens_are_neither_chosen_nor_drawn() -> None:
    for batch in rows_of(Masked(vocabulary(), seed=0)):
        learnt = batch.labels != IGNORED
        assert (batch.labels[learnt] >= SPECIAL).all() and (batch.labels[learnt] < SIZE - SENTINELS).all()
        other = learnt & (batch.input_ids != MASK)
        assert (batch.input_ids[other] >= SPECIAL).all() and (batch.input_ids[other] < SIZE - SENTINELS).all()


def test_whole_words_are_hidden_whole() -> None:
    words = vocabulary()
    for batch in rows_of(Masked(words, seed=0, whole_words=True)):
        learnt = (batch.labels != IGNORED).numpy()
        text = batch.labels.where(batch.labels != IGNORED, batch.input_ids).numpy()
        for row in range(len(batch)):
            word = np.cumsum(words.starts_word[text[row]])
            for number in np.unique(word[learnt[row]]):
                inside = (word == number) & ~words.special[text[row]]
                assert learnt[row][inside].all()


def test_pairs_are_halves_of_a_row_or_of_two() -> None:
    objective = Masked(vocabulary(), seed=0, next_sentence=True)
    follow = 0
    for batch, before in zip(rows_of(objective), originals(objective), strict=True):
        assert batch.pairs is not None and batch.types is not None
        text = batch.labels.where(batch.labels != IGNORED, batch.input_ids)
        for row in range(len(batch)):
            line, kinds = text[row].tolist(), batch.types[row].tolist()
            first_end = line.index(SEP)
            assert line[0] == CLS and kinds == [0] * (first_end + 1) + [1] * (kinds.count(1)) + [0] * (len(kinds) - first_end - 1 - kinds.count(1))
            second = line[first_end + 1:first_end + kinds.count(1)]
            assert line[first_end + kinds.count(1)] == SEP
            first, whole = line[1:first_end], text_of(before, row)
            assert first == whole[:len(first)]
            assert second and (second == whole[len(first):][:len(second)]) == (int(batch.pairs[row]) == 0)
            follow += int(batch.pairs[row]) == 0
    rows = 40 * 16
    assert abs(follow / rows - 0.5) < 4 * (0.25 / rows) ** 0.5


def test_the_length_of_a_pair_does_not_tell_whether_it_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, once all as they follow and once none: every pair is as long."""
    sizes = []
    for draw in (0.9, 0.1):
        class Fixed:
            def __init__(self, usual: Any) -> None:
                self.permutation, self.usual = usual.permutation, usual

            def random(self, *shape: int, draw: float = draw) -> Any:
                return self.usual.random(*shape) if shape else draw

            def integers(self, *given: Any, **more: Any) -> Any:
                return self.usual.integers(*given, **more)

        usual = masked.noise_of
        with monkeypatch.context() as changed:
            changed.setattr(masked, "noise_of", lambda *words, kind=Fixed, old=usual: kind(old(*words)))
            batches = list(rows_of(Masked(vocabulary(), seed=0, next_sentence=True)))
        assert {int(kind) for batch in batches for kind in batch.pairs} == {int(draw < 0.5)}  # type: ignore[union-attr]
        sizes.append([(int((batch.types[row] == 1).sum()), int(batch.attention_mask[row].sum()) if batch.attention_mask is not None else -1)
                      for batch in batches for row in range(len(batch))])  # type: ignore[index]
    assert sizes[0] == sizes[1] and len({size for size, _ in sizes[0]}) > 3


def test_a_short_row_is_filled_and_the_filling_is_seen_by_nobody() -> None:
    objective = Masked(vocabulary(), seed=0)
    batch = loader_of(objective, rows=1, shards=text_shards(documents=1, length=9)).batch(0)
    assert batch.attention_mask is not None and batch.attention_mask[0].tolist() == [1] * 10 + [0] * (CONTEXT - 10)
    assert batch.input_ids[0, 9] == SEP and (batch.input_ids[0, 10:] == PAD).all() and (batch.labels[0, 10:] == IGNORED).all()


# -- replaced ----------------------------------------------------------------------------------------------------------


def test_the_generator_fills_masks_alone_and_what_it_hits_is_not_replaced() -> None:
    model, objective = learner(PAIRS["replaced-electra"])
    assert isinstance(objective, Replaced) and isinstance(model, Duel)
    batch = loader_of(objective, rows=16, shards=MANY).batch(0)
    _, _, states = model.generator.loss_rows(batch.input_ids, batch.labels, batch.positions, batch.documents)
    corrupted, labels = objective._corrupted(model.generator, batch, states)
    hiding = batch.labels != IGNORED
    assert torch.equal(corrupted[~hiding], batch.input_ids[~hiding])
    assert torch.equal(labels == 1, (corrupted != batch.labels) & hiding)
    parts = list(batch.split(5))
    pieces = []
    for part in parts:
        _, _, some = model.generator.loss_rows(part.input_ids, part.labels, part.positions, part.documents)
        pieces.append(objective._corrupted(model.generator, part, some)[0])
    assert torch.equal(torch.cat(pieces), corrupted), "drawn alike in other pieces"


def test_tokens_are_drawn_as_likely_as_the_generator_says() -> None:
    """One place, 4,000 draws against the softmax: the largest distance of the two distributions is that of chance."""
    model, objective = learner(PAIRS["replaced-electra"])
    assert isinstance(objective, Replaced) and isinstance(model, Duel)
    batch = loader_of(objective, rows=1, shards=MANY).batch(0)
    count = 4000
    many = dataclasses.replace(
        batch, **{name: tensor.expand(count, *tensor.shape[1:]).clone() for name, tensor in batch.tensors().items()},
        samples=np.zeros(count, dtype=np.int64), sources=np.zeros(count, dtype=np.int64))
    many = dataclasses.replace(many, draws=torch.rand(many.input_ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with torch.no_grad():
        states = model.generator.hidden(many.input_ids, many.positions, many.documents)
        corrupted, _ = objective._corrupted(model.generator, many, states)
        place = int((batch.labels[0] != IGNORED).nonzero()[0])
        expected = model.generator.lm_head(states[0, place], model.transformer.embed.weight).softmax(-1)
    found = torch.bincount(corrupted[:, place], minlength=SIZE) / count
    assert float((found.cumsum(0) - expected.cumsum(0)).abs().max()) < 1.95 / count**0.5  # Kolmogorov-Smirnov, 0.1 %


def test_the_discriminators_loss_does_not_move_the_generator() -> None:
    model, objective = learner(PAIRS["replaced-electra"])
    terms = {term.name: term for term in objective.terms(model, loader_of(objective).batch(0))}
    terms["discriminator"].sum.backward()
    assert isinstance(model, Duel)
    shared = model.transformer.embed.weight
    assert shared is model.generator.transformer.embed.weight and shared.grad is not None
    assert all(p.grad is None for name, p in model.generator.named_parameters() if "transformer.embed" not in name)


# -- span --------------------------------------------------------------------------------------------------------------


def test_stretches_put_back_are_the_text() -> None:
    objective = Span(vocabulary(), seed=0)
    taken = 0
    for batch, before in zip(rows_of(objective), originals(objective), strict=True):
        for row in range(len(batch)):
            read = [i for i in batch.input_ids[row].tolist() if i != PAD]
            said = [i for i in batch.labels[row].tolist() if i != IGNORED]
            assert read[-1] == EOS and said[-1] == EOS
            stretch: dict[int, list[int]] = {}
            for i in said[:-1]:
                stretch.setdefault(i, []) if i >= SIZE - SENTINELS else stretch[list(stretch)[-1]].append(i)
            whole = [j for i in read[:-1] for j in stretch.get(i, [i])]
            assert whole == text_of(before, row)
            assert list(stretch) == list(range(SIZE - SENTINELS, SIZE - SENTINELS + len(stretch))), "in order, and one that ends"
            taken += sum(map(len, stretch.values()))
    lengths = np.concatenate([before.lengths for before in originals(objective)])
    assert taken == sum(counts(int(length))[0] for length in lengths)


def test_stretches_of_any_text_are_inside_it_and_apart() -> None:
    for length in (2, 3, 5, 12, 100, 1000):
        for seed in range(20):
            found = stretches(length, np.random.default_rng(seed))
            assert sum(stop - start for start, stop in found) == counts(length)[0] and len(found) == counts(length)[1]
            edges = [edge for pair in found for edge in pair]
            assert edges == sorted(set(edges)) and edges[0] >= 0 and edges[-1] <= length
    assert stretches(1, np.random.default_rng(0)) == []


@pytest.mark.parametrize("context", [8, 16, 64, 128, 512])
def test_a_row_of_spans_just_fits_the_context(context: int) -> None:
    length = Span(vocabulary(sentinels=20), seed=0).span(context)
    needed = [n - counts(n)[0] + counts(n)[1] + 1 for n in (length, length + 1)]
    assert needed[0] <= context and (needed[1] > context or counts(length + 1)[1] >= 20)


# -- prefix and seq2seq ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Prefix(vocabulary(), seed=0, task="seq2seq"), Seq2Seq(vocabulary(), smoothing=0.1)])
def test_both_sides_together_are_the_text(objective: Prefix | Seq2Seq) -> None:
    for batch, before in zip(rows_of(objective), originals(objective), strict=True):
        for row in range(len(batch)):
            read = [i for i in batch.input_ids[row].tolist() if i not in (PAD, EOS)]
            said = [i for i in batch.labels[row].tolist() if i != IGNORED]
            assert said[-1] == EOS and read + said[:-1] == text_of(before, row) and read and len(said) > 1


def test_a_decoder_learns_what_follows_the_beginning() -> None:
    objective = Prefix(vocabulary(), seed=0, task="causal")
    for batch, before in zip(rows_of(objective), originals(objective), strict=True):
        assert torch.equal(batch.input_ids, before.input_ids)
        for row in range(len(batch)):
            learnt = np.flatnonzero(batch.labels[row].numpy() != IGNORED)
            assert CONTEXT // 4 - 2 <= learnt[0] <= 3 * CONTEXT // 4
            assert torch.equal(batch.labels[row, learnt[0]:], before.labels[row, learnt[0]:])


@pytest.mark.parametrize(("part", "make"), [
    ("mask", lambda words: Masked(words, seed=0)), ("cls", lambda words: Replaced(words, seed=0)), ("eos", lambda words: Span(words, seed=0)),
    ("pad", lambda words: Seq2Seq(words, smoothing=0.1))])
def test_a_vocabulary_without_a_part_that_is_needed_is_refused(part: str, make: object) -> None:
    with pytest.raises(TokenizerError, match=f"`{part}`"):
        make(dataclasses.replace(vocabulary(), **{part: None}))  # type: ignore[operator]
    with pytest.raises(TokenizerError, match="sentinels"):
        Span(vocabulary(sentinels=0), seed=0)

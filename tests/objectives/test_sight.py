"""What a loss may depend on, under every objective and family: not on what it asks for, not on what fills a row, not on the
texts beside it. A new family adds nothing here, a new objective its row in WAYS (conftest.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.objectives.conftest import PAIRS, SIZE, learner, loader_of, text_shards, vocabulary
from threefold.data.loader import IGNORED, Batch
from threefold.errors import NumericError
from threefold.objectives import Objective
from threefold.objectives.replaced import Duel, Replaced
from threefold.training.gradients import NothingToLearn, accumulate

SUMS = 1e-10  # 97 probabilities in float64
pairs = pytest.mark.parametrize("pair", PAIRS)
# Where texts stand side by side in a row, encoder-decoders and pairs of sentences read them as one; the others keep them apart.
APART = [name for name, pair in PAIRS.items() if pair.make(vocabulary()).task not in ("seq2seq", "pretraining")]


def first_term(model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """The loss of each row in the first term."""
    term = objective.terms(model, batch)[0]
    return term.rows if term.rows is not None else torch.stack([objective.terms(model, part)[0].sum for part in batch.split(1)])


def sums(model: nn.Module, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    return {term.name: term.sum.detach() for term in objective.terms(model, batch)}


def other(ids: Tensor) -> Tensor:
    """Ids of which each is another one."""
    return (ids + 7) % SIZE


def repeated(batch: Batch, row: int, times: int) -> Batch:
    """A row of a batch, many times."""
    return dataclasses.replace(
        batch, **{name: tensor[row:row + 1].repeat(times, *[1] * (tensor.ndim - 1)) for name, tensor in batch.tensors().items()},
        samples=batch.samples[row:row + 1].repeat(times), sources=batch.sources[row:row + 1].repeat(times),
        lengths=None if batch.lengths is None else batch.lengths[row:row + 1].repeat(times))


@pairs
def test_what_is_asked_for_is_not_seen(pair: str) -> None:
    """Whichever token is asked for in a place, the probabilities are the same ones: over the vocabulary they sum to one. A
    model that sees what it should say says of each token that it is likely."""
    model, objective = learner(PAIRS[pair], dtype=torch.float64)
    batch = loader_of(objective).batch(1)
    learnt = batch.labels[0] != IGNORED
    if objective.task != "seq2seq":
        learnt &= batch.labels[0] != batch.input_ids[0]  # one in ten chosen tokens is left standing, so that it is looked at
    for place in (int(learnt.nonzero()[0]), int(learnt.nonzero()[-1])):
        asked = repeated(batch, 0, SIZE)
        asked.labels[:, place + 1:] = IGNORED
        asked.labels[:, place] = torch.arange(SIZE)
        if objective.task == "causal" and place + 1 < asked.input_ids.shape[1]:
            asked.input_ids[:, place + 1] = torch.arange(SIZE)  # what is to be said is what comes next
        before = repeated(asked, 0, 1)
        before.labels[:, place] = IGNORED
        with torch.no_grad():
            losses = first_term(model, objective, asked) - first_term(model, objective, before)
        share = getattr(objective, "smoothing", 0.0)  # of the target is spread over the vocabulary: the same for all
        surprise = (losses - share * losses.mean()) / (1 - share)
        assert abs(float(surprise.neg().exp().sum()) - 1) < SUMS
        assert float(surprise.std()) > 0.01


@pairs
def test_N08_what_fills_a_row_is_seen_by_nobody(pair: str) -> None:
    model, objective = learner(PAIRS[pair])
    loader = loader_of(objective, rows=4, shards=text_shards(documents=2, length=40))
    found = 0
    for step in range(loader.epoch_steps):
        batch = loader.batch(step)
        if batch.attention_mask is not None:
            filled = batch.attention_mask == 0
        elif objective.task == "causal" and batch.lengths is not None:
            filled = torch.arange(batch.input_ids.shape[1]) >= torch.from_numpy(batch.lengths)[:, None]
        else:
            continue
        found += int(filled.sum())
        changed = dataclasses.replace(batch, input_ids=other(batch.input_ids).where(filled, batch.input_ids),
                                      types=None if batch.types is None else (1 - batch.types).where(filled, batch.types))
        a, b = sums(model, objective, batch), sums(model, objective, changed)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        if filled.shape == batch.labels.shape:
            assert (batch.labels[filled] == IGNORED).all()
    assert found


@pytest.mark.parametrize("pair", APART)
def test_texts_side_by_side_do_not_see_each_other(pair: str) -> None:
    model, objective = learner(PAIRS[pair])
    batch = loader_of(objective, rows=8, shards=text_shards(documents=12, length=9, longer=0)).batch(0)
    assert batch.documents is not None
    last = batch.documents.max(1, keepdim=True).values
    assert (last >= 2).any()
    for here in (batch.documents == 0, batch.documents == last):
        asked = dataclasses.replace(batch, labels=batch.labels.where(here, IGNORED))
        changed = dataclasses.replace(asked, input_ids=asked.input_ids.where(here, other(asked.input_ids)))
        (name, a), (_, b) = (next(iter(sums(model, objective, each).items())) for each in (asked, changed))
        assert torch.equal(a, b), name
        if isinstance(objective, Replaced) and isinstance(model, Duel):
            judged = []
            for each in (asked, changed):
                _, _, states = model.generator.loss_rows(each.input_ids, each.labels, each.positions, each.documents)
                judged.append(objective.judged(model, each, states)[0].where(here, torch.zeros(())))
            assert torch.equal(*judged)


@pytest.mark.parametrize("pair", [name for name in PAIRS if name not in APART])
def test_texts_that_are_read_as_one_have_no_borders(pair: str) -> None:
    """Else a mask of the loader's would part them at the wrong places."""
    _, objective = learner(PAIRS[pair])
    batch = loader_of(objective, rows=8, shards=text_shards(documents=12, length=9, longer=0)).batch(0)
    assert batch.documents is None and batch.positions is None


@pairs
def test_N10_a_row_that_is_all_padding(pair: str) -> None:
    """It teaches nothing, and neither it nor its gradient is NaN; what stands in it is seen by nobody."""
    model, objective = learner(PAIRS[pair], dtype=torch.float64)
    batch = loader_of(objective).batch(0)
    blank = dataclasses.replace(batch, labels=batch.labels.clone())
    blank.labels[2] = IGNORED
    if objective.task != "causal":  # whose rows are filled behind their text, and have one
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask.clone()
        mask[2] = 0
        blank = dataclasses.replace(blank, attention_mask=mask)
    accumulate(model, objective, [blank], lambda part: {})
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    changed = dataclasses.replace(blank, input_ids=blank.input_ids.clone())
    changed.input_ids[2] = other(changed.input_ids[2])
    a, b = sums(model, objective, blank), sums(model, objective, changed)
    for name in a:
        assert a[name].isfinite() and (name == "pairs" or torch.equal(a[name], b[name]))  # whether texts follow is asked of each row


@pairs
def test_N08_the_shortest_texts(pair: str) -> None:
    """Of one token, two and three, in rows of their own and side by side: learnt from, or said to hold nothing."""
    model, objective = learner(PAIRS[pair])
    learnt = 0
    for documents, length in ((1, 2), (1, 3), (6, 1), (4, 2)):
        shards = text_shards(documents=documents, length=length, longer=0)
        for rows in (1, 3):
            loader = loader_of(objective, rows=rows, shards=shards)
            for step in range(2):
                try:
                    measured = accumulate(model, objective, [loader.batch(step)], lambda part: {})
                except NothingToLearn:
                    continue
                except NumericError as error:
                    assert "nothing to learn from" in str(error)
                    continue
                learnt += 1
                assert torch.tensor(measured.loss).isfinite()
    assert learnt and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

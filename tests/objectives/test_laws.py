"""Laws over every pair of objective and family that go together. A new family adds nothing here, a new objective its row in
WAYS (conftest.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.objectives.conftest import CONTEXT, PAIRS, WAYS, learner, loader_of, text_shards, vocabulary
from threefold.data.loader import IGNORED, Batch
from threefold.errors import NumericError
from threefold.inspection.batches import inspected, render
from threefold.model.build import matrix_parts
from threefold.model.families import FAMILIES
from threefold.model.weights import load_model, save_model
from threefold.objectives import OBJECTIVES
from threefold.objectives.heldout import evaluate_objective
from threefold.training.gradients import NothingToLearn, accumulate

SUMS = 1e-12  # float64 sums in another order
pairs = pytest.mark.parametrize("pair", PAIRS)
DROPS = {"attention_dropout": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}


def same(a: Batch, b: Batch) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_objective_and_family_has_its_row() -> None:
    assert {str(way.options["train.objective"]) for way in WAYS.values()} == set(OBJECTIVES)
    assert {pair.family for pair in PAIRS.values()} == set(FAMILIES)
    for name, pair in PAIRS.items():
        assert pair.make(vocabulary()).name == WAYS[name.removesuffix(f"-{pair.family}")].options["train.objective"]


@pairs
def test_an_example_is_a_function_of_its_sample(pair: str) -> None:
    """Whatever rows are cut with it, and whoever asks again."""
    objective = PAIRS[pair].make(vocabulary())
    loader, other = loader_of(objective), loader_of(PAIRS[pair].make(vocabulary()))
    for step in (0, 3, 40):
        whole = loader.batch(step)
        assert same(other.batch(step), whole)
        for rows in (slice(0, 1), slice(2, 5)):
            part = loader.batch(step, rows)
            for name, tensor in part.tensors().items():
                if name in whole.tensors():
                    width = tensor.shape[1] if tensor.ndim > 1 else None  # a part may need less room
                    rest = whole.tensors()[name][rows]
                    assert torch.equal(tensor, rest if width is None else rest[:, :width])


@pairs
def test_another_epoch_asks_something_else(pair: str) -> None:
    objective = PAIRS[pair].make(vocabulary())
    loader = loader_of(objective)
    assert not same(loader.batch(0), loader.batch(loader.epoch_steps))


@pairs
def test_no_row_is_longer_than_the_context(pair: str) -> None:
    loader = loader_of(PAIRS[pair].make(vocabulary()))
    for step in range(loader.epoch_steps):
        batch = loader.batch(step)
        assert batch.input_ids.shape[1] <= CONTEXT and batch.labels.shape[1] <= CONTEXT


@pairs
def test_weights_are_known_before_and_are_those_of_the_terms(pair: str) -> None:
    model, objective = learner(PAIRS[pair])
    batch = loader_of(objective).batch(1)
    terms = objective.terms(model, batch)
    assert {term.name: term.weight for term in terms} == dict(objective.weights(batch))
    assert all(term.weight > 0 and term.sum.requires_grad and term.sum.dtype == torch.float32 for term in terms)


@pairs
@pytest.mark.parametrize("dropping", [False, True])
def test_N06_accumulation_is_exact(pair: str, dropping: bool) -> None:
    """The gradient of a batch is the same in one piece and in any others, whatever the rows weigh and whatever is dropped."""
    model, objective = learner(PAIRS[pair], dtype=torch.float64, **DROPS if dropping else {})
    batch = loader_of(objective, shards=text_shards(length=29)).batch(2)  # some rows hold several texts, one is short
    if not dropping:
        batch.labels[1, batch.labels.shape[1] // 2:] = IGNORED  # and one has little to learn
    keys = (lambda part: {"dropout_keys": torch.from_numpy(part.samples * 77)}) if dropping else (lambda part: {})
    found = []
    for size in (6, 4, 1):
        model.zero_grad()
        measured = accumulate(model, objective, list(batch.split(size)), keys)
        found.append((measured, [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
    (whole, gradients), *others = found
    largest = max(float(b.abs().max()) for b in gradients if b is not None)
    for measured, parts in others:
        assert abs(measured.loss - whole.loss) <= SUMS * abs(whole.loss)
        assert all(abs(value - whole.terms[name]) <= SUMS * abs(value) for name, value in measured.terms.items())
        for a, b in zip(parts, gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or float((a - b).abs().max()) <= SUMS * largest


@pairs
def test_every_weight_learns(pair: str) -> None:
    """But tables of positions and segments that no row uses."""
    model, objective = learner(PAIRS[pair])
    batch = loader_of(objective).batch(0)
    accumulate(model, objective, [batch], lambda part: {})
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert still == []


@pairs
def test_a_batch_from_which_nothing_is_learnt_is_seen(pair: str) -> None:
    model, objective = learner(PAIRS[pair])
    batch = loader_of(objective).batch(0)
    blank = dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORED))
    with pytest.raises(NothingToLearn):
        accumulate(model, objective, [blank], lambda part: {})
    with pytest.raises(NumericError, match="nothing is learnt"):
        inspected(blank, objective, vocabulary())


@pairs
def test_what_is_learnt_can_be_read(pair: str) -> None:
    objective = PAIRS[pair].make(vocabulary())
    loader = loader_of(objective)
    found = inspected(loader.batch(0), objective, vocabulary(), loader)
    first = next(iter(found["weights"].values()))
    assert sum(len(row["learnt"]) for row in found["rows"]) == first and len(found["rows"]) == 6
    assert objective.name in render(found)


@pairs
def test_it_learns_a_text_by_heart(pair: str) -> None:
    """A few dozen updates on one batch take most of the loss away."""
    model, objective = learner(PAIRS[pair])
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 0.5
    batch = loader_of(objective).batch(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(accumulate(model, objective, [batch], lambda part: {}).loss)
        optimizer.step()
    floor = 1.2 if pair.startswith("seq2seq") else 0.0  # what smoothing leaves
    assert losses[-1] - floor < 0.6 * (losses[0] - floor), losses[::10]


@pairs
def test_the_held_out_loss_is_that_of_training_without_noise_of_its_own(pair: str) -> None:
    model, objective = learner(PAIRS[pair], dtype=torch.float64)
    loader = loader_of(objective, rows=5)
    again = loader_of(objective, rows=3)
    a, b = (evaluate_objective(model, objective, each) for each in (loader, again))
    assert a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) <= 1e-10 * abs(a["loss"])
    assert a["bits_per_byte"] is None


@pairs
def test_what_is_left_opens_again(pair: str, tmp_path: Path) -> None:
    model, objective = learner(PAIRS[pair])
    for name, result in objective.results(model).items():
        save_model(result, tmp_path / name)
        again = load_model(tmp_path / name)
        assert again.task == result.task and not again.notes
        for (left, p), (right, q) in zip(result.named_parameters(), again.named_parameters(), strict=True):
            assert left == right and torch.equal(p, q)


@pairs
def test_matrices_of_the_blocks_are_muons(pair: str) -> None:
    model, _ = learner(PAIRS[pair])
    parts = matrix_parts(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert parts and all(sum(rows) == shapes[name][0] for name, rows in parts.items())

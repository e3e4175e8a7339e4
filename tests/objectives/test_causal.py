"""The causal objective: its weight is known before, its sum and its rows are the model's own losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.faults import kit
from threefold.config import Recipe
from threefold.data.loader import IGNORED, Loader
from threefold.model.families import family_of
from threefold.objectives import OBJECTIVES, Causal, Objective, task_of
from threefold.text.tokenizer import Tokenizer


def test_sum_weight_and_rows() -> None:
    model, loader = kit.tiny_model(torch.float64), Loader(kit.tiny_shards(), kit.CONTEXT, 5, 0)
    batch = loader.batch(1)
    batch.labels[2] = IGNORED
    (term,) = Causal().terms(model, batch)
    hidden = model.hidden(batch.input_ids, batch.positions, batch.documents)
    each = F.cross_entropy(model.head(hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(batch.labels)
    assert Causal().weights(batch) == {"tokens": term.weight} == {"tokens": float((batch.labels != IGNORED).sum())}
    assert torch.allclose(term.sum, each.sum(), rtol=1e-14, atol=0) and term.sum.requires_grad
    assert term.rows is not None and not term.rows.requires_grad and float(term.rows[2]) == 0
    assert torch.allclose(term.rows, each.sum(1).detach(), rtol=1e-13, atol=0)
    ours = torch.autograd.grad(term.sum, list(model.parameters()))
    theirs = torch.autograd.grad(each.sum(), list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(ours, theirs, strict=True))


def test_the_table_of_objectives() -> None:
    for name, kind in OBJECTIVES.items():
        recipe = Recipe().override({"train.objective": name})
        task = task_of(recipe, family_of(kind.family))
        tokenizer = Tokenizer.train("char", ["a text"], 400, special=kind.special, roles=kind.roles)
        objective: Objective = kind.make(recipe, tokenizer, task)
        assert objective.name == name and objective.task == task and objective.unit in ("row", "pair", "group", "batch")

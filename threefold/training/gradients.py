"""Gradients of one step: the sum over terms of coefficient * sum / total weight, over any number of micro-batches.

Decisions:
- The totals are taken over all micro-batches before the first backward pass: accumulation changes nothing but memory.
- Rows are told apart only where somebody asks for the loss of each source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from threefold.data.loader import IGNORED, Batch
from threefold.objectives.term import Objective

LESS_MEMORY = ("a smaller train.micro_batch, a shorter model.context, a smaller --size or tokenizer.vocab_size, or "
               "train.dtype=bfloat16 needs less")


class NothingToLearn(Exception):
    """Every label of a term is masked in the whole step; holds the names of such terms."""


@dataclass(frozen=True)
class Measured:
    """What a step measured: the loss in nats, the mean of each term, and of each source where it was asked for."""

    loss: float
    terms: dict[str, float]
    sources: dict[int, float]


def accumulate(
    model: nn.Module,
    objective: Objective,
    parts: Sequence[Batch],
    context: Callable[[Batch], Mapping[str, Any]],
    *,
    by_source: bool = False,
) -> Measured:
    """Add the gradients of the micro-batches `parts` to the parameters. `context(part)` goes to the objective.

    Raises NothingToLearn before anything is computed where a term has no weight in any part.
    """
    weights = [objective.weights(part) for part in parts]
    totals = {name: sum(w[name] for w in weights) for name in weights[0]}
    if empty := [name for name, weight in totals.items() if weight == 0]:
        raise NothingToLearn(*empty)
    sums = dict.fromkeys(totals, 0.0)
    sources: dict[int, tuple[float, int]] = {}
    loss = 0.0
    device = next(model.parameters()).device
    for part, weight in zip((part.to(device) for part in parts), weights, strict=True):
        terms = objective.terms(model, part, **context(part))
        assert {t.name: t.weight for t in terms} == dict(weight), "terms and weights of the objective disagree"
        total = torch.stack([t.coefficient * t.sum / totals[t.name] for t in terms]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        loss += float(total.detach())
        for term in terms:
            sums[term.name] += float(term.sum.detach())
        if by_source and (rows := next((t.rows for t in terms if t.rows is not None), None)) is not None:
            _add_rows(sources, part, rows)
    return Measured(
        loss,
        {name: value / totals[name] for name, value in sums.items()},
        {source: value / count for source, (value, count) in sources.items() if count},
    )


def _add_rows(sources: dict[int, tuple[float, int]], part: Batch, rows: torch.Tensor) -> None:
    counts = (part.labels != IGNORED).sum(1)
    for source, value, count in zip(part.sources.tolist(), rows.tolist(), counts.tolist(), strict=True):
        before = sources.get(source, (0.0, 0))
        sources[source] = before[0] + value, before[1] + count

"""What an objective hands to the trainer: terms, each a sum and its weight.

Decisions:
- A loss is never a mean here. A term is a sum over what it counts (tokens, masked tokens, pairs, rows) and the weight
  is that count, known from the batch before the forward pass. The trainer adds the weights of all micro-batches first
  and then backpropagates coefficient * sum / total weight, so accumulation is exact, also for two terms that count
  different things.
- A weight of zero over a whole step means that there is nothing to learn from: an error that names the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from threefold.data.loader import Batch


@dataclass(frozen=True)
class Term:
    """One part of a loss. `sum` is a float32 (or float64) scalar with a gradient; the loss is the sum of coefficient *
    sum / weight.

    rows: (B,) detached sums of each row where the objective can tell them, for losses per source and for naming a bad
    sample.
    """

    name: str
    sum: Tensor
    weight: float
    coefficient: float = 1.0
    rows: Tensor | None = None


class Objective(Protocol):
    """How a batch becomes a loss. `unit` is what must not be split between micro-batches: row, pair, group or batch;
    `family` the one that is trained unless another is asked for."""

    name: str
    family: str
    unit: str

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The weight of each term, from the batch alone."""
        ...

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """The terms of the loss, with gradients."""
        ...

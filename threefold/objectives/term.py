"""What an objective is, and what it hands to the trainer: terms, each a sum and its weight.

Decisions:
- A loss is never a mean here. A term is a sum over what it counts (tokens, masked tokens, pairs, rows) and the weight
  is that count, known from the batch before the forward pass. The trainer adds the weights of all micro-batches first
  and then backpropagates coefficient * sum / total weight, so accumulation is exact, also for two terms that count
  different things.
- A weight of zero over a whole step means that there is nothing to learn from: an error that names the samples.
- Rows are cut by the loader and made into an example here, with noise whose seed is the name of the sample: splitting,
  resuming or evaluating anew gives the same example. A sample of another epoch has another name, and other noise.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from threefold import seeds
from threefold.data.loader import IGNORED, Batch
from threefold.errors import NumericError
from threefold.model.base import Model
from threefold.model.build import build_model
from threefold.model.config import TransformerConfig
from threefold.model.grow import resized
from threefold.model.weights import load_model

Ints = npt.NDArray[np.int64]
More = Callable[[Ints], Batch]  # further rows of the data, by any numbers


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


class Objective(abc.ABC):
    """How a row becomes an example, and a batch of examples a loss. Abstract: each objective is one final class.

    unit     what must not be split between micro-batches: row, pair (two rows) or batch
    task     the head that learns (`families.family.Head`)
    frames   texts stand between the tokens that play `cls` and `sep`
    """

    name: str
    unit = "row"
    task: str
    frames = False

    def span(self, context: int) -> int:
        """Tokens of text in a row of a model with that context."""
        return context

    def example(self, rows: Batch, more: More) -> Batch:
        """The example of rows as the loader cuts them; `more` gives further rows."""
        return rows

    def build(self, config: TransformerConfig, seed: int) -> Model:
        """A new model to train."""
        return build_model(config, seed, task=self.task)

    def load(self, folder: Path, *, vocab_size: int, context: int) -> Model:
        """A model to go on with, in float32, with that vocabulary and context."""
        return resized(load_model(folder, torch.float32, task=self.task), vocab_size=vocab_size, context=context)

    def results(self, model: Model) -> dict[str, Model]:
        """What is left of a trained model, by the folder that it goes to; `model` is the result."""
        return {"model": model}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The weight of each term, from the batch alone: of one term, `tokens`, the labels that are not -100."""
        return {"tokens": labelled(batch)}

    @abc.abstractmethod
    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """The terms of the loss, with gradients."""


class Sums:
    """Terms of many batches, added up: what an evaluation says."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.coefficients: dict[str, float] = {}

    def add(self, terms: Iterable[Term]) -> None:
        """Add those of a batch."""
        for term in terms:
            self.sums[term.name] = self.sums.get(term.name, 0.0) + float(term.sum)
            self.weights[term.name] = self.weights.get(term.name, 0.0) + term.weight
            self.coefficients[term.name] = term.coefficient

    def means(self) -> dict[str, float]:
        """The mean of each term over what it counts."""
        return {name: value / self.weights[name] for name, value in self.sums.items()}

    def loss(self, what: str) -> float:
        """The sum that training takes; raises `NumericError` where it is not finite on `what`."""
        loss = sum(self.coefficients[name] * mean for name, mean in self.means().items())
        if not math.isfinite(loss):
            raise NumericError(f"the loss on {what} is {loss}", hint="the weights may hold NaN or infinity")
        return loss


def labelled(batch: Batch) -> float:
    """How many labels there are to predict."""
    return float((batch.labels != IGNORED).sum())


def texts_of(rows: Batch) -> list[Ints]:
    """The ids of each row as the loader cuts it, without what fills it up."""
    assert rows.lengths is not None
    return [ids[:length] for ids, length in zip(rows.input_ids.numpy(), rows.lengths, strict=True)]


def noise_of(seed: int, name: str, sample: int) -> np.random.Generator:
    """The noise of one sample under one objective."""
    return np.random.default_rng(seeds.key(seed, "objective", name, int(sample)))

"""The loss of an objective on held-out text.

Decision: the held-out part is cut once into rows, as an epoch of it would be, and the noise is that of their names: every
evaluation of a run, and of another run with the same data and seed, asks the same questions. Terms are means over what
they count; the loss is the sum that training takes. There are no bits per byte: hidden tokens are not a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from threefold.data.loader import Batch, Loader
from threefold.data.shards import Shards
from threefold.device import is_out_of_memory
from threefold.errors import NumericError
from threefold.evaluation.loss import BATCH_TOKENS, Evaluation, evaluate_shards, evaluating
from threefold.model.base import Model
from threefold.model.language import CausalLM
from threefold.objectives.term import Objective, Sums


def evaluate_objective(model: Model, objective: Objective, loader: Loader, *, rows: int | None = None) -> Evaluation:
    """The loss over an epoch of `loader` (of held-out text), or over the first `rows` of it, drawn from all sources, with the mean of each term under
    `terms`; `tokens` is the weight of the first term, `seen` the tokens of text that were gone through.

    Raises `NumericError` where there is nothing to predict, or the loss is not finite.
    """
    found, seen = Sums(), 0
    with evaluating(model):
        for batch in _epoch(loader, rows):
            assert batch.lengths is not None
            seen += int(batch.lengths.sum())
            found.add(objective.terms(model, batch.to(model.device)))
    if empty := [name for name, weight in found.weights.items() if not weight]:
        raise NumericError(f"there is nothing to predict in the held-out text for the term {', '.join(empty)}",
                           hint="hold more text back (data.val_fraction)")
    loss, means = found.loss("held-out text"), found.means()
    first = next(iter(means))
    result: dict[str, Any] = {"loss": loss, "bits_per_byte": None, "perplexity": math.exp(min(means[first], 700.0)),
                              "tokens": int(found.weights[first]), "bytes": 0, "seen": seen}
    if len(means) > 1:
        result["terms"] = means
    return result  # type: ignore[return-value]


def _epoch(loader: Loader, rows: int | None) -> Iterator[Batch]:
    """Every sample of the first epoch once, in order, or so many of them."""
    count = loader.samples if rows is None else min(rows, loader.samples)
    for first in range(0, count, loader.batch_size):
        last = min(loader.batch_size, count - first)
        with torch.no_grad():
            yield loader.batch(first // loader.batch_size, slice(0, last))


class HeldOut:
    """Evaluates on about so many held-out tokens of each source, or on all of them; less at once where memory runs out.

    A causal model is judged as everywhere (evaluation/loss.py), any other by its objective.
    """

    def __init__(self, model: Model, objective: Objective, shards: Shards, context: int, pieces: Sequence[bytes | None],
                 split: str = "validation") -> None:
        self.model, self.objective, self.shards, self.context, self.pieces = model, objective, shards, context, pieces
        self.split, self.batch_tokens = split, BATCH_TOKENS

    def __call__(self, tokens: int | None) -> Evaluation:
        while True:
            try:
                return self._evaluated(None if tokens is None else max(1, tokens // self.context))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.batch_tokens <= self.context:
                    raise
                self.batch_tokens //= 2  # changes memory and time, not the result

    def _evaluated(self, windows: int | None) -> Evaluation:
        if isinstance(self.model, CausalLM):
            return evaluate_shards(self.model, self.shards, self.context, self.pieces, split=self.split, batch_tokens=self.batch_tokens,
                                   subset=windows)
        rows = max(1, self.batch_tokens // self.context)
        loader = Loader(self.shards, self.objective.span(self.context), rows, 0, self.split, example=self.objective.example, shares=False)
        return evaluate_objective(self.model, self.objective, loader, rows=None if windows is None else windows * len(loader.names))

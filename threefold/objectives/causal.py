"""Predict the next token (GPT; Radford et al. 2018): the mean negative log-likelihood over every token that has a
predecessor."""

from __future__ import annotations

from typing import Any

from torch import nn

from threefold.data.loader import Batch
from threefold.objectives.term import Objective, Term


class Causal(Objective):
    """One term, `tokens`: its weight is the number of labels that are not -100."""

    name = "causal"
    task = "causal"

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the negative log-likelihoods in nats, in float32 or wider."""
        total, rows = model.loss_rows(batch.input_ids, batch.labels, batch.positions, batch.documents, **context)  # type: ignore[operator]
        return [Term("tokens", total, self.weights(batch)["tokens"], rows=rows)]

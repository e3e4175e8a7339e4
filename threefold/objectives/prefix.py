"""Go on from a beginning: the first part of a row is given, and only what follows is learnt (arXiv 1910.10683, prefix
language modelling).

Decisions:
- An encoder-decoder reads the first part and writes the second. A decoder sees both as it always does, and its loss
  counts the second alone: what it learns opens everywhere as a causal model.
- Where the second part begins is another place in each sample, between a quarter and three quarters of it.
- Label smoothing (arXiv 1512.00567) is `seq2seq`'s, the objective of the Transformer of 2017; there the cut falls where a
  sentence ends, as near to the middle as there is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from threefold.data.loader import IGNORED, Batch
from threefold.objectives.span import ended, sides, written
from threefold.objectives.term import More, Objective, Term, noise_of, texts_of
from threefold.objectives.vocabulary import Vocabulary

EARLIEST, LATEST = 0.25, 0.75  # of a row


class Prefix(Objective):
    """One term, `tokens`: its weight is the number of tokens of the second parts."""

    name = "prefix"

    def __init__(self, vocabulary: Vocabulary, *, seed: int, task: str) -> None:
        self.vocabulary, self.seed, self.task = vocabulary, seed, task
        if task == "seq2seq":
            self.pad, self.eos = vocabulary.need("prefix", "pad", "eos")

    def example(self, rows: Batch, more: More) -> Batch:
        """Cut in two."""
        texts = texts_of(rows)
        cuts = [self._cut(len(text), int(sample)) for text, sample in zip(texts, rows.samples, strict=True)]
        if self.task == "seq2seq":
            return sides(rows, [ended(text[:cut], self.eos) for text, cut in zip(texts, cuts, strict=True)],
                         [ended(text[cut:], self.eos) for text, cut in zip(texts, cuts, strict=True)], self.pad)
        given = torch.arange(rows.labels.shape[1]) < torch.tensor(cuts)[:, None] - 1  # the last given token predicts the first new one
        return dataclasses.replace(rows, labels=rows.labels.masked_fill(given, IGNORED))

    def _cut(self, length: int, sample: int) -> int:
        share = EARLIEST + (LATEST - EARLIEST) * noise_of(self.seed, "prefix", sample).random()
        return min(max(1, round(share * length)), max(1, length - 1))

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the negative log-likelihoods in nats, in float32 or wider."""
        weight = self.weights(batch)["tokens"]
        if self.task == "seq2seq":
            return [written(model, batch, weight, **context)]
        total, rows = model.loss_rows(batch.input_ids, batch.labels, batch.positions, batch.documents, **context)  # type: ignore[operator]
        return [Term("tokens", total, weight, rows=rows)]


class Seq2Seq(Objective):
    """One term, `tokens`: its weight is the number of tokens that the decoder writes."""

    name = "seq2seq"
    task = "seq2seq"

    def __init__(self, vocabulary: Vocabulary, *, smoothing: float) -> None:
        self.pad, self.eos = vocabulary.need("seq2seq", "pad", "eos")
        self.vocabulary, self.smoothing = vocabulary, smoothing

    def span(self, context: int) -> int:
        """A half more than the context: neither side may be longer than two thirds of it, and its end."""
        return max(2, 3 * (context - 1) // 2)

    def example(self, rows: Batch, more: More) -> Batch:
        """Cut where a sentence ends."""
        read, targets = [], []
        for text in texts_of(rows):
            cut = self.vocabulary.middle(text, max(2 * len(text) // 3, 1))
            read.append(ended(text[:cut], self.eos))
            targets.append(ended(text[cut:], self.eos))
        return sides(rows, read, targets, self.pad)

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the negative log-likelihoods in nats, smoothed, in float32 or wider."""
        return [written(model, batch, self.weights(batch)["tokens"], smoothing=self.smoothing, **context)]

"""Restore spans (T5, arXiv 1910.10683): stretches of a text are taken out, each behind a sentinel of its own, and written
by the decoder, one sentinel and its stretch after another.

Decisions:
- 15 % of the tokens are taken out in stretches of 3 on average. How many tokens of text make a row is chosen so that
  what the encoder reads just fits the context.
- Texts that stand side by side in a row are read as one, as in T5.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from threefold.data.loader import IGNORED, Batch
from threefold.errors import TokenizerError
from threefold.objectives.term import Ints, More, Objective, Term, noise_of, texts_of
from threefold.objectives.vocabulary import Vocabulary

SHARE, MEAN = 0.15, 3.0


def counts(length: int) -> tuple[int, int]:
    """(tokens taken out, stretches) of a text of so many tokens."""
    taken = min(max(round(SHARE * length), 1), max(length - 1, 1))
    return taken, max(1, min(round(taken / MEAN), taken, length - taken))


def stretches(length: int, noise: np.random.Generator) -> list[tuple[int, int]]:
    """First and last (exclusive) place of each stretch that is taken out of a text; none touches another."""
    taken, number = counts(length)

    def parts(total: int) -> Ints:
        """A sum in `number` parts of at least one, each division as likely as any other."""
        cuts = np.sort(noise.permutation(total - 1)[:number - 1]) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    if length < 2:
        return []
    kept, out = parts(length - taken), parts(taken)
    first = np.cumsum(kept) + np.cumsum(out) - out
    return list(zip(first.tolist(), (first + out).tolist(), strict=True))


class Span(Objective):
    """One term, `tokens`: its weight is the number of tokens that the decoder writes, sentinels included."""

    name = "span"
    task = "seq2seq"

    def __init__(self, vocabulary: Vocabulary, *, seed: int) -> None:
        self.eos, self.pad = vocabulary.need("span", "eos", "pad")
        if not len(vocabulary.sentinels):
            raise TokenizerError("the objective `span` needs sentinels `<extra_id_0>`, ..., and this tokenizer has none",
                                 hint="leave --tokenizer out: the family's own kind has them")
        self.sentinels, self.seed = vocabulary.sentinels, seed

    def span(self, context: int) -> int:
        """As many tokens of text as leave no more than the context when stretches are out and sentinels in."""
        length = context
        while length + 1 - counts(length + 1)[0] + counts(length + 1)[1] + 1 <= context:
            length += 1
        while length > 1 and (length - counts(length)[0] + counts(length)[1] + 1 > context or counts(length)[1] >= len(self.sentinels)):
            length -= 1
        return length

    def example(self, rows: Batch, more: More) -> Batch:
        """The text without its stretches, and the stretches."""
        read, written = [], []
        for text, sample in zip(texts_of(rows), rows.samples, strict=True):
            inputs, targets, last = [], [], 0
            taken = stretches(len(text), noise_of(self.seed, "span", sample))
            for number, (start, stop) in enumerate(taken):
                inputs += [text[last:start], self.sentinels[number:number + 1]]
                targets += [self.sentinels[number:number + 1], text[start:stop]]
                last = stop
            read.append(ended(np.concatenate([*inputs, text[last:]]), self.eos))
            written.append(np.concatenate([*targets, self.sentinels[len(taken):len(taken) + 1], [self.eos]]))
        return sides(rows, read, written, self.pad)

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the negative log-likelihoods in nats, in float32 or wider."""
        return [written(model, batch, self.weights(batch)["tokens"], **context)]


def ended(text: Ints, eos: int) -> Ints:
    """A text and its end, which a text that ends with its row brings with it."""
    return text if len(text) and text[-1] == eos else np.append(text, eos)


def sides(rows: Batch, read: list[Ints], written: list[Ints], pad: int) -> Batch:
    """A batch of texts that are read and texts that are written, each filled up to the longest."""
    ids, mask = np.full((len(read), max(map(len, read))), pad, dtype=np.int64), None
    labels = np.full((len(written), max(map(len, written))), IGNORED, dtype=np.int64)
    for row, (source, target) in enumerate(zip(read, written, strict=True)):
        ids[row, :len(source)], labels[row, :len(target)] = source, target
    if len({len(source) for source in read}) > 1:
        mask = torch.from_numpy((np.arange(ids.shape[1]) < np.asarray([[len(source)] for source in read])).astype(np.int64))
    return dataclasses.replace(rows, input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels), documents=None, positions=None,
                               attention_mask=mask)


def written(model: nn.Module, batch: Batch, weight: float, **context: Any) -> Term:
    """The term of a text that is written behind one that is read."""
    total, rows = model.loss_rows(batch.input_ids, batch.labels, attention_mask=batch.attention_mask, **context)  # type: ignore[operator]
    return Term("tokens", total, weight, rows=rows)

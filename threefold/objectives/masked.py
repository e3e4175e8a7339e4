"""Predict hidden tokens (BERT, arXiv 1810.04805), and whether a second text follows the first.

Decisions:
- A share of the tokens of a row is chosen, of which 80 % are hidden behind the mask token, 10 % replaced by any token and
  10 % left; whole words together if asked. The choice is another one in each epoch (RoBERTa, arXiv 1907.11692). The share is
  BERT's 15 % or what the recipe says: twice as many questions a row teach small encoders far sooner (arXiv 2202.08005 finds
  the same at full size), judged at 15 % (docs/log.md).
- A row is [CLS] text [SEP]. With pairs it is [CLS] A [SEP] B [SEP], cut where a sentence ends as near to the middle as
  there is one, and in half of the rows B is the second half of another row. Both kinds are cut to the shorter of the two.
- Special tokens are never chosen, nor is a random replacement one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from threefold import seeds
from threefold.data.loader import IGNORED, Batch, pieces
from threefold.model.norms import wide
from threefold.objectives.term import Ints, More, Objective, Term, labelled, noise_of, texts_of
from threefold.objectives.vocabulary import Vocabulary

HIDDEN, REPLACED = 0.8, 0.1  # of the tokens that are chosen


class Masked(Objective):
    """Terms `tokens`, weight: chosen tokens, and with pairs `pairs`, weight: rows."""

    name = "masked"
    frames = True

    def __init__(self, vocabulary: Vocabulary, *, seed: int, share: float = 0.15, whole_words: bool = False,
                 next_sentence: bool = False) -> None:
        self.cls, self.sep, self.mask = vocabulary.need("masked", "cls", "sep", "mask")
        self.vocabulary, self.seed, self.share, self.whole_words, self.next_sentence = vocabulary, seed, share, whole_words, next_sentence
        self.plain = np.flatnonzero(~vocabulary.special)
        self.task = "pretraining" if next_sentence else "masked"

    def span(self, context: int) -> int:
        """The context without the tokens that frame the text."""
        return context - (3 if self.next_sentence else 2)

    def example(self, rows: Batch, more: More) -> Batch:
        """Framed and hidden."""
        framed = self._pairs(rows, more) if self.next_sentence else framed_rows(rows, self.cls, self.sep, self.vocabulary.pad)
        ids, labels = hide(framed.input_ids.numpy(), rows.samples, self.vocabulary, self.mask, self.plain, self.seed,
                           share=self.share, whole_words=self.whole_words)
        return dataclasses.replace(framed, input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels))

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Chosen tokens; rows."""
        tokens = {"tokens": labelled(batch)}
        return tokens if batch.pairs is None else {**tokens, "pairs": float(len(batch))}

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sums of negative log-likelihoods in nats, in float32 or wider."""
        weights = self.weights(batch)
        total, rows, states = model.loss_rows(  # type: ignore[operator]
            batch.input_ids, batch.labels, batch.positions, batch.documents, types=batch.types, attention_mask=batch.attention_mask,
            **context)
        terms = [Term("tokens", total, weights["tokens"], rows=rows)]
        if batch.pairs is not None:
            logits = model.pairs(model.pooler(states))  # type: ignore[operator]
            terms.append(Term("pairs", F.cross_entropy(logits.to(wide(logits.dtype)), batch.pairs, reduction="sum"), weights["pairs"]))
        return terms

    def _pairs(self, rows: Batch, more: More) -> Batch:
        """[CLS] A [SEP] B [SEP], and whether B follows A. Texts that stand side by side in a row are read as one, without
        what frames each of them."""
        ids = _wider(rows, 3, self.vocabulary.pad)
        noise = [noise_of(self.seed, "pairs", sample) for sample in rows.samples]
        false_B = np.asarray([n.random() < 0.5 for n in noise])
        others = more(np.asarray([seeds.key(self.seed, "other", int(s)) >> 1 for s in rows.samples], dtype=np.int64))
        types, sizes = np.zeros_like(ids), np.zeros(len(ids), dtype=np.int64)
        middle = self.vocabulary.middle
        for row, (text, other) in enumerate(zip(self._bare(rows), self._bare(others), strict=True)):
            cut = middle(text, len(text) - 1)
            first, second, foreign = text[:cut], text[cut:], other[middle(other, len(other) - 1):]
            length = min(len(second), len(foreign))  # in either case, or the length of a row would tell which it is
            second = (foreign if false_B[row] else second)[:length]
            line = np.concatenate([[self.cls], first, [self.sep], second, [self.sep]])
            ids[row, :len(line)], types[row, len(first) + 2:len(line)], sizes[row] = line, 1, len(line)
        return dataclasses.replace(
            rows, input_ids=torch.from_numpy(ids), documents=None, positions=None, types=torch.from_numpy(types),
            pairs=torch.from_numpy(false_B.astype(np.int64)), attention_mask=_mask(ids.shape[1], sizes))

    def _bare(self, rows: Batch) -> list[Ints]:
        return [text[(text != self.cls) & (text != self.sep)] for text in texts_of(rows)]


def framed_rows(rows: Batch, cls: int, sep: int, pad: int | None) -> Batch:
    """[CLS] text [SEP], the separator behind the last token of a short row. A text that begins or ends with its row brings
    that token with it, and gets no second one."""
    assert rows.lengths is not None
    found, lengths, ids = rows.input_ids.numpy(), rows.lengths, _wider(rows, 2, pad)
    at = np.arange(len(ids))
    before, behind = found[:, 0] != cls, found[at, lengths - 1] != sep
    place = np.arange(ids.shape[1]) - before[:, None]  # of each token in the row as it was cut
    inside, place = (place >= 0) & (place < lengths[:, None]), place.clip(0, found.shape[1] - 1)
    sizes = lengths + before + behind
    ids[inside] = np.take_along_axis(found, place, 1)[inside]
    ids[:, 0], ids[at, sizes - 1] = cls, sep
    border = np.zeros(ids.shape, dtype=bool)
    if rows.documents is not None:
        numbers = rows.documents.numpy()
        border = inside & np.take_along_axis(np.diff(numbers, axis=1, prepend=numbers[:, :1]) > 0, place, 1)
    documents, positions = pieces(border)
    return dataclasses.replace(rows, input_ids=torch.from_numpy(ids), documents=documents, positions=positions,
                               attention_mask=_mask(ids.shape[1], sizes))


def hide(ids: Ints, samples: Ints, vocabulary: Vocabulary, mask: int, plain: npt.NDArray[np.int64], seed: int, *,
         share: float, whole_words: bool) -> tuple[Ints, Ints]:
    """(what is seen, what is to be predicted) for rows (B, T): labels are -100 where nothing was chosen."""
    seen, labels = ids.copy(), np.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        noise = noise_of(seed, "masked", sample)
        places = np.flatnonzero(~vocabulary.special[ids[row]])
        if not len(places):
            continue
        wanted = max(1, round(share * len(places)))
        if whole_words:
            word = np.cumsum(vocabulary.starts_word[ids[row]])[places]
            order = noise.permutation(np.unique(word))
            sizes = np.asarray([np.count_nonzero(word == w) for w in order[:4 * wanted]])
            count = int(np.abs(np.cumsum(sizes) - wanted).argmin()) + 1  # words whose pieces come nearest to the share
            chosen = places[np.isin(word, order[:count])]
        else:
            chosen = noise.permutation(places)[:wanted]
        labels[row, chosen] = ids[row, chosen]
        draw = noise.random(len(chosen))
        seen[row, chosen[draw < HIDDEN]] = mask
        other = chosen[(draw >= HIDDEN) & (draw < HIDDEN + REPLACED)]
        seen[row, other] = plain[noise.integers(len(plain), size=len(other))]
    return seen, labels


def _wider(rows: Batch, more: int, pad: int | None) -> Ints:
    shape = (len(rows), rows.input_ids.shape[1] + more)
    return np.full(shape, 0 if pad is None else pad, dtype=np.int64)


def _mask(width: int, lengths: Ints) -> torch.Tensor | None:
    """1 where there is text; None where that is everywhere."""
    mask = np.arange(width) < lengths[:, None]
    return None if mask.all() else torch.from_numpy(mask.astype(np.int64))

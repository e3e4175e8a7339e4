"""Put texts of like meaning near each other: queries and their answers, or pairs with a score.

Decisions:
- Queries: each is to choose its own answer among all answers of the batch, and the hard negatives that rows bring, by the
  cosine over a temperature (arXiv 1807.03748, 2004.04906). The whole batch is one unit, so more of it makes the task harder.
- Pairs with scores: every pair with a higher score is to have a higher cosine than every pair with a lower one (CoSENT,
  Su 2022, https://kexue.fm/archives/8847).
- An answer that is the same text as a query's own, or that belongs to the same query in another row, is no wrong answer to it.
- A batch may be larger than memory: texts go through the model in chunks whose activations are not kept, and each chunk
  is computed again when its gradient is wanted (arXiv 2101.06983; exact).
- With `dims` the loss is the mean over vectors that are cut to each of those lengths (Matryoshka, arXiv 2205.13147).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from threefold.data.examples import Item
from threefold.data.loader import Batch
from threefold.errors import DataError, did_you_mean
from threefold.evaluation import metrics
from threefold.model.norms import wide
from threefold.model.pooling import pooled
from threefold.objectives.rows import Fit, Judged, RowObjective, number_of, of_all, text_of
from threefold.objectives.term import Term
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row

TEMPERATURE = 0.05
CHUNK = 32  # texts whose activations are held at once
QUERIES = 256  # that are compared with all answers at once


class Embed(RowObjective):
    """One term, `rows`: its weight is the number of rows, or of pairs of rows that are compared."""

    name, task, unit, fewest = "embed", "body", "batch", 2
    fields = ()
    optional = ("query", "positive", "negative", "text_a", "text_b", "score")
    same = ("query", "text_a", "text_b")

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit, *, pooling: str, dims: Sequence[int] = ()) -> None:
        super().__init__(tokenizer, fit)
        self.pooling, self.dims = pooling, tuple(dims)

    def learn(self, rows: Sequence[Row]) -> None:
        """Scores that are all the same say nothing."""
        scores = {_score(row) for row in rows if "score" in row.fields}
        if len(scores) == 1 and len(rows) > 1:
            raise DataError(f"every row has the score {scores.pop():g}: there is no order to learn",
                            hint="give pairs of different scores, or rows of {query, positive}")

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """Two texts with a score, or a query with an answer and perhaps one that is none."""
        scored = all("score" in row.fields for row in rows)
        names = ("text_a", "text_b") if scored else ("query", "positive")
        for row in rows:
            if missing := [name for name in names if name not in row.fields]:
                raise DataError(f"{row.source}: the row has no `{missing[0]}`; rows are {{query, positive, negative?}} or {{text_a, text_b, score}}, "
                                "all of one kind", hint=did_you_mean(missing[0], row.fields))
        sides = [self.framed([text_of(row, name) for row in rows], None, rows) for name in names]
        negatives = None if scored else of_all(rows, "negative")
        if negatives is not None:
            sides.append(self.framed(negatives, None, rows))
        return [Item(texts, _score(row) if scored else None, row.source) for texts, row in zip(zip(*sides, strict=True), rows, strict=True)]

    def answer(self, batch: Batch, row: int) -> str:
        """Which text of its row it is, and the score of scored ones."""
        if batch.labels.dtype != torch.int64:
            return f"{('text_a', 'text_b')[row % 2]}, score {float(batch.labels[row]):g}"
        return ("query", "positive", "negative")[row % (len(batch) // len(set(batch.samples.tolist())))]

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Rows; of scored pairs one, since the loss is that of the whole batch."""
        return {"rows": float(len(set(batch.samples.tolist()))) if batch.labels.dtype == torch.int64 else 1.0}

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """The loss of the whole batch."""
        vectors = self.vectors(model, batch, **context)
        count = len(batch) // len(set(batch.samples.tolist()))
        cuts = self.dims or (vectors.shape[1],)
        alike = None if batch.labels.is_floating_point() else _alike(batch.input_ids, count)
        total = torch.stack([self._loss(F.normalize(vectors[:, :dim], dim=-1), batch.labels, count, alike) for dim in cuts]).mean()
        return [Term("rows", total, self.weights(batch)["rows"])]

    def vectors(self, model: nn.Module, batch: Batch, **context: Any) -> Tensor:
        """(B, D) of all texts of a batch, in float32 or wider."""
        def of(ids: Tensor, mask: Tensor | None, types: Tensor | None, keys: Tensor | None) -> Tensor:
            more = {} if keys is None else {"dropout_keys": keys}
            states = model.hidden(ids, types=types, attention_mask=mask, **more)  # type: ignore[operator]
            return pooled(states.to(wide(states.dtype)), mask, self.pooling)

        found = []
        for first in range(0, len(batch), CHUNK):
            rows = slice(first, first + CHUNK)
            parts = [None if t is None else t[rows] for t in (batch.attention_mask, batch.types, context.get("dropout_keys"))]
            ids = batch.input_ids[rows]
            alone = len(batch) <= CHUNK or not torch.is_grad_enabled()
            found.append(of(ids, *parts) if alone else checkpoint(of, ids, *parts, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(found)

    def _loss(self, vectors_ND: Tensor, labels_N: Tensor, count: int, alike_QA: Tensor | None) -> Tensor:
        if alike_QA is None:
            cosine, score = (vectors_ND[::2] * vectors_ND[1::2]).sum(-1) / TEMPERATURE, labels_N[::2]
            gaps = (cosine[None] - cosine[:, None])[score[:, None] > score[None]]  # lower pair minus higher pair
            return torch.logsumexp(torch.cat([gaps.new_zeros(1), gaps]), 0)
        queries = vectors_ND[::count]
        answers = torch.cat([vectors_ND[place::count] for place in range(1, count)])
        logits = (queries @ answers.T / TEMPERATURE).masked_fill(alike_QA, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device), reduction="sum")

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """The vectors of the texts of each item, one under the other."""
        vectors = F.normalize(self.vectors(model, batch), dim=-1).cpu().numpy()
        count = len(items[0].texts)
        return [Judged(item, vectors[n * count:(n + 1) * count]) for n, item in enumerate(items)]

    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Spearman's correlation of cosines and scores; or how high queries find their own answer among all."""
        a, b = np.stack([one.scores[0] for one in judged]), np.stack([one.scores[1] for one in judged])
        if judged[0].item.target is not None:
            return metrics.correlations((a * b).sum(-1), np.asarray([one.item.target for one in judged]))
        asked, answers = (_numbers([one.item.texts[side].ids for one in judged]) for side in (0, 1))
        rank = np.concatenate([_ranks(a, b, asked, answers, first) for first in range(0, len(a), QUERIES)])
        return {"ndcg_at_10": float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()), "accuracy_at_1": float((rank == 0).mean())}


def _numbers(texts: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) the same number for the same text."""
    known: dict[bytes, int] = {}
    return np.asarray([known.setdefault(ids.tobytes(), len(known)) for ids in texts])


def _ranks(a_ND: np.ndarray, b_ND: np.ndarray, asked_N: np.ndarray, answers_N: np.ndarray, first: int) -> np.ndarray:
    """How many answers stand before a query's own, for some queries: each text once, also one that is as near, and none that is as right."""
    part = slice(first, first + QUERIES)
    similar = a_ND[part] @ b_ND[np.unique(answers_N, return_index=True)[1]].T
    rows, places = np.nonzero(asked_N[part, None] == asked_N)
    right = np.zeros(similar.shape, dtype=bool)
    right[rows, answers_N[places]] = True
    own = similar[np.arange(len(similar)), answers_N[part]]
    found: np.ndarray = ((similar >= own[:, None]) & ~right).sum(1)
    return found


def _alike(ids_BT: Tensor, count: int) -> Tensor:
    """(Q, A): which answers, besides its own, are none that a query should be kept from."""
    questions, answers = ids_BT[::count], [ids_BT[place::count] for place in range(1, count)]
    def equal(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] == b[None]).all(-1)

    own = torch.eye(len(questions), dtype=torch.bool, device=ids_BT.device)
    same = equal(questions, questions) | equal(answers[0], answers[0])
    return torch.cat([same & ~own, *(equal(answers[0], others) for others in answers[1:])], 1)


def _score(row: Row) -> float:
    return number_of(row, "score")

"""Turn one text into another: translation, summaries, corrections, queries; rows of `source` and `target`.

Decisions:
- An encoder-decoder reads the source and writes the target. A decoder is given the source as a question in its chat
  template and learns the answer, so that what it learns is asked for as in every conversation.
- What is judged is text that is written greedily, on the first rows of the held-out part: chrF and BLEU (sacrebleu), ROUGE-L, exact match,
  and of queries how many give the rows of the right one, where there is a database to ask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from threefold.data.examples import Item, Text
from threefold.data.loader import IGNORED, Batch
from threefold.evaluation import metrics
from threefold.evaluation.execution import Database
from threefold.generation.arguments import RULES, generate_ids
from threefold.generation.engine import ending_ids
from threefold.objectives.instruct import Instruct
from threefold.objectives.rows import Fit, Judged, RowObjective, filler, text_of
from threefold.objectives.span import written
from threefold.objectives.term import Term
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row


class Translate(RowObjective):
    """One term, `tokens`: its weight is the number of tokens that are written."""

    name, writes = "seq2seq", True
    fields = ("source", "target")
    same = ("source",)

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit, *, task: str, smoothing: float, database: str = "") -> None:
        super().__init__(tokenizer, fit)
        self.database = Database(Path(database)) if database else None
        self.task, self.smoothing = task, smoothing
        self.longest = 0  # tokens of the longest target so far, of all rows: what is written may be half as long again
        self.as_answer = Instruct(tokenizer, fit) if task == "causal" else None

    @property
    def packs(self) -> bool:  # type: ignore[override]
        """Whether texts may stand side by side in a row: where one stack reads both."""
        return self.as_answer is not None

    @functools.cached_property
    def turn_ends(self) -> frozenset[int]:
        """What ends an answer in the chat template of a decoder."""
        return frozenset() if self.as_answer is None else self.tokenizer.turn_ends()

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """What is read, and what is written."""
        sources, targets = ([text_of(row, name) for row in rows] for name in ("source", "target"))
        if self.as_answer is not None:
            talks = [Row({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}, row.source)
                     for a, b, row in zip(sources, targets, rows, strict=True)]
            return self._measured([replace(item, written=b) for item, b in zip(self.as_answer.items(talks), targets, strict=True)])
        read, said = self.framed(sources, None, rows), self.framed(targets, None, rows, written=True)
        return self._measured([Item((Text(a.ids, labels=b.ids, written=True),), source=row.source, written=target)
                               for a, b, row, target in zip(read, said, rows, targets, strict=True)])

    def _measured(self, items: list[Item]) -> list[Item]:
        self.longest = max([self.longest, *(_target(item).size for item in items)])
        return items

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the negative log-likelihoods in nats, smoothed, in float32 or wider."""
        if self.as_answer is not None:
            return self.as_answer.terms(model, batch, **context)
        return [written(model, batch, self.weights(batch)["tokens"], smoothing=self.smoothing, **context)]

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """The text that is written for each source."""
        rows = [self._asked(item) for item in items]
        room, context = self.longest + self.longest // 2 + 8, self.fit.context
        said, alike = [""] * len(rows), dict[int, list[int]]()  # rows with as much room go together: none takes it from another
        for n, row in enumerate(rows):
            begun = 1 if self.as_answer is None else len(row)  # an encoder-decoder writes behind one token, a decoder behind its prompt
            alike.setdefault(min(room, context - begun), []).append(n)
        for most, group in alike.items():
            if most > 0:
                for n, text in zip(group, self._said(model, [rows[n] for n in group], most), strict=True):
                    said[n] = text
        return [Judged(item, said=text) for item, text in zip(items, said, strict=True)]

    def _asked(self, item: Item) -> np.ndarray:
        text = item.texts[0]
        if self.as_answer is None or text.labels is None:
            return text.ids
        return text.ids[:int(np.flatnonzero(text.labels != IGNORED)[0]) + 1]

    def _said(self, model: Any, rows: Sequence[np.ndarray], room: int) -> list[str]:
        width = max(map(len, rows))
        pad = filler(self.tokenizer)
        ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if self.as_answer is not None else slice(0, len(row))
            ids[number, place], mask[number, place] = torch.from_numpy(row), 1
        own, ends = model.generation_config, ending_ids(model, self.tokenizer) | self.turn_ends
        out = generate_ids(model, ids.to(model.device), mask.to(model.device), defaults={name: own[name] for name in RULES if name in own},
                           max_new_tokens=room, do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad)
        new = out[:, width:] if self.as_answer is not None else out[:, 1:]
        return [text.strip() for text in self.tokenizer.batch_decode(new.cpu(), skip_special_tokens=True)]

    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Figures of the texts that were written, beside those of the rows: what the vocabulary cannot spell counts as wrong."""
        truth = [one.item.written.strip() for one in judged]
        said = [one.said for one in judged]
        executed = {} if self.database is None else self.database.agreement(said, truth)
        return executed | metrics.of_texts(said, truth)


def _target(item: Item) -> np.ndarray:
    labels = item.texts[0].labels
    assert labels is not None
    found: np.ndarray = labels[labels != IGNORED]
    return found

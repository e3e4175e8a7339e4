"""Say what each word of a text is: one tag a word, learnt at the first piece of the word.

Decisions:
- Words are joined by spaces and encoded as one text, so that pieces are those that the text has everywhere. A piece belongs
  to the word in which its first character lies; a word without a piece (cut off, or of characters that vanish) is neither
  learnt nor judged, and a text none of whose words has one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from threefold.data.examples import Item, Text
from threefold.data.loader import IGNORED, Batch
from threefold.errors import DataError
from threefold.evaluation import metrics
from threefold.model.norms import wide
from threefold.objectives.rows import Judged, RowObjective
from threefold.objectives.term import Term
from threefold.text.rows import Row


class Tag(RowObjective):
    """One term, `tokens`: its weight is the number of words that have a piece."""

    name, task = "tag", "tag"
    fields = ("tokens", "tags")
    labels: tuple[str, ...] = ()

    def learn(self, rows: Sequence[Row]) -> None:
        """The tags that there are, `O` first."""
        names = {str(tag) for row in rows for tag in _lists(row)[1]}
        self.labels = tuple(sorted(names, key=lambda name: (name != "O", name)))
        if len(self.labels) < 2:
            raise DataError(f"every word has the tag {', '.join(self.labels) or '(none)'}: there is nothing to tell apart",
                            hint="is `tags` the right column? another one is named with --columns tags=THEIRS")
        if "O" not in self.labels:
            self.notes.append("no word has the tag `O`, which stands for none: every word counts as an entity")

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """Texts with the number of its tag at the first piece of each word."""
        found = []
        for row in rows:
            words, tags = _lists(row)
            if unknown := sorted(set(map(str, tags)) - set(self.labels)):
                raise DataError(f"{row.source}: the tag {unknown[0][:60]!r} is none of those that are learnt ({', '.join(self.labels[:12])})",
                                hint="held-out rows may only have tags that rows to learn from have")
            ids, places = self._encoded(words, row)
            labels = np.full(len(ids), IGNORED, dtype=np.int64)
            for word, place in places.items():
                labels[place] = self.labels.index(str(tags[word]))
            if not places:
                raise DataError(f"{row.source}: no word of {' '.join(words)[:60]!r} has a token", hint="leave the row out")
            found.append(Item((Text(ids, labels=labels),), source=row.source))
        return found

    def _encoded(self, words: Sequence[str], row: Row) -> tuple[np.ndarray, dict[int, int]]:
        """The ids of the words as a text, and the place of the first piece of each word."""
        text = " ".join(words)
        whole = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        self.fit.check(len(whole["input_ids"]), row.source)
        if len(whole["input_ids"]) > self.fit.context:
            whole = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=True,
                                   max_length=self.fit.context)
        of_character = np.full(len(text) + 1, -1)
        at = 0
        for number, word in enumerate(words):
            of_character[at:at + len(word)] = number
            at += len(word) + 1
        places: dict[int, int] = {}
        for place, ((start, stop), special) in enumerate(zip(whole["offset_mapping"], whole["special_tokens_mask"], strict=True)):
            inside = [n for n in of_character[start:stop].tolist() if n >= 0]
            if not special and inside:
                places.setdefault(inside[0], place)
        return np.asarray(whole["input_ids"], dtype=np.int64), places

    def named(self, label: int) -> str:
        """The tag."""
        return self.labels[label]

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the cross-entropies in nats, in float32 or wider."""
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, **context).logits
        flat = logits.to(wide(logits.dtype)).flatten(0, 1)
        total = F.cross_entropy(flat, batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return [Term("tokens", total, self.weights(batch)["tokens"])]

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """The number of a tag for each place that has a label."""
        said = model(batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(-1).cpu().numpy()
        return [Judged(item, row[:len(item.texts[0].ids)]) for item, row in zip(items, said, strict=True)]

    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """F1 of whole entities."""
        pairs = [(one.item.texts[0].labels, one.scores) for one in judged]
        named = [([self.labels[int(n)] for n in scores[labels != IGNORED]], [self.labels[int(n)] for n in labels[labels != IGNORED]])
                 for labels, scores in pairs if labels is not None]
        return metrics.entity_f1([a for a, _ in named], [b for _, b in named])


def _lists(row: Row) -> tuple[list[str], list[Any]]:
    words, tags = row.fields["tokens"], row.fields["tags"]
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags) or not words \
            or not all(isinstance(word, str) for word in words):
        sizes = [len(value) if isinstance(value, list) else f"{str(value)[:30]!r}" for value in (words, tags)]
        raise DataError(f"{row.source}: `tokens` and `tags` should be lists with one tag a word, and they hold {sizes[0]} and {sizes[1]}",
                        hint="mend the row or leave it out")
    return words, tags

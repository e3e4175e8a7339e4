"""Rows that were made into examples -> batches: what `loader.py` is for running text, for rows of a table.

    Item      one example: one or more texts as ids, each with what is to be learnt under it
    Examples  the items of a set, and the batch of any step

Decisions:
- A batch is a pure function of (the items, seed, step). An epoch has every item once, in a keyed order; within stretches
  of that order items of like length stand together, so that little is filled up.
- Where rows may be packed (`room` > 0), texts stand side by side in rows of that many tokens, and do not see each other.
- Texts that belong together (a pair that is compared, a query and its answers) are neighbours among the rows of a batch.
- Items live in memory: sets of examples are small beside running text, and are encoded anew at each start.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from threefold import seeds
from threefold.data.loader import IGNORED, Batch, Ints, ahead, pieces
from threefold.data.order import permute
from threefold.errors import DataError

STRETCH = 32  # batches among which items are sorted by length
EVEN = 1024  # tokens of a row at which attention costs about as much as the products do


@dataclass(frozen=True)
class Text:
    """One text of an example. `types`: the segment of each token. `labels`: what each place is to say, or the ids that
    are written where another text is read (`written`)."""

    ids: Ints
    types: Ints | None = None
    labels: Ints | None = None
    written: bool = False

    def __len__(self) -> int:
        return len(self.ids) + (len(self.labels) if self.written and self.labels is not None else 0)


@dataclass(frozen=True)
class Item:
    """One example. `target` is what is to be said of its texts as a whole: a class, truths, a value; None where labels
    say it. `source`: file and line. `written`: the text that should be written, as the row has it."""

    texts: tuple[Text, ...]
    target: int | float | tuple[float, ...] | None = None
    source: str = ""
    written: str = ""

    @property
    def length(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


class Examples:
    """Batches of `size` items. `pad` fills rows up; `room`: see the module. Raises DataError where there is no item."""

    def __init__(self, items: Sequence[Item], size: int, seed: int, *, pad: int, vocab_size: int, room: int = 0, name: str = "data") -> None:
        if not items:
            raise DataError(f"`{name}` holds no example", hint="give rows to learn from")
        self.items, self.size, self.seed, self.pad, self.room = items, size, seed, pad, room
        self.vocab_size, self.name, self.notes = vocab_size, name, list[str]()
        self.lengths = np.asarray([item.length for item in items])
        self.order = functools.lru_cache(maxsize=2)(self._order)

    @property
    def epoch_steps(self) -> int:
        """Steps in which every item is seen once."""
        return math.ceil(len(self.items) / self.size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch in the mean, without those that fill up."""
        return max(1, round(float(self.lengths.mean()) * self.size))

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        numbers = step * self.size + np.arange(self.size)
        epochs, places = np.divmod(numbers, len(self.items))
        chosen = [int(self.order(int(epoch))[place]) for epoch, place in zip(epochs, places, strict=True)]
        return self.collate(chosen, [int(epoch) for epoch in epochs])

    def follow(self, steps: Iterable[int], workers: int = 1) -> Iterator[tuple[int, Batch]]:
        """(step, batch) along any steps, made ahead by `workers` threads."""
        return ahead(self.batch, steps, workers)

    def once(self, most: int | None = None) -> Iterator[tuple[list[int], Batch]]:
        """(numbers of items, batch) over every item once, or over so many of them, long ones last."""
        count = len(self.items) if most is None else min(most, len(self.items))
        chosen = permute(len(self.items), seeds.key(0, "held out"), np.arange(count))
        chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
        for first in range(0, count, self.size):
            numbers = chosen[first:first + self.size].tolist()
            yield numbers, self.collate(numbers, [0] * len(numbers))

    def describe(self, sample: int) -> dict[str, Any]:
        """Where a sample comes from."""
        epoch, number = divmod(int(sample), len(self.items))
        return {"source": self.items[number].source, "epoch": epoch}

    def _order(self, epoch: int) -> Ints:
        """The numbers of all items in the order of an epoch."""
        count, stretch = len(self.items), STRETCH * self.size
        mixed = permute(count, seeds.key(self.seed, "examples", epoch), np.arange(count))
        parts = []
        for first in range(0, count, stretch):
            part = mixed[first:first + stretch]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            blocks = [part[at:at + self.size] for at in range(0, len(part), self.size)]
            whole, rest = [b for b in blocks if len(b) == self.size], [b for b in blocks if len(b) < self.size]
            order = seeds.numpy_rng(self.seed, "blocks", epoch, first).permutation(len(whole))
            parts += [whole[at] for at in order] + rest
        return np.concatenate(parts)

    # -- items to tensors ----------------------------------------------------------------------------------------------

    def collate(self, numbers: Sequence[int], epochs: Sequence[int]) -> Batch:
        """The items of some numbers as one batch."""
        chosen = [self.items[number] for number in numbers]
        names = [epoch * len(self.items) + number for number, epoch in zip(numbers, epochs, strict=True)]
        if self.room:
            return self._packed(chosen, names, self._narrowest(chosen, names))
        texts = [text for item in chosen for text in item.texts]
        samples = np.asarray([name for item, name in zip(chosen, names, strict=True) for _ in item.texts])
        width = max(len(text.ids) for text in texts)
        ids, mask = np.full((len(texts), width), self.pad, dtype=np.int64), np.zeros((len(texts), width), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, :len(text.ids)], mask[row, :len(text.ids)] = text.ids, 1
        types = None
        if any(text.types is not None for text in texts):
            types = np.zeros_like(ids)
            for row, text in enumerate(texts):
                if text.types is not None:
                    types[row, :len(text.types)] = text.types
        return Batch(torch.from_numpy(ids), _labels(chosen, texts, width), None, None, samples, np.zeros_like(samples),
                     attention_mask=None if mask.all() else torch.from_numpy(mask),
                     types=None if types is None else torch.from_numpy(types))

    def _narrowest(self, chosen: Sequence[Item], names: Sequence[int]) -> list[list[int]]:
        """Rows of items side by side that are as narrow as is good: what is computed grows with the tokens of all rows, filled up or
        not, and for attention with their width too."""
        longest = max(item.length for item in chosen)
        room = max(self.room, longest)

        def cost(rows: list[list[int]]) -> int:
            width = max(sum(chosen[n].length for n in row) for row in rows)
            return len(rows) * width * (EVEN + width)
        widths = sorted({min(room, longest), min(room, 2 * longest), min(room, 4 * longest), room})
        return min((self._rows(chosen, names, width) for width in widths), key=cost)

    def _packed(self, chosen: Sequence[Item], names: Sequence[int], rows: Sequence[Sequence[int]]) -> Batch:
        width = max(sum(chosen[n].length for n in row) for row in rows)
        ids, labels = np.full((len(rows), width), self.pad, dtype=np.int64), np.full((len(rows), width), IGNORED, dtype=np.int64)
        border = np.zeros((len(rows), width), dtype=bool)
        for number, members in enumerate(rows):
            at = 0
            for item in (chosen[n] for n in members):
                for text in item.texts:
                    assert text.labels is not None
                    border[number, at] = at > 0
                    ids[number, at:at + len(text.ids)], labels[number, at:at + len(text.ids)] = text.ids, text.labels
                    at += len(text.ids)
            if at < width:
                border[number, at] = True  # what fills up is a piece of its own
        documents, positions = pieces(border)
        samples = np.asarray([names[row[0]] for row in rows])
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), documents, positions, samples, np.zeros_like(samples))

    @staticmethod
    def _rows(chosen: Sequence[Item], names: Sequence[int], room: int) -> list[list[int]]:
        """Each item into the first row that has room for it, long ones first."""
        rows: list[list[int]] = []
        left: list[int] = []
        for number in sorted(range(len(chosen)), key=lambda n: (-chosen[n].length, names[n])):
            length = chosen[number].length
            row = next((r for r, free in enumerate(left) if free >= length), len(rows))
            if row == len(rows):
                rows.append([])
                left.append(room)
            rows[row].append(number)
            left[row] -= length
        return rows


def _labels(items: Sequence[Item], texts: Sequence[Text], width: int) -> torch.Tensor:
    """Classes (B,), truths (B, C), values (B,), labels of tokens (B, S) or of what is written (B, T); one row a text."""
    if items[0].target is not None:
        rows = [item.target for item in items for _ in item.texts]
        return torch.tensor(rows, dtype=torch.int64 if isinstance(rows[0], int) else torch.float32)
    found = [text.labels for text in texts]
    if any(labels is None for labels in found):
        return torch.zeros(len(texts), dtype=torch.int64)
    width = max(len(labels) for labels in found if labels is not None) if texts[0].written else width
    table = np.full((len(texts), width), IGNORED, dtype=np.int64)
    for row, labels in enumerate(found):
        assert labels is not None
        table[row, :len(labels)] = labels
    return torch.from_numpy(table)


def fingerprint(items: Iterable[Item]) -> str:
    """A hash of all that is learnt from, in order."""
    found = hashlib.sha256()
    for item in items:
        for text in item.texts:
            for part in (text.ids, text.types, text.labels):
                found.update(b"|" if part is None else np.ascontiguousarray(part, dtype=np.int64).tobytes())
        found.update(repr(item.target).encode())
    return found.hexdigest()


def split(targets: Sequence[Any], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which of some rows are held out: about that share of each class (`targets` that are the same), and of all rows
    where they are all different; at least one, and never all."""
    held = np.zeros(len(targets), dtype=bool)
    groups: dict[Any, list[int]] = {}
    for number, target in enumerate(targets):
        groups.setdefault(target, []).append(number)
    owed = 0.0
    for name, members in groups.items():
        owed += share * len(members)
        take = min(int(owed), len(members) - (len(groups) > 1 or len(members) > 1))
        owed -= take
        order = seeds.numpy_rng(seed, "held out", str(name)).permutation(len(members))[:take]
        held[np.asarray(members)[order]] = True
    if not held.any() and len(held) > 1:
        held[int(seeds.numpy_rng(seed, "held out").integers(len(held)))] = True
    return held

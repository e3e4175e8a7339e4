"""What objectives that learn from rows of a table share: fields are checked, texts become ids, answers are judged.

Decisions:
- A row that does not fit is an error with file and line; nothing is dropped in silence. A text longer than the context is
  an error that says both lengths, or is cut where that was asked for, and counted.
- What is judged on held-out rows is what a user of the result will see: the classes it names, the text it writes.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import nn

from threefold.data.examples import Item, Text
from threefold.data.loader import Batch
from threefold.errors import DataError
from threefold.objectives.term import Objective
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row


@dataclass
class Fit:
    """How texts fit the model: the longest it takes, whether longer ones are cut, and how many were."""

    context: int
    truncate: bool = False
    cut: int = 0

    def check(self, length: int, where: str) -> None:
        """Count a text that is cut; raise DataError for one that is too long and may not be."""
        if length <= self.context:
            return
        if not self.truncate:
            raise DataError(f"{where}: {length:,} tokens, and the model takes {self.context:,}",
                            hint="cut such texts with --truncate, or take a longer context (--model.context) or another model")
        self.cut += 1


@dataclass(frozen=True)
class Judged:
    """What a model said about one held-out item: `scores` (logits, a value, a vector) or `said`, a text."""

    item: Item
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    said: str = ""


class RowObjective(Objective):
    """An objective over rows. Abstract: each says which fields it needs, how they become items, and how to judge."""

    fields: ClassVar[tuple[str, ...]]        # every row has them
    optional: ClassVar[tuple[str, ...]] = ()
    packs: ClassVar[bool] = False            # texts may stand side by side in a row
    writes: ClassVar[bool] = False           # judging means that texts are written, which costs much
    fewest: ClassVar[int] = 1                # rows of a batch from which something can be learnt
    same: ClassVar[tuple[str, ...]] = ()     # rows that are alike in these are held out together; none: in all but the label

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit) -> None:
        self.tokenizer, self.fit = tokenizer, fit
        self.notes: list[str] = []  # about the rows, for who asked

    def target_of(self, row: Row) -> Any:
        """What rows are held out in equal shares by: the class of a row, or None."""
        return None

    def learn(self, rows: Sequence[Row]) -> None:
        """Look at all rows once before any is encoded: the classes that there are."""

    @abc.abstractmethod
    def items(self, rows: Sequence[Row]) -> list[Item]:
        """The examples of rows, in order."""

    @abc.abstractmethod
    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """What the model says about each item of a batch."""

    @abc.abstractmethod
    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Figures of all held-out items; the first is the one that counts, and more of it is better."""

    def settle(self, model: nn.Module, judged: Sequence[Judged]) -> dict[str, Any]:
        """What is chosen on held-out rows at the end (a temperature, a threshold), as config.json keeps it."""
        return {}

    # -- for people ----------------------------------------------------------------------------------------------------

    def answer(self, batch: Batch, row: int) -> str | None:
        """What is to be said of the text in a row of a batch as a whole, in words; None where labels of its tokens say it."""
        return None

    def named(self, label: int) -> str | None:
        """The name of a label of a token, where it is not a token."""
        return None

    # -- texts to ids --------------------------------------------------------------------------------------------------

    def framed(self, texts: Sequence[str], pairs: Sequence[str] | None, rows: Sequence[Row], *, written: bool = False) -> list[Text]:
        """Texts, or pairs of them, with the tokens that stand around them, as transformers encodes them; with `written` as
        texts that are written, which some tokenizers encode otherwise."""
        encode = (self.tokenizer.target or self.tokenizer) if written else self.tokenizer
        whole = encode(list(texts), None if pairs is None else list(pairs), return_token_type_ids=pairs is not None)
        long = [n for n, ids in enumerate(whole["input_ids"]) if len(ids) > self.fit.context]
        for n in long:
            self.fit.check(len(whole["input_ids"][n]), rows[n].source)
        if long:
            cut = encode([texts[n] for n in long], None if pairs is None else [pairs[n] for n in long], truncation=True,
                                 max_length=self.fit.context, return_token_type_ids=pairs is not None)
            for name, values in cut.items():
                for n, value in zip(long, values, strict=True):
                    whole[name][n] = value
        types = whole.get("token_type_ids")
        return [Text(_ints(ids), None if types is None else _ints(types[n])) for n, ids in enumerate(whole["input_ids"])]


def filler(tokenizer: PretrainedTokenizer) -> int:
    """The id that fills rows up: that which is meant for it, else any, since nobody attends to it."""
    found = tokenizer.pad_token_id
    return int(found if found is not None else tokenizer.eos_id or 0)


def text_of(row: Row, name: str, *, empty: bool = False) -> str:
    """The string in a field; raises DataError with file and line for anything else, and for an empty one."""
    value = row.fields[name]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(f"{row.source}: `{name}` should be a text and is {str(value)[:60]!r}",
                        hint="mend the row, or name another column with --columns")
    return value


def number_of(row: Row, name: str) -> float:
    """The number in a field; raises DataError with file and line for anything else, and for one that is not finite."""
    value = row.fields[name]
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{row.source}: `{name}` should be a number and is {str(value)[:60]!r}", hint="mend the row or leave it out")
    return found


def pair_of(row: Row, name: str = "text_pair") -> str | None:
    """The second text of a row, where it has one."""
    return text_of(row, name) if row.fields.get(name) is not None else None


def of_all(rows: Sequence[Row], name: str) -> list[str] | None:
    """The second texts of all rows, or None where no row has one; some without are an error."""
    found = [pair_of(row, name) for row in rows]
    if all(text is None for text in found):
        return None
    for row, text in zip(rows, found, strict=True):
        if text is None:
            raise DataError(f"{row.source}: the row has no `{name}`, and others have one", hint="give every row one, or none")
    return [text for text in found if text is not None]


def counted(values: Mapping[str, int], most: int = 12) -> str:
    """Names and counts in words, the most frequent first."""
    ordered = sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"`{name}` {count:,}" for name, count in ordered[:most])
    return shown + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)

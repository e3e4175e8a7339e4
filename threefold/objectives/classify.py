"""Say which class a text is of, or which ones, or what value it has; one text or a pair.

Decisions:
- The kind follows the labels where it is not said: numbers with a fraction are a regression, lists are several classes at
  once, everything else is one class of several. Classes are ordered by name, so that the same rows give the same numbers.
- With `weights` a class counts by one over its share, so that a rare one is learnt as much as a frequent one.
- A class that stands for "none of these" (`outside`) is not learnt as a class: rows of it choose the threshold below
  which an answer is refused (the largest probability, as in arXiv 1909.02027), and are not trained on.
- Probabilities are made honest by one temperature, chosen on held-out rows (arXiv 1706.04599).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.data.examples import Item
from threefold.data.loader import Batch
from threefold.errors import DataError
from threefold.evaluation import metrics
from threefold.model.norms import wide
from threefold.objectives.rows import Fit, Judged, RowObjective, counted, number_of, of_all, text_of
from threefold.objectives.term import Term
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row

OUTSIDE = -1  # the number of the class that stands for none
KINDS = {"one": "single_label_classification", "several": "multi_label_classification", "value": "regression"}  # transformers' words


class Classify(RowObjective):
    """One term, `rows`: its weight is the number of rows, or the sum of the weights of their classes."""

    name, task = "classify", "classify"
    fields, optional = ("text", "label"), ("text_pair",)

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit, *, weighted: bool = False, outside: str = "", kind: str = "auto") -> None:
        super().__init__(tokenizer, fit)
        self.weighted, self.outside, self.asked = weighted, outside, kind
        self.kind = KINDS["one"]
        self.labels: tuple[str, ...] = ()
        self.class_weights: Tensor | None = None

    # -- rows to items -------------------------------------------------------------------------------------------------

    def target_of(self, row: Row) -> Any:
        """The label, where it is one class of several."""
        return str(row.fields["label"]) if self.kind == KINDS["one"] else None

    def learn(self, rows: Sequence[Row]) -> None:
        """The kind, the classes and their weights."""
        values = [row.fields["label"] for row in rows]
        several = any(isinstance(value, list) for value in values)
        found = "several" if several else "value" if _all_values(values) else "one"
        self.kind = KINDS[found if self.asked == "auto" else self.asked]
        if self.kind != KINDS["one"] and (self.weighted or self.outside):
            option = "class_weights" if self.weighted else "outside"
            what = "values" if self.kind == KINDS["value"] else "lists"
            raise DataError(f"the labels are {what}, and `finetune.{option}` goes with one class a row",
                            hint="leave it out")
        if self.kind == KINDS["value"]:
            self.labels = ("value",)
            return
        names = Counter(name for row in rows for name in (map(str, self._several(row)) if self.kind == KINDS["several"] else [_name(row)]))
        names.pop(self.outside, None)
        if not names:
            raise DataError("no row has a label: every list is empty", hint="is `label` the right column? --columns label=THEIRS")
        if len(names) < 2 and self.kind == KINDS["one"]:
            raise DataError(f"every row has the label {counted(names) or 'of none of the classes'}: there is nothing to tell apart",
                            hint="is `label` the right column? another one is named with --columns label=THEIRS")
        self.labels = tuple(sorted(names, key=_sortable))
        if self.weighted:
            counts = torch.tensor([names[name] for name in self.labels], dtype=torch.float64)
            self.class_weights = counts.sum() / (len(counts) * counts)

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """Texts with their class, truths, or value."""
        texts = self.framed([text_of(row, "text") for row in rows], of_all(rows, "text_pair"), rows)
        return [Item((text,), self._target(row), row.source) for text, row in zip(texts, rows, strict=True)]

    def _target(self, row: Row) -> int | float | tuple[float, ...]:
        if self.kind == KINDS["value"]:
            return number_of(row, "label")
        if self.kind == KINDS["several"]:
            said = {str(name) for name in self._several(row)}
            if unknown := said - set(self.labels):
                raise self._unknown(row, sorted(unknown)[0])
            return tuple(float(name in said) for name in self.labels)
        name = _name(row)
        if self.outside and name == self.outside:
            return OUTSIDE
        if name not in self.labels:
            raise self._unknown(row, name)
        return self.labels.index(name)

    def _several(self, row: Row) -> list[Any]:
        value = row.fields["label"]
        if not isinstance(value, list):
            raise DataError(f"{row.source}: `label` is {str(value)[:60]!r}, and other rows have a list of labels",
                            hint="give every row a list, an empty one for none")
        return value

    def _unknown(self, row: Row, name: str) -> DataError:
        return DataError(f"{row.source}: the label {name[:60]!r} is none of the {len(self.labels)} that are learnt "
                         f"({', '.join(self.labels[:12])}{', ...' if len(self.labels) > 12 else ''})",
                         hint="held-out rows may only have labels that rows to learn from have")

    def answer(self, batch: Batch, row: int) -> str:
        """The class, the classes, or the value."""
        label = batch.labels[row]
        if self.kind == KINDS["value"]:
            return f"{float(label):g}"
        if self.kind == KINDS["several"]:
            return ", ".join(name for name, true in zip(self.labels, label.tolist(), strict=True) if true) or "none of the labels"
        return self.labels[int(label)] if label >= 0 else self.outside

    # -- the loss ------------------------------------------------------------------------------------------------------

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Rows that are learnt, each by the weight of its class."""
        if self.class_weights is not None:
            known = batch.labels[batch.labels >= 0]
            return {"rows": float(self.class_weights[known.cpu()].sum())}
        return {"rows": float((batch.labels >= 0).sum()) if batch.labels.dtype == torch.int64 else float(len(batch))}

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sums of cross-entropies in nats, or of squares, in float32 or wider."""
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.types, **context).logits
        logits, labels = logits.to(wide(logits.dtype)), batch.labels
        if self.kind == KINDS["value"]:
            total = F.mse_loss(logits[:, 0], labels.to(logits.dtype), reduction="sum")
        elif self.kind == KINDS["several"]:
            total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / logits.shape[1]
        else:
            weight = None if self.class_weights is None else self.class_weights.to(logits)
            total = F.cross_entropy(logits, labels, weight=weight, ignore_index=OUTSIDE, reduction="sum")
        return [Term("rows", total, self.weights(batch)["rows"])]

    # -- how good ------------------------------------------------------------------------------------------------------

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """The logits of each text."""
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.types).logits
        return [Judged(item, scores) for item, scores in zip(items, logits.float().cpu().numpy(), strict=True)]

    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Accuracy, macro F1, calibration and confusion; or F1 over classes; or correlations."""
        scores = np.stack([one.scores for one in judged])
        if self.kind == KINDS["value"]:
            return metrics.correlations(scores[:, 0], np.asarray([one.item.target for one in judged]))
        truth = np.asarray([one.item.target for one in judged])
        if self.kind == KINDS["several"]:
            return metrics.several_classes(scores, truth)
        inside = truth != OUTSIDE
        found = metrics.classes(scores[inside], truth[inside], self.labels)
        if not inside.all():
            refused = metrics.rejection(scores, truth, metrics.threshold(scores, truth))
            found |= {"accuracy_with_refusals": refused["accuracy"], "outside_recall": refused["recall"]}
        return found

    def settle(self, model: nn.Module, judged: Sequence[Judged]) -> dict[str, Any]:
        """The temperature, and where there are rows of none of the classes the threshold."""
        if self.kind != KINDS["one"]:
            return {}
        scores, truth = np.stack([one.scores for one in judged]), np.asarray([one.item.target for one in judged])
        inside = truth != OUTSIDE
        temperature = metrics.temperature(scores[inside], truth[inside])
        found: dict[str, Any] = {"temperature": temperature}
        if not inside.all():
            found |= {"threshold": metrics.threshold(scores / temperature, truth), "outside": self.outside}
        return found


def _name(row: Row) -> str:
    value = row.fields["label"]
    if value is None or (isinstance(value, str) and not value.strip()) or isinstance(value, dict | list):
        raise DataError(f"{row.source}: `label` is {str(value)[:60]!r}, expected the name of a class", hint="mend the row or leave it out")
    return str(value)


def _all_values(values: Sequence[Any]) -> bool:
    """Numbers, of which one at least has a fraction."""
    try:
        numbers = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        return False
    written = [str(value) for value in values]
    return len(numbers) == len(values) and any("." in word for word in written) and len(set(written)) > 2


def _sortable(name: str) -> tuple[bool, int, str]:
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)

"""Learn from pairs of answers of which people chose one: a reward model, and preferences without one (DPO).

Decisions:
- Reward: the chosen answer is to score higher, -log sigmoid(r_chosen - r_rejected) (Bradley and Terry 1952; arXiv 2203.02155).
- DPO: the same of the difference of log-ratios to a reference that stays as it was (arXiv 2305.18290); log-probabilities
  are sums over the answer's tokens, not means. With `smoothing` a share of the choices is taken to be the wrong way
  round; `ipo` takes the square of the difference to 1 / (2 beta) instead (arXiv 2310.12036).
- The chosen and the rejected answer of a row are neighbours in the batch and are never split.
- A pair whose two sides are the same teaches nothing and is refused by line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.data.examples import Item, Text
from threefold.data.loader import IGNORED, Batch
from threefold.errors import DataError
from threefold.evaluation import metrics
from threefold.evaluation.loss import evaluating
from threefold.model import adapters
from threefold.model.base import Model
from threefold.model.norms import wide
from threefold.objectives.instruct import Instruct, messages_of
from threefold.objectives.rows import Fit, Judged, RowObjective, text_of
from threefold.objectives.term import Term
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row


class Preference(RowObjective):
    """What both have in common: a row is a prompt and two answers, and its two conversations are two texts."""

    unit = "pair"
    fields = ("prompt", "chosen", "rejected")
    same = ("prompt",)

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit) -> None:
        super().__init__(tokenizer, fit)
        self.talk = Instruct(tokenizer, fit)

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """Both conversations of each row, answers labelled."""
        found = []
        for row in rows:
            if row.fields["chosen"] == row.fields["rejected"]:
                raise DataError(f"{row.source}: `chosen` and `rejected` are the same: {str(row.fields['chosen'])[:60]!r}",
                                hint="leave such rows out: there is nothing to choose")
            tools = row.fields.get("tools")
            sides = [self.talk.items([Row({"messages": talk, "tools": tools}, row.source)])[-1].texts[0] for talk in self._talks(row)]
            if np.array_equal(sides[0].ids, sides[1].ids):
                raise DataError(f"{row.source}: `chosen` and `rejected` are the same tokens, as they are cut and written by the template",
                                hint="leave such rows out, or take a model with a longer context")
            found.append(Item(tuple(sides), source=row.source))
        return found

    def _talks(self, row: Row) -> list[list[dict[str, Any]]]:
        """Both conversations; where texts may be cut, behind the same beginning, in which both answers have room."""
        talks = [_conversation(row, name) for name in ("chosen", "rejected")]
        if not self.fit.truncate:
            return talks
        cut = [self.talk.fitting(talk, len(talk) - 1, row.source, row.fields.get("tools")) for talk in talks]
        if talks[0][:-1] != talks[1][:-1]:
            return cut
        prompt = min((talk[:-1] for talk in cut), key=lambda talk: sum(len(message["content"]) for message in talk))
        return [[*prompt, talk[-1]] for talk in cut]

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Pairs."""
        return {"pairs": len(batch) / 2}

    def answer(self, batch: Batch, row: int) -> str:
        """Which of the two it is."""
        return ("chosen", "rejected")[row % 2]

    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """How often the chosen answer is preferred, also among pairs of like length; by how much; how honest that is."""
        margins = np.asarray([one.scores[0] - one.scores[1] for one in judged])
        lengths = np.asarray([[_answer_tokens(text) for text in one.item.texts] for one in judged], dtype=float)
        alike = np.abs(lengths[:, 0] - lengths[:, 1]) <= 0.1 * lengths.max(-1)
        sure = np.stack([margins, np.zeros_like(margins)], -1)
        return {"accuracy": float((margins > 0).mean()), "accuracy_of_like_length": float((margins[alike] > 0).mean()) if alike.any() else None,
                "of_like_length": int(alike.sum()), "longer_is_chosen": float((lengths[:, 0] > lengths[:, 1]).mean()),
                "margin": float(margins.mean()), "calibration_error": metrics.calibration_error(sure, np.zeros(len(margins), dtype=int))}


def _answer_tokens(text: Text) -> int:
    """Tokens of the last answer: the last run of labels."""
    assert text.labels is not None
    places = np.flatnonzero(text.labels != IGNORED)
    breaks = np.flatnonzero(np.diff(places) > 1)
    return len(places) - (int(breaks[-1]) + 1 if len(breaks) else 0)


class Reward(Preference):
    """One term, `pairs`: a model with one class gives each conversation a value."""

    name, task = "reward", "classify"
    labels = ("reward",)

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit) -> None:
        super().__init__(tokenizer, fit)
        self.talk.ends = True  # some families judge at the end of a text

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of -log sigmoid of the differences."""
        values = _values(model, batch, **context)
        return [Term("pairs", -F.logsigmoid(values[::2] - values[1::2]).sum(), self.weights(batch)["pairs"])]

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """Both values of each pair."""
        values = _values(model, batch).cpu().numpy()
        return [Judged(item, values[2 * n:2 * n + 2]) for n, item in enumerate(items)]


class Dpo(Preference):
    """One term, `pairs`. `reference` gives the log-probabilities that the model began with."""

    name, task = "dpo", "causal"

    def __init__(self, tokenizer: PretrainedTokenizer, fit: Fit, *, beta: float, ipo: bool = False, smoothing: float = 0.0) -> None:
        super().__init__(tokenizer, fit)
        self.beta, self.ipo, self.smoothing = beta, ipo, smoothing
        self.reference: Model | None = None

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """The sum over pairs."""
        gains = self._gains(model, batch, **context)
        return [Term("pairs", self.loss(gains[::2] - gains[1::2]).sum(), self.weights(batch)["pairs"])]

    def loss(self, difference: Tensor) -> Tensor:
        """The loss of each pair, of the difference of the two log-ratios."""
        if self.ipo:
            return (difference - 1 / (2 * self.beta)) ** 2
        sure = self.beta * difference
        return -(1 - self.smoothing) * F.logsigmoid(sure) - self.smoothing * F.logsigmoid(-sure)

    def _gains(self, model: nn.Module, batch: Batch, **context: Any) -> Tensor:
        """Log-ratio of each answer: how much likelier the model makes it than the reference does."""
        assert isinstance(model, Model)
        reference = self.reference
        if reference is None:  # an adapter that is switched off leaves its base, in which nothing is dropped
            with evaluating(model, exact=False), adapters.without(model):
                before = log_probabilities(model, batch)
        else:
            reference.compute_dtype = model.compute_dtype
            with torch.no_grad():
                before = log_probabilities(reference, batch)
        return log_probabilities(model, batch, **context) - before

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """The implicit rewards of both answers of each pair."""
        gains = (self.beta * self._gains(model, batch)).cpu().numpy()
        return [Judged(item, gains[2 * n:2 * n + 2]) for n, item in enumerate(items)]


def log_probabilities(model: nn.Module, batch: Batch, **context: Any) -> Tensor:
    """(B,) the log-probability of the labels of each row, summed, in float32 or wider, with a gradient."""
    states = model.hidden(batch.input_ids, attention_mask=batch.attention_mask, **context)  # type: ignore[operator]
    at = batch.labels != IGNORED
    each = -model.lm_head.token_losses(states[at], model.transformer.embed.weight, batch.labels[at])  # type: ignore[union-attr, operator]
    rows = torch.arange(len(batch), device=at.device)[:, None].expand_as(at)[at]
    summed: Tensor = each.new_zeros(len(batch)).index_add(0, rows, each)
    return summed


def _values(model: nn.Module, batch: Batch, **context: Any) -> Tensor:
    logits: Tensor = model(batch.input_ids, attention_mask=batch.attention_mask, **context).logits[:, 0]
    return logits.to(wide(logits.dtype))


def _conversation(row: Row, name: str) -> list[dict[str, Any]]:
    """The prompt (a text, or messages) and one of the answers (a text, or messages)."""
    prompt, answer = row.fields["prompt"], row.fields[name]
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": text_of(row, "prompt")}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": text_of(row, name)}]
    messages = messages_of(Row({"messages": [*before, *after]}, row.source))
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.source}: `{name}` does not end in an answer", hint="its last message has the role `assistant`")
    return messages


"""Figures of what models say: classes, calibration, refusal, entities, texts, rankings.

Decisions:
- Every figure is a plain function of arrays or texts; scikit-learn, sacrebleu and scipy are what tests compare with.
- The threshold below which an answer is refused is where accuracy inside and recall outside are best in sum: neither is
  worth more than the other unless a user says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BINS = 15  # of confidences, for the calibration error

# -- classes -----------------------------------------------------------------------------------------------------------


def probabilities(logits_NC: Array) -> Array:
    """Softmax over the last axis, in float64."""
    shifted = logits_NC.astype(np.float64) - logits_NC.max(-1, keepdims=True)
    exps: Array = np.exp(shifted)
    result: Array = exps / exps.sum(-1, keepdims=True)
    return result


def classes(logits_NC: Array, truth_N: Array, labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1, expected calibration error (arXiv 1706.04599) and the confusion matrix (rows: the truth)."""
    said = logits_NC.argmax(-1)
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(confusion, (truth_N, said), 1)
    f1 = f1_of(confusion)
    found: dict[str, Any] = {
        "accuracy": float((said == truth_N).mean()),
        "macro_f1": float(f1[(confusion.sum(0) + confusion.sum(1)) > 0].mean()),  # of the classes that are there, or said, as scikit-learn
        "calibration_error": calibration_error(logits_NC, truth_N),
    }
    if len(labels) == 2:
        found["f1"] = {name: float(value) for name, value in zip(labels, f1, strict=True)}
    if len(labels) <= 20:
        found |= {"labels": list(labels), "confusion": confusion.tolist()}
    return found


def f1_of(confusion_CC: Array) -> Array:
    """F1 of each class; 0 for one that is neither there nor said."""
    hit = np.diag(confusion_CC).astype(np.float64)
    both = confusion_CC.sum(0) + confusion_CC.sum(1)
    result: Array = np.divide(2 * hit, both, out=np.zeros_like(hit), where=both > 0)
    return result


def calibration_error(logits_NC: Array, truth_N: Array, bins: int = BINS) -> float:
    """The mean gap between how sure a model is and how often it is right, over bins of its confidence."""
    sure_N = probabilities(logits_NC).max(-1)
    right_N = logits_NC.argmax(-1) == truth_N
    place_N = np.minimum((sure_N * bins).astype(int), bins - 1)
    return float(sum(abs(right_N[place_N == b].sum() - sure_N[place_N == b].sum()) for b in range(bins)) / max(1, len(truth_N)))


def temperature(logits_NC: Array, truth_N: Array) -> float:
    """The number that logits are divided by for the smallest loss: the root of its slope, by halving in the logarithm."""
    def slope(log_t: float) -> float:
        scaled = logits_NC / math.exp(log_t)
        p_NC = probabilities(scaled)
        expected, taken = (p_NC * scaled).sum(-1), scaled[np.arange(len(truth_N)), truth_N]
        return float((taken - expected).mean())  # of the loss by log T

    low, high = math.log(0.05), math.log(20.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def several_classes(logits_NC: Array, truth_NC: Array) -> dict[str, Any]:
    """F1 over all classes together and the mean of each one's, and how many rows are right in every class."""
    said, true = logits_NC > 0, truth_NC > 0.5
    hit, both = (said & true).sum(0), said.sum(0) + true.sum(0)
    each = np.divide(2.0 * hit, both, out=np.zeros(len(hit)), where=both > 0)
    return {"micro_f1": float(2 * hit.sum() / max(1, both.sum())), "macro_f1": float(each.mean()),
            "exact": float((said == true).all(-1).mean())}


# -- refusal: rows that are of none of the classes have the truth -1 -----------------------------------------------------


def threshold(logits_NC: Array, truth_N: Array) -> float:
    """The confidence below which an answer is refused: where most texts are treated rightly, those inside by their class and those
    outside by a refusal, as often as they are here (arXiv 1909.02027)."""
    sure_N = probabilities(logits_NC).max(-1)
    inside_N = truth_N >= 0
    right_N = inside_N & (logits_NC.argmax(-1) == truth_N)
    order = np.argsort(sure_N, kind="stable")
    refused_outside = np.concatenate([[0], np.cumsum(~inside_N[order])])
    kept_right = right_N.sum() - np.concatenate([[0], np.cumsum(right_N[order])])
    best = int((refused_outside + kept_right).argmax())
    edges = np.concatenate([[0.0], sure_N[order], [1.0]])
    return float((edges[best] + edges[best + 1]) / 2)


def rejection(logits_NC: Array, truth_N: Array, below: float) -> dict[str, float]:
    """With answers below a confidence refused: accuracy inside (a refusal is wrong there), recall outside."""
    refused_N = probabilities(logits_NC).max(-1) < below
    inside_N = truth_N >= 0
    right_N = (logits_NC.argmax(-1) == truth_N) & ~refused_N
    return {"accuracy": float(right_N[inside_N].mean()), "recall": float(refused_N[~inside_N].mean())}


# -- values and rankings -----------------------------------------------------------------------------------------------


def ranks(values_N: Array) -> Array:
    """Ranks from 1, ties at their mean."""
    order = np.argsort(values_N, kind="stable")
    ordered = values_N[order]
    first, last = np.searchsorted(ordered, values_N, side="left"), np.searchsorted(ordered, values_N, side="right")
    result: Array = (first + 1 + last) / 2
    return result


def pearson(a_N: Array, b_N: Array) -> float:
    """The correlation of two series; 0 where one does not vary."""
    a, b = a_N - a_N.mean(), b_N - b_N.mean()
    both = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / both if both else 0.0


def correlations(said_N: Array, truth_N: Array) -> dict[str, float]:
    """Spearman's (of ranks) and Pearson's correlation, and the mean square of the difference."""
    said, truth = said_N.astype(np.float64), truth_N.astype(np.float64)
    return {"spearman": pearson(ranks(said), ranks(truth)), "pearson": pearson(said, truth), "mean_square": float(((said - truth) ** 2).mean())}


# -- entities: words with the tags B-, I- and O --------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, one behind the last); an I- that follows no entity of its kind begins one."""
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix == "I" and name == kind and kind != ""
        if not goes_on:
            if kind:
                found.add((kind, start, place))
            kind, start = (name or prefix, place) if tag != "O" else ("", place)
    return found


def entity_f1(said: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of whole entities, and the share of words that are right."""
    hit = said_count = true_count = right = words = 0
    for one, other in zip(said, truth, strict=True):
        a, b = entities(one), entities(other)
        hit, said_count, true_count = hit + len(a & b), said_count + len(a), true_count + len(b)
        right, words = right + sum(x == y for x, y in zip(one, other, strict=True)), words + len(other)
    return {"entity_f1": 2 * hit / max(1, said_count + true_count), "precision": hit / max(1, said_count),
            "recall": hit / max(1, true_count), "word_accuracy": right / max(1, words)}


# -- texts -------------------------------------------------------------------------------------------------------------


def rouge_l(said: str, truth: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004); words are runs of letters and digits, in lower case."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (said, truth))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for place, other in enumerate(b, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(a) + len(b))


def exact(said: Sequence[str], truth: Sequence[str]) -> float:
    """The share of texts that are the same but for spaces around and between words."""
    return float(np.mean([" ".join(a.split()) == " ".join(b.split()) for a, b in zip(said, truth, strict=True)]))


def normalised_sql(query: str) -> str:
    """A query in lower case outside of quotes, with one space between its parts and none at the end."""
    parts = re.findall(r"'[^']*'|\"[^\"]*\"|[\w.]+|[<>!=]=|<>|\S", query.strip().rstrip(";"))
    return " ".join(part if part[0] in "'\"" else part.lower() for part in parts)


def of_texts(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU of the corpus, 0 to 100, where sacrebleu is installed (the extra `evaluate`), ROUGE-L and exact match."""
    found = {"rouge_l": float(np.mean([rouge_l(a, b) for a, b in zip(said, truth, strict=True)])), "exact": exact(said, truth)}
    try:
        import sacrebleu
    except ImportError:
        return found
    return {"chrf": sacrebleu.corpus_chrf(list(said), [list(truth)]).score, "bleu": sacrebleu.corpus_bleu(list(said), [list(truth)]).score,
            **found}

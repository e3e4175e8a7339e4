"""Figures of tasks beside those of scikit-learn, SciPy and sacrebleu."""

from __future__ import annotations

import math

import numpy as np
import pytest

from threefold.evaluation import metrics

rng = np.random.default_rng(0)
TRUTH = rng.integers(0, 4, 200)
LOGITS = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[TRUTH]


def test_accuracy_f1_and_confusion() -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    found, said = metrics.classes(LOGITS, TRUTH, list("abcd")), LOGITS.argmax(-1)
    assert found["accuracy"] == theirs.accuracy_score(TRUTH, said)
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(TRUTH, said, average="macro"), abs=1e-12)
    assert found["confusion"] == theirs.confusion_matrix(TRUTH, said).tolist() and found["labels"] == list("abcd")


def test_macro_f1_is_of_the_classes_that_are_there_or_said() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth, said = np.array([0, 0, 1, 3, 3]), np.array([0, 1, 1, 3, 0])
    found = metrics.classes(np.eye(5)[said], truth, "abcde")
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(truth, said, average="macro"))
    assert metrics.classes(np.eye(5)[truth], truth, "abcde")["macro_f1"] == 1.0


def test_several_classes_at_once() -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    truth = (rng.random((80, 5)) < 0.4).astype(float)
    scores = rng.normal(size=(80, 5)) + truth
    found = metrics.several_classes(scores, truth)
    assert found["micro_f1"] == pytest.approx(theirs.f1_score(truth, scores > 0, average="micro"), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(truth, scores > 0, average="macro"), abs=1e-12)
    assert found["exact"] == theirs.accuracy_score(truth, scores > 0)


def test_correlations_with_ties() -> None:
    theirs = pytest.importorskip("scipy.stats")
    a, b = np.round(rng.normal(size=60), 1), np.round(rng.normal(size=60), 1)
    found = metrics.correlations(a, b)
    assert found["spearman"] == pytest.approx(theirs.spearmanr(a, b).statistic, abs=1e-12)
    assert found["pearson"] == pytest.approx(theirs.pearsonr(a, b).statistic, abs=1e-12)
    assert metrics.pearson(np.ones(5), np.arange(5.0)) == 0


def test_a_calibrated_model_has_no_error_and_a_sure_one_has() -> None:
    right = np.asarray([0] * 80 + [1] * 20)
    honest = np.tile(np.log([0.8, 0.2]), (100, 1))
    assert metrics.calibration_error(honest, right) == pytest.approx(0, abs=1e-12)
    assert metrics.calibration_error(honest * 100, right) == pytest.approx(0.2, abs=1e-6)


def test_the_temperature_has_the_smallest_loss() -> None:
    def loss(t: float) -> float:
        return float(-np.log(metrics.probabilities(LOGITS * 3 / t)[np.arange(200), TRUTH]).mean())

    found = metrics.temperature(LOGITS * 3, TRUTH)
    assert all(loss(found) <= loss(found * factor) + 1e-12 for factor in np.geomspace(0.2, 5, 41))
    assert metrics.temperature(LOGITS * 6, TRUTH) == pytest.approx(2 * found, rel=1e-6)


def test_the_threshold_is_the_best_of_all() -> None:
    truth = np.where(rng.random(200) < 0.3, -1, TRUTH)
    logits = np.where(truth[:, None] < 0, LOGITS * 0.3, LOGITS)

    def worth(below: float) -> float:
        found = metrics.rejection(logits, truth, below)
        inside = (truth >= 0).mean()
        return inside * found["accuracy"] + (1 - inside) * found["recall"]

    best = worth(metrics.threshold(logits, truth))
    assert best == pytest.approx(max(worth(below) for below in np.linspace(0, 1, 2001)), abs=1e-12)


@pytest.mark.parametrize("tags, found", [
    (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
    (["I-PER", "I-LOC", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 3)}),  # what follows nothing of its kind begins
    (["B-PER", "B-PER"], {("PER", 0, 1), ("PER", 1, 2)}), (["O", "O"], set()), ([], set())])
def test_entities(tags: list[str], found: set[tuple[str, int, int]]) -> None:
    assert metrics.entities(tags) == found


def test_an_entity_counts_whole() -> None:
    found = metrics.entity_f1([["B-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "B-LOC"]])
    assert found["entity_f1"] == 0.5 == found["precision"] == found["recall"] and found["word_accuracy"] == pytest.approx(2 / 3)


def test_texts() -> None:
    assert metrics.rouge_l("the cat sat", "the cat lay down") == pytest.approx(2 * 2 / 7)
    assert metrics.rouge_l("", "a") == 0 and metrics.exact(["a  b "], ["a b"]) == 1
    sacrebleu = pytest.importorskip("sacrebleu")
    said, truth = ["there are 3 bottles", "a wall"], ["there are 4 bottles", "the wall"]
    found = metrics.of_texts(said, truth)
    assert found["chrf"] == sacrebleu.corpus_chrf(said, [truth]).score and found["bleu"] == sacrebleu.corpus_bleu(said, [truth]).score
    assert math.isclose(found["exact"], 0)


@pytest.mark.parametrize("one, other", [("SELECT  a FROM b ;", "select a from b"), ("SELECT 'A  b'", "select 'A  b'"), ("a>=1", "a >= 1")])
def test_queries_that_say_the_same(one: str, other: str) -> None:
    assert metrics.normalised_sql(one) == metrics.normalised_sql(other)
    assert metrics.normalised_sql("select 'A'") != metrics.normalised_sql("select 'a'")

"""Zero-shot classification: transformers' own numbers where a head knows entailment, and laws where a model is asked how likely a
label is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.test_tasks import BERT_NAMES, TEXT, alike, bert, byte_bpe, gpt2, t5, wordpiece, written_out
from threefold import AutoModelForCausalLM, pipeline
from threefold.auto import load
from threefold.errors import UsageError
from threefold.generation.likelihood import text_log_probs
from threefold.prompting import Prompt

__all__ = ["bert", "gpt2", "t5"]
pytestmark = pytest.mark.filterwarnings("ignore")

LABELS = ["the road", "hen", "nothing said"]
TEXTS = ["The hen crossed the road.", "Why did you cross?"]
NEAR = 1e-5


def named(*classes: str) -> dict[str, Any]:
    """What transformers' configuration calls the classes of a head."""
    return {"num_labels": len(classes), "id2label": dict(enumerate(classes)), "label2id": {name: n for n, name in enumerate(classes)}}


# -- by entailment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [("contradiction", "neutral", "entailment"), ("entailment", "neutral", "contradiction"),
                                     ("CONTRADICTION", "ENTAILMENT"), ("neutral", "Entailed", "contradiction")])
@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"hypothesis_template": "This is about {}, said the dog."}])
def test_a_head_that_knows_entailment_says_what_transformers_says(classes: tuple[str, ...], options: dict[str, Any],
                                                                  bert: Callable[..., Path]) -> None:
    folder = bert("classify", **named(*classes))
    ours, theirs = pipeline("zero-shot-classification", folder), transformers.pipeline("zero-shot-classification", str(folder), device=-1)
    for text, labels in itertools.product([*TEXTS, TEXTS, TEXTS[:1]], [LABELS, LABELS[:1], "hen, the road ,cock"]):
        alike(ours(text, candidate_labels=labels, **options), theirs(text, candidate_labels=labels, **options))
    alike(ours(TEXTS[0], LABELS, **options), theirs(TEXTS[0], LABELS, **options))
    alike(pipeline("zero-shot-classification", folder, candidate_labels=LABELS, **options)(TEXTS), theirs(TEXTS, LABELS, **options))


@pytest.mark.parametrize("pad", [True, False])
def test_a_decoder_with_such_a_head_too(pad: bool, tmp_path: Path) -> None:
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", **({"pad_token": "<|endoftext|>"} if pad else {})}
    folder = written_out(tmp_path, "gpt2", "classify", byte_bpe(["<|endoftext|>"]), names, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                         **named("contradiction", "entailment"))
    theirs = transformers.pipeline("zero-shot-classification", str(folder), device=-1)(TEXTS, LABELS)
    alike(pipeline("zero-shot-classification", folder)(TEXTS, LABELS), theirs)


def test_a_long_text_is_refused_or_cut_as_transformers_cuts_it(tmp_path: Path) -> None:
    folder = written_out(tmp_path, "bert", "classify", wordpiece(), {**BERT_NAMES, "model_max_length": 32},  # type: ignore[dict-item]
                         **named("contradiction", "neutral", "entailment"))
    ours, theirs = pipeline("zero-shot-classification", folder), transformers.pipeline("zero-shot-classification", str(folder), device=-1)
    alike(ours(TEXT, LABELS, truncation=True), theirs(TEXT, LABELS))
    with pytest.raises(UsageError, match="64 positions"):
        ours(TEXT, LABELS)


# -- by likelihood -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(gpt2: Path, t5: Path, bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def made(family: str, task: str) -> Path:
        return written_out(tmp_path_factory.mktemp(family), family, task, wordpiece(), BERT_NAMES)

    return {"gpt2": gpt2, "t5": t5, "bert": bert("masked"), "bert-pairs": bert("pretraining"), "roberta": made("roberta", "masked"),
            "electra": made("electra", "replaced")}


FAMILIES = ("gpt2", "t5", "bert", "bert-pairs", "roberta", "electra")
each = pytest.mark.parametrize("family", FAMILIES)


def softmax(values: Any) -> Any:
    exps = np.exp(np.array(values) - max(values))
    return exps / exps.sum()


def by_label(result: dict[str, Any]) -> dict[str, float]:
    assert list(result) == ["sequence", "labels", "scores"] and result["scores"] == sorted(result["scores"], reverse=True)
    return dict(zip(result["labels"], result["scores"], strict=True))


@each
@pytest.mark.parametrize("form", [None, Prompt(template="{text}\nSo: ", gap="", name="a"), Prompt(template="Said {text} of", name="b")])
def test_scores_follow_the_formula(family: str, form: Prompt | None, folders: dict[str, Path]) -> None:
    """The mean over a label's tokens of what the text adds to their log-probabilities."""
    model, tokenizer = load(folders[family])
    ours = pipeline("zero-shot-classification", model, tokenizer)

    def mean(text: str, label: str) -> float:
        if form is not None:
            place = (form.fill(text), form.gap + label, "")
        else:
            place = (f"{text}\nThis example is", f" {label}", ".")
        return float(np.mean(text_log_probs(model, tokenizer, [place])[0]))

    more: dict[str, Any] = {} if form is None else {"prompt": form}
    for text in TEXTS:
        plain, empty = ([mean(t, label) for label in LABELS] for t in (text, ""))
        gain = np.array(plain) - np.array(empty)
        for options, expected in [({}, softmax(gain)), ({"calibrate": False}, softmax(plain)), ({"multi_label": True}, 1 / (1 + np.exp(-gain))),
                                  ({"multi_label": True, "calibrate": False}, np.exp(plain))]:
            found = by_label(ours(text, LABELS, **options, **more))
            np.testing.assert_allclose([found[label] for label in LABELS], expected, atol=NEAR)


@each
def test_the_order_of_labels_and_texts_changes_nothing(family: str, folders: dict[str, Path]) -> None:
    ours = pipeline("zero-shot-classification", folders[family])
    results = ours(TEXTS, LABELS)
    assert [one["sequence"] for one in results] == TEXTS
    assert all(sum(one["scores"]) == pytest.approx(1) for one in results)
    for text, one in zip(TEXTS, results, strict=True):
        turned = by_label(ours(text, LABELS[::-1]))
        assert turned == pytest.approx(by_label(one), abs=NEAR)
    alone = {label: ours(TEXTS[0], label)["scores"][0] for label in LABELS}  # a label alone is judged by itself
    assert alone == pytest.approx(by_label(ours(TEXTS[0], LABELS, multi_label=True)), abs=NEAR)
    for one, again in zip(results, ours(TEXTS, ", ".join(LABELS), batch_size=2), strict=True):
        assert by_label(again) == pytest.approx(by_label(one), abs=NEAR)


@pytest.mark.parametrize("family", ["bert", "electra", "gpt2"])
def test_what_stands_behind_a_label_is_seen_by_those_that_read_both_ways(family: str, folders: dict[str, Path]) -> None:
    ours = pipeline("zero-shot-classification", folders[family], calibrate=False)
    one, other = (by_label(ours(TEXTS[0], LABELS, hypothesis_template=f"It is {{}}{end}")) for end in (".", " and the cock."))
    assert (one == other) == (family == "gpt2")


@each
def test_a_text_that_is_too_long_is_an_error_or_is_cut_at_its_end(family: str, folders: dict[str, Path]) -> None:
    ours = pipeline("zero-shot-classification", folders[family])
    long = "The hen crossed the road. " * 200
    if family == "t5":  # its positions have no end
        assert by_label(ours(long, LABELS, truncation=True)) == by_label(ours(long, LABELS))
        return
    with pytest.raises(UsageError, match="context is|the model takes"):
        ours(long, LABELS)
    cut = by_label(ours(long, LABELS, truncation=True))
    assert cut == by_label(ours(long + "Why?", LABELS, truncation=True)) and cut != by_label(ours("Why? " + long, LABELS, truncation=True))
    assert by_label(ours(TEXTS[0], LABELS, truncation=True)) == by_label(ours(TEXTS[0], LABELS))
    with pytest.raises(UsageError, match="context is|the model takes"):
        ours("a", ["the hen " * 300, "b"], truncation=True)


@pytest.mark.parametrize("text", ["\uac00\ub098\ub2e4\ubdc1" * 200, "\U0001f600" * 200, "\u1100\u1161\u11a8" * 200])
def test_a_text_whose_characters_are_several_tokens_is_cut_too(text: str, gpt2: Path) -> None:
    found = by_label(pipeline("zero-shot-classification", gpt2)(text, LABELS, truncation=True))
    assert found == by_label(pipeline("zero-shot-classification", gpt2)(text + "x", LABELS, truncation=True))


def test_a_model_that_read_the_label_finds_it(shared_data: Callable[[str], Path]) -> None:
    """A small model of stories: after a text with a word, that word is likelier than it was without."""
    ours = pipeline("zero-shot-classification", shared_data("stories260K/hf"), hypothesis_template="There was a {}.")
    animals = ["cat", "dog", "bird", "bear"]
    right = sum(ours(f"Tim had a big {one}. The {one} was happy. The {one} ran to the park.", animals)["labels"][0] == one for one in animals)
    assert right >= 3


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(gpt2: Path, bert: Callable[..., Path]) -> None:
    ours, judge = pipeline("zero-shot-classification", gpt2), bert("classify", **named("contradiction", "entailment"))
    for call, words, hint in [
        (lambda: ours("a"), "`candidate_labels` is None", "commas"),
        (lambda: ours("a", []), r"`candidate_labels` is \[\]", ""),
        (lambda: ours("a", ["b", " "]), "labels that are not empty", ""),
        (lambda: ours("", ["b"]), "a text to classify is ''", ""),
        (lambda: ours("a", ["b"], hypothesis_template="no place"), "`hypothesis_template` is 'no place'", "once"),
        (lambda: ours("a", ["b"], hypothesis_template="{} and {}"), "`hypothesis_template`", "once"),
        (lambda: ours("a", ["b"], multilabel=True), "`multilabel` is not a known argument", "did you mean `multi_label`?"),
        (lambda: pipeline("zero-shot-classification", judge)("a", ["b"], calibrate=True), "without an entailment", "hypothesis_template"),
        (lambda: pipeline("zero-shot-classification", bert("classify"))("a", ["b"]), "none is an entailment", "predicts tokens"),
        (lambda: pipeline("zero-shot-classification", bert("body")), "loaded for `body`", "`masked`"),
        (lambda: ours("a", ["b"], prompt="sentimnt"), "no prompt `sentimnt`", "did you mean"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            call()  # type: ignore[no-untyped-call]
        assert hint in caught.value.hint
    assert pipeline("zero-shot-classification", AutoModelForCausalLM.from_pretrained(gpt2))("a b", ["b", "c"])["labels"]

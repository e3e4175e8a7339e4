"""Questions: answered from a text, written as SQL; and how alike sentences are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_tasks import bert, gpt2, t5
from threefold import pipeline
from threefold.auto import load
from threefold.errors import UsageError
from threefold.generation.likelihood import written_log_probs
from threefold.model.pooling import Pooling, write_pooling
from threefold.prompting import Prompt, load_prompt
from threefold.tasks.asking import QuestionAnswering, TextToSql

__all__ = ["bert", "gpt2", "t5"]
pytestmark = pytest.mark.filterwarnings("ignore")

CONTEXT = "The hen crossed the road. The cock said nothing, and the hen said nothing."
QUESTION = "Who crossed the road?"


@pytest.fixture(scope="module")
def plain(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder without a chat template and with room for prompts."""
    folder = Path(shutil.copytree(gpt2, tmp_path_factory.mktemp("plain") / "model"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What models are given, as ids, with options and stop strings; `says` are the texts that they answer, in turn."""
    seen: dict[str, Any] = {"prompts": [], "says": []}

    def write(self: Any, prompts: list[tuple[int, ...]], options: dict[str, Any], first: int, stop: tuple[str, ...] = ()) -> list[list[list[int]]]:
        seen["prompts"].extend(prompts)
        seen.update(options=options, stop=stop)
        texts = [seen["says"].pop(0) for _ in prompts]
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        return [[[*self.tokenizer.encode(text, add_special_tokens=False), *end]] for text in texts]

    for kind in (QuestionAnswering, TextToSql):
        monkeypatch.setattr(kind, "write", write)
    return seen


# -- answers from a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "answer", "start"), [
    (" The hen", "The hen", 0), ("the cock\n\nText: more", "The cock", 26), ("the hen", "the hen", 53), ("nothing", "nothing", 40),
    (" a dog ", "a dog", -1), (" hen (the)", "hen (the)", -1), ("", "", -1)])
def test_an_answer_is_found_where_it_stands(said: str, answer: str, start: int, plain: Path, asked: dict[str, Any]) -> None:
    """First as it is, then in any case of letters; -1 where it does not stand."""
    asked["says"] = [said] * 3
    ours = pipeline("question-answering", plain)
    found = ours(question=QUESTION, context=CONTEXT)
    assert list(found) == ["score", "start", "end", "answer"] and 0 <= found["score"] <= 1
    assert (found["answer"], found["start"], found["end"]) == (answer, start, start + len(answer) if start >= 0 else -1)
    assert start < 0 or CONTEXT[found["start"]:found["end"]] == answer
    assert ours([{"question": QUESTION, "context": CONTEXT}] * 2) == [found, found]


@pytest.mark.parametrize("family", ["gpt2", "plain", "t5"])
def test_the_score_is_the_mean_probability_of_a_token(family: str, gpt2: Path, plain: Path, t5: Path, asked: dict[str, Any]) -> None:
    model, tokenizer = load({"gpt2": gpt2, "plain": plain, "t5": t5}[family])
    asked["says"] = ["The hen crossed", "the road"]
    results = pipeline("question-answering", model, tokenizer)(question=["a?", "b?"], context=CONTEXT)
    for prompt, text, one in zip(asked["prompts"], ["The hen crossed", "the road"], results, strict=True):
        logs = written_log_probs(model, [(prompt, tokenizer.encode(text, add_special_tokens=False))])[0]
        assert one["answer"] == text and one["score"] == pytest.approx(math.exp(np.mean(logs)), rel=1e-5)


def given(ours: Any, family: str, text: str) -> list[int]:
    """What a model of a family should be given of a text."""
    if family == "plain":
        return list(ours.tokenizer.encode_prompt(text))
    if family == "t5":
        return list(ours.tokenizer.encode(text))
    return list(ours.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False))


SOURCE = f"question: {QUESTION} context: {CONTEXT}"
FIELDS: dict[str, str] = {"question": QUESTION, "context": CONTEXT}
FORM = Prompt(template="{context} Now: {question}", stop=("\n",), new_tokens=5)


FORM_KO = load_prompt("question-answering-ko")


@pytest.mark.parametrize(("family", "prompt", "text"), [
    ("plain", None, load_prompt("question-answering").fill(FIELDS)), ("plain", "question-answering-ko", FORM_KO.fill(FIELDS)),
    ("gpt2", None, SOURCE), ("t5", None, SOURCE),
    ("plain", FORM, FORM.fill(FIELDS)), ("gpt2", FORM, FORM.fill(FIELDS)), ("t5", FORM, FORM.fill(FIELDS))])
def test_a_model_is_asked_in_the_way_that_it_knows(family: str, prompt: Any, text: str, gpt2: Path, plain: Path, t5: Path,
                                                   asked: dict[str, Any]) -> None:
    """A decoder goes on with a prompt that has examples, one with a chat template gets a message, an encoder-decoder a source."""
    folder = {"gpt2": gpt2, "plain": plain, "t5": t5}[family]
    asked["says"] = ["hen"]
    ours = pipeline("question-answering", folder, **{} if prompt is None else {"prompt": prompt})
    ours(FIELDS)
    assert list(asked["prompts"][0]) == given(ours, family, text)
    settings = load_prompt(prompt or "question-answering") if prompt or family == "plain" else Prompt(template="{text}")
    assert (asked["stop"], asked["options"].get("max_new_tokens")) == (settings.stop, settings.new_tokens)


def test_answers_are_written_greedily_by_the_model_itself(gpt2: Path, t5: Path) -> None:
    for folder in (gpt2, t5):
        ours = pipeline("question-answering", folder, max_new_tokens=6)
        one, other = ours(FIELDS), ours(question=QUESTION, context=CONTEXT)
        assert one == other and 0 < one["score"] <= 1 and one["answer"]
        assert ours([FIELDS, {"question": "Why?", "context": CONTEXT}], batch_size=2)[0]["answer"] == one["answer"]


# -- SQL ---------------------------------------------------------------------------------------------------------------

ASKED = {"question": "How many hens?", "schema": "hens(id, name)"}


@pytest.mark.parametrize(("family", "one", "text"), [
    ("plain", ASKED, load_prompt("sql").fill(ASKED)),
    ("t5", ASKED, "How many hens?\nhens(id, name)"), ("gpt2", ASKED, "How many hens?\nhens(id, name)"),
    ("t5", {**ASKED, "schema": {"hens": ["id", "name"], "cocks": ["id"]}}, "How many hens?\nhens(id, name), cocks(id)"),
    ("plain", "SQL of hens:", "SQL of hens:"), ("t5", "hens | How many?", "hens | How many?"), ("gpt2", "hens | How many?", "hens | How many?")])
def test_sql_is_asked_for_with_its_tables(family: str, one: Any, text: str, gpt2: Path, plain: Path, t5: Path, asked: dict[str, Any]) -> None:
    asked["says"] = [" select hens; select", "hens", "nothing"]
    ours = pipeline("text-to-sql", {"gpt2": gpt2, "plain": plain, "t5": t5}[family])
    query = ours(one)[0]["generated_text"]
    assert list(asked["prompts"][0]) == given(ours, family, text)
    if family != "t5":  # whose vocabulary has few words
        assert query == ("select hens" if family == "plain" else "select hens; select")
        assert ours([one, one]) == [{"generated_text": "hens"}, {"generated_text": "nothing"}]


# -- how alike ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_sentences_are_as_alike_as_their_vectors(how: str, bert: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert("body"), tmp_path / "model"))
    one = {"source_sentence": "The hen crossed the road.", "sentences": ["The cock crossed the road.", "nothing", "The hen crossed the road."]}
    states = [np.array(rows[0]) for rows in pipeline("feature-extraction", folder)([one["source_sentence"], *one["sentences"]])]
    vectors = [{"mean": s.mean(0), "cls": s[0], "last": s[-1]}[how] for s in states]
    expected = [v @ vectors[0] / np.linalg.norm(v) / np.linalg.norm(vectors[0]) for v in vectors[1:]]
    asking = pipeline("sentence-similarity", folder, pooling=how)
    found = asking(one)
    assert all(isinstance(value, float) for value in found) and found == pytest.approx(expected, abs=1e-5) and found[2] == pytest.approx(1)
    assert asking([one, one]) == [found, found]
    with pytest.raises(UsageError, match="does not say how states become one vector"):
        pipeline("sentence-similarity", folder)(one)
    for normalise in (True, False):  # the vectors of the model may have any length
        write_pooling(folder, Pooling(how, normalise), width=48)
        assert pipeline("sentence-similarity", folder)(one) == pytest.approx(found, abs=1e-6), "the directory says it"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(gpt2: Path, t5: Path, bert: Callable[..., Path]) -> None:
    qa, sql, body = pipeline("question-answering", gpt2), pipeline("text-to-sql", t5), pipeline("sentence-similarity", bert("body"), pooling="cls")
    for call, words, hint in [
        (lambda: qa(), "given once", "question="),
        (lambda: qa(FIELDS, question="a"), "given once", ""),
        (lambda: qa(question="a"), "`context` is missing", ""),
        (lambda: qa(question=["a", "b"], context=["c"]), "2 questions and 1 contexts", ""),
        (lambda: qa({"question": "a", "text": "b"}), "the fields `question`, `text`, expected `question` and `context`", "context"),
        (lambda: qa(question="a", context=" "), "`context` is ' '", ""),
        (lambda: qa("a"), "is 'a', expected", ""),
        (lambda: qa(FIELDS, num_return_sequences=2, num_beams=2), "gives one answer", "text-generation"),
        (lambda: qa(FIELDS, max_answer_len=3), "`max_answer_len` is not a known argument", ""),
        (lambda: qa(question="a", context="the hen " * 600), "the model's context is 512", "shorten"),
        (lambda: sql({"question": "a"}), "expected `question` and `schema`", ""),
        (lambda: sql("a", prompt="sql"), "is one text", "leave `prompt` out"),
        (lambda: pipeline("question-answering", bert("masked")), "loaded for `masked`", "it is done by models for `causal`, `seq2seq`"),
        (lambda: body({"source_sentence": "a", "sentences": []}), "an input of `sentence-similarity`", "source_sentence"),
        (lambda: body({"source_sentence": "a", "sentences": ["b"]}, pooling="max"), "`pooling` is 'max'", "known"),
        (lambda: pipeline("sentence-similarity", gpt2, pooling="last")("a"), "an input of", ""),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            call()  # type: ignore[no-untyped-call]
        assert hint in caught.value.hint

"""Every objective through the whole of `pretrain`: from a page of text to a model that transformers opens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_pretrain import LINES, lines, stopped_after
from threefold.auto import AutoTokenizer
from threefold.config import Recipe
from threefold.data.shards import Shards
from threefold.errors import ConfigError
from threefold.inspection import batches
from threefold.model.weights import load_model
from threefold.pretrain import Request, dry_run, pretrain
from threefold.scoring import of_text, task_of
from threefold.training.length import Length

BASE = {"model.size": "nano", "model.context": 32, "train.batch_tokens": 128, "train.dtype": "float32", "tokenizer.vocab_size": 400}
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "masked": ({}, "BertForMaskedLM"),
    "masked-pairs": ({"train.objective": "masked", "objective.next_sentence": True}, "BertForPreTraining"),
    "masked-words": ({"train.objective": "masked", "objective.whole_words": True, "model.family": "electra"}, "ElectraForMaskedLM"),
    "masked-roberta": ({"train.objective": "masked", "model.family": "roberta"}, "RobertaForMaskedLM"),
    "replaced": ({}, "ElectraForPreTraining"),
    "span": ({"tokenizer.vocab_size": 700}, "T5ForConditionalGeneration"),
    "seq2seq": ({"tokenizer.vocab_size": 600}, "MarianMTModel"),
    "prefix": ({}, "Qwen3ForCausalLM"),
    "prefix-t5": ({"train.objective": "prefix", "model.family": "t5", "tokenizer.vocab_size": 600}, "T5ForConditionalGeneration"),
    "causal-gpt1": ({"train.objective": "causal", "model.family": "gpt1"}, "OpenAIGPTLMHeadModel"),
    "causal-gpt3": ({"train.objective": "causal", "model.family": "gpt3"}, "GPTNeoForCausalLM"),
    "causal-palm": ({"train.objective": "causal", "model.family": "palm"}, "CohereForCausalLM"),
    "causal-phi3": ({"train.objective": "causal", "model.family": "phi3"}, "Phi3ForCausalLM"),
    "causal-biogpt": ({"train.objective": "causal", "model.family": "biogpt"}, "BioGptForCausalLM"),
}
each = pytest.mark.parametrize("name", ROWS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "bottles.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


def recipe(name: str, text: Path, **more: Any) -> Recipe:
    return Recipe().override({**BASE, "train.objective": name, "data.paths": (str(text),), **ROWS[name][0], **more})


@each
def test_a_run_ends_in_a_model_that_transformers_opens(name: str, text: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = tmp_path / "run"
    result = pretrain(recipe(name, text, **{"train.steps": 4, "train.eval_every": 2}), Request(out=run))
    assert result["step"] == 4 and (run / "report.html").is_file()
    described = json.loads((run / "model" / "config.json").read_text())
    assert described["architectures"] == [ROWS[name][1]]
    said = re.search(r"model, tokenizer = (\w+)", (run / "model" / "README.md").read_text())
    assert said, "the card says how it is loaded"
    theirs = getattr(transformers, said[1]).from_pretrained(run / "model").eval()
    assert type(theirs).__name__ == ROWS[name][1]
    ours, tokenizer = load_model(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    assert not ours.notes
    ids = torch.tensor([tokenizer("there are 12 green bottles")["input_ids"]])
    if "masked" in name or name == "replaced":
        assert ids[0, 0] == tokenizer.cls_token_id and ids[0, -1] == tokenizer.sep_token_id
    more = {"decoder_input_ids": ids} if ours.config.is_encoder_decoder else {}
    with torch.no_grad():
        a, b = theirs(ids, **more), ours(ids, **more)
    key = "prediction_logits" if hasattr(a, "prediction_logits") else "logits"
    assert float((getattr(a, key) - getattr(b, key)).abs().max()) < 1e-5 * max(1.0, float(getattr(a, key).abs().max()))
    assert ours.config.position_offset <= 2, "no row of the table is wasted"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    assert their_tokenizer("there are 12 green bottles")["input_ids"] == ids[0].tolist()
    assert (run / "generator" / "model.safetensors").is_file() == (name == "replaced")
    again = of_text(str(run))
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6), "evaluated again, it is worth what it was worth at its end"
    assert ("discriminator" in again) == (name == "replaced")
    assert task_of(str(run), [str(text)]) == "text" and 0 < of_text(str(run), [str(text)])["loss"] < 2 * again["loss"]


@each
def test_a_run_that_was_interrupted_ends_the_same(name: str, text: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain(recipe(name, text, **{"train.steps": 6, "train.save_every": 2}), Request(out=whole))
    first = recipe(name, text, **{"train.steps": 6, "train.save_every": 2})
    with stopped_after(5):
        pretrain(first, Request(out=halves))
    pretrain(first, Request(out=halves))
    for file in ("model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (whole / file).read_bytes() == (halves / file).read_bytes(), file
    assert [line["loss"] for line in lines(whole) if "loss" in line] == [line["loss"] for line in lines(halves) if "loss" in line]


@each
def test_the_batch_of_a_step_can_be_inspected(name: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(name, text, **{"train.steps": 1}), Request(out=run))
    found = batches.of_run(run, step=3, rows=2)
    assert len(found["rows"]) == 2 and all(row["learnt"] for row in found["rows"]) and batches.render(found)


def test_going_on_with_an_encoder_keeps_its_kind(text: Path, tmp_path: Path) -> None:
    for name in ("masked", "replaced"):
        base = tmp_path / f"base-{name}"
        pretrain(recipe(name, text, **{"train.steps": 2}), Request(out=base))
        domain = {"model.from": str(base), "model.size": "auto", "tokenizer.vocab_size": 8192, "train.steps": 3, "model.context": 24}
        pretrain(recipe(name, text, **domain), Request(out=tmp_path / name))
        again = load_model(tmp_path / name / "model")
        assert again.config.max_position_embeddings == 24 and again.task == load_model(base / "model").task


@pytest.mark.parametrize(("wrong", "words"), [
    ({"train.objective": "masked", "model.family": "llama"}, "needs a head for `masked`"),
    ({"train.objective": "causal", "model.family": "bert"}, "needs a head for `causal`"),
    ({"train.objective": "causal", "objective.whole_words": True}, "whole_words"),
    ({"train.objective": "span", "objective.smoothing": 0.2}, "smoothing"),
    ({"train.objective": "mask"}, "unknown objective"),
])
def test_an_objective_and_a_family_that_do_not_go_together_are_refused(wrong: dict[str, Any], words: str, text: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        dry_run(Recipe().override({**BASE, "data.paths": (str(text),), **wrong}))


@each
def test_what_an_evaluation_costs_is_reckoned_by_the_text(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget reserves time for the last evaluation by tokens of text; reckoned by labels alone, an encoder would idle for most of it."""
    told: list[float] = []
    monkeypatch.setattr(Length, "evaluated", lambda self, seconds, tokens: told.append(tokens))
    run = tmp_path / "run"
    pretrain(recipe(name, text, **{"train.steps": 1}), Request(out=run))
    held = Shards.open(run / "data").count("validation").tokens
    assert 0.8 * held <= told[-1] <= 1.2 * held

"""From text to figures: a model by its name, text by its path, a run by its own held-out part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import transformers

import threefold
from tests.evaluation.test_loss import AGREEMENT, by_hand
from threefold import files
from threefold.data.shards import Shards, prepare
from threefold.errors import UsageError
from threefold.evaluation.loss import evaluate_shards, evaluate_text
from threefold.evaluation.yardsticks import yardsticks
from threefold.model.build import build_model, sized
from threefold.model.weights import load_model, save_model
from threefold.text.sources import parse_source
from threefold.text.tokenizer import Tokenizer

CONTEXT = 48
POEM = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. Number {}: été, 한국어.\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as training leaves it, of a model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "poem.txt"
    files.write_file(text, "".join(POEM.format(i) for i in range(120)))
    tokenizer = Tokenizer.train("bpe", [text.read_text()], 300)
    prepare([parse_source(str(text))], tokenizer, folder / "data", near_duplicates=False)
    model = build_model(sized("llama", "nano", vocab_size=tokenizer.vocab_size, context=CONTEXT), seed=2)
    save_model(model, folder / "model")
    tokenizer.save(folder / "model", context=CONTEXT)
    files.write_file(folder / "recipe.toml", "")
    return folder


def test_a_run_is_evaluated_on_its_own_held_out_part(run: Path) -> None:
    result = threefold.evaluate(run)
    shards, tokenizer = Shards.open(run / "data"), Tokenizer.load(run / "model")
    held = list(shards.documents("validation"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    total, count = by_hand(theirs, held, CONTEXT)
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(total / count, abs=AGREEMENT / 10)
    text = "".join(tokenizer.decode(ids) for ids in held)
    assert result["bytes"] == len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    whole = (run / "poem.txt").read_text()
    assert text == whole[int(0.9 * len(whole)):]
    assert threefold.evaluate(run / "model") == result


def test_text_is_evaluated_whole(run: Path) -> None:
    result = threefold.evaluate(run, [str(run / "poem.txt")])
    tokenizer = Tokenizer.load(run / "model")
    text = (run / "poem.txt").read_text()
    assert (result["tokens"], result["bytes"]) == (len(tokenizer.encode(text)) + 1, len(text.encode()))
    assert result == evaluate_text(load_model(run / "model"), tokenizer, [text])
    assert result == evaluate_text(*threefold.load(run), [text])


def test_a_subset_is_the_same_every_time(run: Path) -> None:
    model, shards = load_model(run / "model"), Shards.open(run / "data")
    part = evaluate_shards(model, shards, subset=2)
    assert part == evaluate_shards(model, shards, subset=2)
    assert part["tokens"] <= 2 * CONTEXT < evaluate_shards(model, shards)["tokens"]


def test_a_model_without_data_of_its_own_needs_some(run: Path, tmp_path: Path) -> None:
    save_model(load_model(run / "model"), tmp_path / "alone")
    Tokenizer.load(run / "model").save(tmp_path / "alone")
    with pytest.raises(UsageError, match="no held-out text of its own"):
        threefold.evaluate(tmp_path / "alone")


def test_the_yardsticks_of_a_run(run: Path) -> None:
    shards, tokenizer = Shards.open(run / "data"), Tokenizer.load(run / "model")
    figures = yardsticks(shards, tokenizer)
    assert {
        "byte unigram",
        "byte bigram",
        "gzip",
        "gzip primed",
        "xz",
        "xz primed",
        "token unigram",
        "token bigram",
    } <= set(figures)
    assert all(0 < value < 8 and np.isfinite(value) for value in figures.values())
    assert figures["token bigram"] < figures["token unigram"] and figures["xz primed"] < figures["xz"]

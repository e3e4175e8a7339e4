"""The saved directory gives transformers the same ids, for every kind and beside a model of any common type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.text.helpers import CODE, ENGLISH, EVERY_KIND, KOREAN, SAMPLES, small, texts
from threefold.text.tokenizer import Tokenizer

TEXTS = [text for name, text in SAMPLES.items() if name not in ("specials", "bytes")] + [
    KOREAN,
    ENGLISH,
    CODE[:2000],
    "x" * 300,
]
MODEL_TYPES = [None, "gpt2", "bert", "t5", "llama", "qwen3", "phi3", "roberta"]


def check(tokenizer: Tokenizer, folder: Path, model_type: str | None) -> None:
    tokenizer.save(folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    for part in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
        assert getattr(theirs, f"{part}_token") == tokenizer.roles.get(part)
    if tokenizer.vocab_size == len(tokenizer._vocab):
        assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind(kind: str, model_type: str | None, tmp_path: Path) -> None:
    check(small(kind), tmp_path, model_type)


def test_bpe_with_qwen2s_rule_beside_qwen2(tmp_path: Path) -> None:
    """transformers makes its own Qwen2Tokenizer for this type, whatever the directory says; the ids agree."""
    tokenizer = Tokenizer.train("bpe", texts(), 700, pattern="qwen2")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen2Tokenizer"
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    check(small("bpe").grow([KOREAN, "new words, new words"] * 2, 50), tmp_path, "gpt2")


@pytest.mark.parametrize(
    "path",
    [
        "gpt2_bpe",
        "gpt1_bpe",
        "bert_wordpiece",
        "sentencepiece_test/test_model.model",
        "t5_test_spm/sentencepiece.model",
    ],
)
def test_published_files(shared_data: Callable[[str], Path], path: str, tmp_path: Path) -> None:
    check(Tokenizer.load(shared_data(f"tokenizers/{path}")), tmp_path, None)


def test_a_llama_directory(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    check(Tokenizer.load(shared_data("stories260K/hf")), tmp_path, "llama")


@pytest.mark.parametrize(
    "kind, frame", [("bpe", ([], [])), ("wordpiece", (["[CLS]"], ["[SEP]"])), ("unigram", ([], ["</s>"]))]
)
def test_what_transformers_adds_around_a_text(kind: str, frame: tuple[list[str], list[str]], tmp_path: Path) -> None:
    small(kind).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    pieces = theirs.convert_ids_to_tokens(theirs.encode("it was"))
    assert pieces == [*frame[0], *small(kind).tokenize("it was"), *frame[1]]

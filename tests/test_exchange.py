"""`threefold export`: a folder of its own that transformers opens, with the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_peft import ROWS, ids_of, logits, made, stirred
from threefold import auto
from threefold.errors import UsageError
from threefold.exchange import export
from threefold.model import adapters
from threefold.model.lowrank import Shape
from threefold.model.weights import save_model
from threefold.text.tokenizer import Tokenizer

each = pytest.mark.parametrize("name, task", ROWS, ids=[f"{name}-{task}" for name, task in ROWS])


def words() -> Tokenizer:
    return Tokenizer.train("bpe", ["a few words to learn from, and a few more"], 300)


def directory(folder: Path, name: str = "qwen3", task: str = "causal") -> Any:
    model = made(name, task)
    save_model(model, folder)
    words().save(folder)
    return model


def adapter(folder: Path, name: str, task: str) -> Any:
    model = directory(folder / "base", name, task)
    adapters.attach(model, Shape(3, 6.0))
    adapters.save(stirred(model), folder / "adapter", str(folder / "base"))
    words().save(folder / "adapter")
    return model


@each
def test_an_adapter_is_exported_merged_and_opens_in_transformers(name: str, task: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    expected = logits(adapter(tmp_path, name, task))
    found = export(str(tmp_path / "adapter"), tmp_path / "out")
    assert found["merged"] and found["family"] == name and found["task"] == task and found["dtype"] == "float32"
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = getattr(transformers, described["architectures"][0]).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        other = theirs(**ids_of(made(name, task))).logits
    assert float((other - expected).abs().max()) <= 2e-6 * float(expected.abs().max()) + 1e-6
    again = auto.load(tmp_path / "out")[0]
    assert not list(adapters.sides(again)) and again.labels == made(name, task).labels


def test_a_model_without_adapter_is_copied_bit_for_bit_and_may_be_rounded(tmp_path: Path) -> None:
    model = directory(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("where it is from\n")
    assert not export(str(tmp_path / "model"), tmp_path / "same")["merged"]
    export(str(tmp_path / "model"), tmp_path / "half", dtype="bfloat16")
    same, half = (auto.load(tmp_path / name)[0] for name in ("same", "half"))
    for ours, one, other in zip(model.parameters(), same.parameters(), half.parameters(), strict=True):
        assert torch.equal(ours, one) and torch.equal(ours.bfloat16(), other)
    assert (tmp_path / "same" / "README.md").read_text() == "where it is from\n"
    assert Tokenizer.load(tmp_path / "same").fingerprint == words().fingerprint


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path: Path) -> None:
    directory(tmp_path / "model")
    with pytest.raises(UsageError, match="no format `ggfu`"):
        export(str(tmp_path / "model"), tmp_path / "out", to="ggfu")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds `diary.txt`, which would be lost"):
        export(str(tmp_path / "model"), tmp_path / "kept")
    for over in (tmp_path / "model", tmp_path):
        with pytest.raises(UsageError, match="which is exported"):
            export(str(tmp_path / "model"), over)
    with pytest.raises(UsageError):
        export(str(tmp_path / "model"), tmp_path / "out", dtype="int3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model"] and (tmp_path / "kept" / "diary.txt").read_text() == "mine"

"""The guide `docs/guides/add-a-family.md`, tried: the family beside it, put into the table, agrees with transformers."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_families import open_there
from tests.parity.theirs import CAST64, FLOAT32, GRADIENT32, IDS, Row, close, their_class, their_model
from threefold.model.build import build_model, scaled
from threefold.model.families import FAMILIES, MODEL_TYPES
from threefold.model.names import views
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "qwen2.py"
MOST_LINES = 120
FIELDS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80,
          "max_position_embeddings": 4096}


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    family = runpy.run_path(str(GUIDE))["QWEN2"]
    monkeypatch.setitem(FAMILIES, "qwen2", family)
    monkeypatch.setitem(MODEL_TYPES, "qwen2", family)


def test_the_guides_family_is_short() -> None:
    assert len(GUIDE.read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 6}])
@pytest.mark.parametrize("task", ["causal", "classify", "tag", "body"])
def test_the_guides_family_agrees_both_ways(task: str, changes: dict[str, Any], tmp_path: Path) -> None:
    row = Row("qwen2", "Qwen2", {**FIELDS, **changes}, CAST64)
    theirs = their_model(row, task)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    key = "last_hidden_state" if task == "body" else "logits"
    with torch.no_grad():
        close(getattr(ours(IDS), key), getattr(theirs(IDS), key), FLOAT32)
    save_model(ours, tmp_path / "ours")
    open_there(tmp_path / "ours", their_class("Qwen2", task))
    stored, written = (read_safetensors(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)


def test_the_guides_family_learns_as_transformers_does(tmp_path: Path) -> None:
    row = Row("qwen2", "Qwen2", FIELDS, CAST64)
    theirs = their_model(row, "causal")
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).train()
    for model in (theirs, ours):
        model(IDS, labels=IDS).loss.backward()
    for p in ours.parameters():
        p.data = p.grad if p.grad is not None else torch.zeros_like(p)
    mine = {view.name: view.read() for view in views(FAMILIES["qwen2"], ours)}
    for name, p in theirs.named_parameters():
        if float(p.grad.abs().max()) > 1e-7:  # a bias on keys moves nothing: its gradient is rounding
            close(mine[name], p.grad, GRADIENT32)


def test_a_new_one_can_be_made() -> None:
    model = build_model(scaled("qwen2", width=64, depth=2, vocab_size=61, context=32), 0)
    assert model.task == "causal" and model(IDS).logits.shape == (3, 17, 61)

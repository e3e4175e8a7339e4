"""The same numbers as transformers, for every family, shape and task, through their own files in both directions."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from tests.parity.theirs import CELLS, FLOAT32, GRADIENT32, IDS, ROWS, Row, close, inputs, targets, their_class, their_model, transformers
from threefold.model.base import Model
from threefold.model.families import FAMILIES
from threefold.model.language import Seq2SeqLM
from threefold.model.names import views
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

STATES = 1e-5  # hidden states and probabilities along the way, float32
cells = pytest.mark.parametrize(("name", "task"), CELLS)
TENSORS = ("logits", "prediction_logits", "seq_relationship_logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state")
SEVERAL = ("hidden_states", "attentions", "decoder_hidden_states", "decoder_attentions", "cross_attentions",
           "encoder_hidden_states", "encoder_attentions")


def both(name: str, task: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Row, Any, Model]:
    """Their model, saved by them, and ours, read from their files."""
    row = ROWS[name]
    theirs = their_model(row, task, **changes)
    theirs.save_pretrained(folder)
    ours = load_model(folder, dtype)
    assert ours.task == task and not ours.notes
    return row, theirs.to(dtype), ours


@cells
def test_all_that_comes_out(name: str, task: str, tmp_path: Path) -> None:
    row, theirs, ours = both(name, task, tmp_path)
    given, asked = inputs(row, task), {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        a, b, plain = theirs(**given, **asked), ours(**given, **asked), ours(**inputs(row, task, labels=False))
    compared = 0
    for key in TENSORS:
        if getattr(a, key, None) is not None:
            close(getattr(b, key), getattr(a, key), FLOAT32)
            if getattr(plain, key) is not None:  # without attentions another way through the scores is taken
                close(getattr(plain, key), getattr(a, key), FLOAT32)
            compared += 1
    if getattr(a, "loss", None) is not None:
        close(b.loss, a.loss, FLOAT32)
    for key in SEVERAL:
        if getattr(a, key, None):
            assert len(getattr(a, key)) == len(getattr(b, key)), key
            for x, y in zip(getattr(b, key), getattr(a, key), strict=True):
                close(x, y, STATES)
    assert compared
    assert ours.num_parameters() == theirs.num_parameters() - _waves(theirs) + _buffers(theirs)


def _waves(theirs: Any) -> int:
    """Positions that they store and we compute."""
    return sum(p.numel() for p in theirs.parameters() if not p.requires_grad)


def _buffers(theirs: Any) -> int:
    """A bias of the head that is no parameter there."""
    return sum(b.numel() for n, b in theirs.named_buffers() if n == "final_logits_bias")


@cells
def test_in_float64(name: str, task: str, tmp_path: Path) -> None:
    row, theirs, ours = both(name, task, tmp_path, torch.float64)
    given = inputs(row, task, labels=False)
    with torch.no_grad():
        a, b = theirs(**given), ours(**given)
    key = next(key for key in TENSORS if getattr(a, key, None) is not None)
    close(getattr(b, key), getattr(a, key), row.float64)


@cells
def test_gradients(name: str, task: str, tmp_path: Path) -> None:
    row, theirs, ours = both(name, task, tmp_path)
    given = inputs(row, task)
    for model in (theirs, ours.train()):
        out = model(**given)
        loss = getattr(out, "loss", None)
        (out.last_hidden_state.square().mean() if loss is None else loss).backward()
    same_gradients(row, theirs, ours)


def same_gradients(row: Row, theirs: Any, ours: Model) -> None:
    for p in ours.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    mine = {view.name: view.read() for view in views(FAMILIES[row.family], ours)}
    compared = 0
    for key, parameter in theirs.named_parameters():
        if parameter.grad is not None and key in mine and parameter.grad.abs().max() > 1e-7:
            close(mine[key], parameter.grad, GRADIENT32)
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("name", ["transformer", "transformer-odd", "t5", "t5-v1_1"])
def test_a_smoothed_loss_and_its_gradients_equal_those_of_their_smoother(name: str, tmp_path: Path) -> None:
    row, theirs, ours = both(name, "seq2seq", tmp_path)
    assert isinstance(ours, Seq2SeqLM)
    ids, labels = IDS, targets(row, "seq2seq")["labels"]
    loss = LabelSmoother(epsilon=0.1)(theirs(input_ids=ids, labels=labels), labels)
    total = ours.train().loss_rows(ids, labels, smoothing=0.1)[0] / (labels != -100).sum()
    close(total.detach(), loss.detach(), FLOAT32)
    loss.backward()
    total.backward()
    if name.startswith("transformer"):  # transformers' Marian never learns its start, which is its padding too
        pad = theirs.config.pad_token_id
        for model in (theirs, ours):
            for p in model.parameters():
                if p.grad is not None and p.shape == ours.transformer.embed.weight.shape:
                    p.grad[pad] = 0
    same_gradients(row, theirs, ours)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "-" not in name])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str, tmp_path: Path) -> None:
    """On the left with the positions that transformers' own `generate` derives from the mask, where it takes them."""
    row = ROWS[name]
    task = row.tasks[0]
    if side == "left" and row.family == "transformer":
        pytest.skip("marian takes no positions: there a text with padding before it is another text")
    _, theirs, ours = both(name, task, tmp_path)
    mask = torch.ones_like(IDS)
    for line, n in enumerate((0, 4, 9)):
        mask[line, :n] = 0
    mask = mask.flip(1) if side == "right" else mask
    given = inputs(row, task, labels=False) | {"attention_mask": mask}
    given["input_ids"] = IDS.where(mask == 1, row.fields.get("pad_token_id") or 0)
    more: dict[str, Any] = {}
    if row.positions:
        offset = ours.config.position_offset if row.kind == "Roberta" else 0  # its `position_ids` are rows of the table
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + offset
    with torch.no_grad():
        a, b = theirs(**given, **more).logits, ours(**given).logits
    if "decoder_input_ids" in given:
        close(b, a, FLOAT32)
    else:
        close(b[mask == 1], a[mask == 1], FLOAT32)


@cells
def test_what_we_save_opens_there_without_a_warning(name: str, task: str, tmp_path: Path) -> None:
    row, theirs, ours = both(name, task, tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    again = open_there(tmp_path / "ours", their_class(row.kind, task), waves=(row.kind, task) == ("Marian", "body"))
    stored, written = (read_safetensors(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    stored = {key: value for key, value in stored.items() if "embed_positions.weight" not in key or row.kind != "Marian"}
    assert set(stored) == set(written)
    assert all(torch.equal(stored[key], written[key]) for key in stored)
    given = inputs(row, task, labels=False)
    with torch.no_grad():
        a, b = again(**given), theirs(**given)
    key = next(key for key in TENSORS if getattr(a, key, None) is not None)
    assert torch.equal(getattr(a, key), getattr(b, key)) or close(getattr(a, key), getattr(b, key), FLOAT32) is None
    unsaid: tuple[str, ...] = ("dtype", "_name_or_path", "transformers_version", "architectures", "pad_token_id", "n_inner", "attention_types",
              "classifier_dropout", "forced_eos_token_id", "rope_parameters", "intermediate_size")
    if not ours.config.attention_windows:
        unsaid = (*unsaid, "window_size")
    for key, value in theirs.config.to_dict().items():
        if key not in unsaid:
            assert again.config.to_dict()[key] == value, key


def open_there(folder: Path, kind: Any, *, waves: bool = False) -> Any:
    """transformers' model, opened without a warning and without a name that is new, missing or unused; but a Marian body
    misses the `waves` of its positions, which it computes then, as it does those of transformers' own files."""
    lines: list[str] = []
    logger = transformers.utils.logging.get_logger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = kind.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    if waves:
        assert all(key.endswith("embed_positions.weight") for key in info.pop("missing_keys"))
        info["missing_keys"] = set()
    else:
        assert not lines
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.dtype == torch.float32
    return model.eval()

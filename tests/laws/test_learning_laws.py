"""Laws of values: weights, gradients, dropout, precision, first values. A new family adds a row to FAMILIES and nothing here."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.rows import (
    CELLS,
    PAIRS,
    answer,
    arguments,
    cells,
    families,
    loss_of,
    near,
    random_model,
    small,
    some_ids,
    targets,
)
from threefold.model import block
from threefold.model.build import build_model, scaled
from threefold.model.dropout import site_keys
from threefold.model.families import FAMILIES
from threefold.model.losses import IGNORED
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

DROPS = {"attention_dropout": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}


@cells
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_bitwise(family: str, task: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tied = dtype == torch.float32 or "tie_word_embeddings" in FAMILIES[family].only  # the one family that has it no other way
    model = random_model(family, dtype, task, tie_word_embeddings=tied)
    save_model(model, tmp_path / "a", None)
    again = load_model(tmp_path / "a", classes=3)
    begun = model.config.initializer_range  # how it began, which no file keeps
    assert dataclasses.replace(again.config, initializer_range=begun) == model.config
    assert again.task == task and again.dtype == dtype and not again.notes
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    save_model(again, tmp_path / "b", None)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert read_safetensors(tmp_path / "a" / "model.safetensors")


@cells
def test_gradients_against_differences(family: str, task: str) -> None:
    """A random direction through all parameters at once, in float64."""
    model, ids = random_model(family, task=task), some_ids(2, 8)
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) for i, p in enumerate(parameters)]
    loss_of(model, ids).backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(loss_of(model, ids)))
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize(("family", "task"), [cell for cell in CELLS if cell[1] in ("causal", "masked", "pretraining", "seq2seq")])
def test_the_ways_to_a_loss_agree(family: str, task: str) -> None:
    """The mean that `forward` gives, the sum that training takes, and the losses of the logits."""
    model, ids = random_model(family, task=task), some_ids(2, 9)
    labels = targets(model, ids)
    under = labels if task != "causal" else torch.cat([labels[:, 1:], torch.full((2, 1), IGNORED)], 1)  # as training has them
    total, rows, *_ = model.loss_rows(ids, under)
    out = model(ids, labels=labels)
    logits = out.prediction_logits if task == "pretraining" else out.logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), under.flatten(), ignore_index=IGNORED, reduction="none").view_as(ids)
    assert near(total, each.sum()) and near(rows, each.sum(1)) and near(out.loss * (under != IGNORED).sum(), total)
    if task == "causal":
        assert torch.equal(model.head(model.hidden(ids)), logits)
        assert model.loss_sum(ids, under)[1] == int((under != IGNORED).sum()) and torch.equal(model.loss_sum(ids, under)[0], total)


@families
def test_dropout_does_not_depend_on_the_micro_batch(family: str) -> None:
    model, ids = random_model(family, **DROPS).train(), some_ids(4, 9)
    keys = torch.arange(4) * 77
    whole = answer(model, ids, dropout_keys=keys)
    parts = torch.cat([answer(model, ids[a:b], dropout_keys=keys[a:b]) for a, b in ((0, 1), (1, 4))])
    assert near(parts, whole)
    assert not near(answer(model, ids, dropout_keys=keys + 1), whole)
    assert not torch.equal(answer(model, ids), answer(model, ids))  # without keys, torch's generator
    model.eval()
    assert torch.equal(answer(model, ids, dropout_keys=keys), answer(model, ids))


@families
def test_no_two_places_drop_alike(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at each entrance, three in a layer and five in one that reads another text; and each kind by itself drops."""
    sites: list[int] = []
    model, ids, keys = random_model(family, **DROPS).train(), some_ids(2, 9), torch.arange(2)
    monkeypatch.setattr(block, "site_keys", lambda keys_B, site: (sites.append(site), site_keys(keys_B, site))[1])
    answer(model, ids, dropout_keys=keys)
    assert len(set(sites)) == len(sites) == (1 + 2 * 3 + 1 + 2 * 5 if family in PAIRS else 1 + 2 * 3)
    quiet = answer(random_model(family).train(), ids, dropout_keys=keys)
    for name, p in DROPS.items():
        assert not near(answer(random_model(family, **{name: p}).train(), ids, dropout_keys=keys), quiet), name


@families
def test_half_precision_is_near_and_masters_stay_wide(family: str) -> None:
    model, ids = random_model(family, torch.float32), some_ids(2, 70)
    wide = loss_of(model, ids)
    model.compute_dtype = torch.bfloat16
    loss = loss_of(model, ids)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(float((loss / wide).detach()) - 1) < 0.03  # eight bits, over two layers
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in model.parameters())
    assert answer(model, ids).dtype == torch.bfloat16


@families
def test_two_models_of_one_seed_are_one(family: str) -> None:
    config = small(family)
    a, b, c = build_model(config, 3), build_model(config, 3), build_model(config, 4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    deeper: dict[str, Any] = {name: 3 for name in ("num_encoder_layers", "num_decoder_layers") if getattr(config, name)}
    more = dict(build_model(dataclasses.replace(config, **deeper, initializer_range=None), 3).named_parameters())
    for name, p in build_model(dataclasses.replace(config, initializer_range=None), 3).named_parameters():
        ends = config.norm_order == "post" and name == "transformer.decoder.blocks.1.norm2.weight"  # the last norm of a shallower model
        assert torch.equal(p, more[name]) or ends  # one layer more changes no other


@pytest.mark.parametrize(("family", "task"), [cell for cell in CELLS if cell[1] in ("causal", "masked", "seq2seq")])
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [65, 4096])
def test_a_new_model_knows_nothing(family: str, task: str, width: int, tied: bool, vocab_size: int) -> None:
    """Its loss is that of guessing; far above, it would be sure of something wrong: of its own input, for instance."""
    config = scaled(family, width=width, depth=3, vocab_size=vocab_size, context=96)
    scale = FAMILIES[family].sizes["nano"].scale_embedding  # the 2017 Transformer has it, the defaults of its words do not
    model = build_model(dataclasses.replace(config, tie_word_embeddings=tied, scale_embedding=scale), 0, task=task)
    ids = torch.randint(vocab_size, (2, 97), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        total = model.loss_rows(ids[:, :-1], ids[:, 1:])[0]
    assert abs(float(total) / (2 * 96) - math.log(vocab_size)) < 0.3


@pytest.mark.slow  # importing the compiler alone takes two seconds
@families
def test_the_composed_form_can_be_traced(family: str) -> None:
    model, ids = random_model(family), some_ids(2, 9)
    expected = answer(model, ids)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: model(**arguments(model, x)).logits, backend="aot_eager", fullgraph=True)
    out = compiled(ids)
    assert near(out, expected)
    out.sum().backward()

"""What a new encoder knows before its first update: who stands beside whom."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from threefold.model.build import build_model, matrix_parts, scaled
from threefold.model.families import FAMILIES
from threefold.model.first_values import NEIGHBOURS
from threefold.model.language import MaskedLM
from threefold.training.optim import Optimizer

BEGINNERS = [name for name in FAMILIES if scaled(name, width=64, depth=2, vocab_size=50).num_encoder_layers
             and scaled(name, width=64, depth=2, vocab_size=50).initializer_range is None]
SHAPES = {"usual": {}, "long heads": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
          "many heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}}


def attentions(family: str, **changes: object) -> torch.Tensor:
    config = dataclasses.replace(scaled(family, width=64, depth=2, vocab_size=50, context=40), **changes)  # type: ignore[arg-type]
    task = "masked" if "masked" in FAMILIES[family].heads else "seq2seq"
    model = build_model(config, 3, task=task).eval()
    ids = torch.randint(0, 50, (4, 40), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :1]} if task == "seq2seq" else {}
    with torch.no_grad():
        trace = model.transformer(ids, with_attentions=True, **more)
    found: torch.Tensor = ((trace.encoder or trace).attentions)[0]  # type: ignore[index]
    return found


@pytest.mark.parametrize("family", BEGINNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_head_of_the_first_layer_looks_at_one_neighbour(family: str, shape: str) -> None:
    probabilities_BHTS = attentions(family, **SHAPES[shape])
    for head, beside in zip(range(probabilities_BHTS.shape[1]), NEIGHBOURS, strict=False):
        places = torch.arange(4, 36)
        found = (probabilities_BHTS[:, head, 4:36].argmax(-1) == places + beside).float().mean()  # by chance 1 / 40
        assert found > (0.95 if family != "t5" else 0.4)  # whose scores have no scale, and more of chance in them
        assert probabilities_BHTS[:, head, places, places + beside].mean() > 6 / 40


def test_the_generator_of_electra_sees_the_waves_through_its_projection() -> None:
    probabilities_BHTS = attentions("electra", hidden_size=32, num_attention_heads=1, num_key_value_heads=1, intermediate_size=64)
    assert (probabilities_BHTS[:, 0, 4:36].argmax(-1) == torch.arange(3, 35)).float().mean() > 0.9


@pytest.mark.parametrize("embedding_size", [64, 256], ids=["plain", "factorised"])
def test_what_an_encoder_is_told_survives_its_first_updates(embedding_size: int) -> None:
    """A generator of ELECTRA forgot it within 20 updates, since AdamW stepped the projection at the rate of embeddings."""
    config = dataclasses.replace(scaled("electra", width=64, depth=2, vocab_size=500, context=64), embedding_size=embedding_size)
    model, chance = build_model(config, 3, task="masked"), torch.Generator().manual_seed(0)
    assert isinstance(model, MaskedLM)
    optimizer = Optimizer(model, matrix_parts(model), lr=0.025, adamw_lr=0.008, weight_decay=0.0)
    for step in range(1, 21):
        ids = torch.randint(5, 500, (16, 64), generator=chance)
        hidden = torch.rand(ids.shape, generator=chance) < 0.15
        loss = model(ids.masked_fill(hidden, 4), labels=ids.masked_fill(~hidden, -100)).loss
        loss.backward()
        optimizer.step(1.0, step)
        optimizer.zero_grad()
    with torch.no_grad():
        looked_BHTT = model(ids, output_attentions=True).attentions[0]
    places = torch.arange(4, 60)
    for head, beside in zip(range(looked_BHTT.shape[1]), NEIGHBOURS, strict=False):
        assert looked_BHTT[:, head, places, places + beside].mean() > 0.8


def test_families_that_begin_so_are_found() -> None:
    assert {"bert", "roberta", "electra", "t5"} <= set(BEGINNERS)


def test_a_published_encoder_begins_as_published() -> None:
    model = build_model(FAMILIES["bert"].sizes["nano"], 0, task="masked")
    positions = model.transformer.encoder.positions  # type: ignore[union-attr]
    assert float(positions.weight.detach().std()) == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr,operator]

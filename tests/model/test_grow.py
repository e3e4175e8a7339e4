"""Another vocabulary or context: what is kept stays bit for bit, in every family."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from threefold.errors import ModelError
from threefold.model.build import build_model, scaled
from threefold.model.families import FAMILIES
from threefold.model.grow import resized

DECODERS = [name for name, family in FAMILIES.items() if "causal" in family.heads]
YARN = (("rope_type", "yarn"), ("factor", 4.0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_old_rows_and_short_texts_stay_bit_for_bit(family: str, tied: bool) -> None:
    config = dataclasses.replace(scaled(family, width=64, depth=2, vocab_size=50, context=32), tie_word_embeddings=tied)
    model = build_model(config, seed=1).eval()
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    new = resized(model, vocab_size=60, context=16)
    assert (new.config.vocab_size, new.config.max_position_embeddings) == (60, 16) and not new.training
    assert resized(model, vocab_size=50, context=32) is model
    with torch.no_grad():
        assert torch.equal(model.transformer(ids).last, new.transformer(ids).last)
        weight = new.head_weight
        assert torch.equal(weight[:50], model.head_weight) and torch.equal(weight[50:], model.head_weight.mean(0).expand(10, -1))


def test_yarn_remembers_what_it_was_stretched_from() -> None:
    config = dataclasses.replace(scaled("llama", width=64, depth=1, vocab_size=50, context=64), rope_scaling=YARN)
    model = build_model(config).eval()
    ids = torch.arange(16)[None]
    new = resized(model, vocab_size=50, context=16)
    assert ("original_max_position_embeddings", 64) in (new.config.rope_scaling or ())
    with torch.no_grad():
        assert torch.equal(model.transformer(ids).last, new.transformer(ids).last)


def test_what_cannot_be_is_refused() -> None:
    model = build_model(scaled("qwen3", width=64, depth=1, vocab_size=50, context=32))
    with pytest.raises(ModelError, match="cannot be cut"):
        resized(model, vocab_size=49, context=32)
    with pytest.raises(ModelError, match="cannot be given"):
        resized(model, vocab_size=50, context=33)

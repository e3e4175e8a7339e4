"""Another vocabulary or context: what is kept stays bit for bit, in every family."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from threefold.errors import ModelError
from threefold.model.base import Model
from threefold.model.build import build_model, scaled
from threefold.model.families import FAMILIES
from threefold.model.grow import can_grow, resized

YARN = (("rope_type", "yarn"), ("factor", 4.0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "task"), [(name, task) for name, family in FAMILIES.items() for task in family.heads])
def test_old_rows_and_short_texts_stay_bit_for_bit(family: str, task: str, tied: bool) -> None:
    config = dataclasses.replace(scaled(family, width=64, depth=2, vocab_size=50, context=32), tie_word_embeddings=tied)
    model = build_model(config, seed=1, task=task, classes=3).eval()
    model.labels, model.notes = ("a", "b", "c"), ["a note"]
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    new = resized(model, vocab_size=60, context=16)
    assert (new.config.vocab_size, new.config.max_position_embeddings, new.task) == (60, 16, task) and not new.training
    assert (new.labels, new.notes) == (model.labels, model.notes) and resized(model, vocab_size=50, context=32) is model
    before, after = dict(model.named_parameters()), dict(new.named_parameters())
    assert before.keys() == after.keys()
    for name, p in after.items():
        old = before[name]
        if name.endswith(("embed.weight", "lm_head.weight", "lm_head.bias")):
            assert torch.equal(p[:50], old) and torch.equal(p[50:], old.mean(0).expand_as(p[50:])) and len(p) == 60
        elif name.endswith("positions.weight"):
            assert torch.equal(p, old[:16 + config.position_offset])
        else:
            assert torch.equal(p, old), name
    writes = {"decoder_input_ids": ids} if new.transformer.encoder is not None and new.transformer.decoder is not None else {}
    with torch.no_grad():
        assert torch.equal(model.transformer(ids, **writes).last, new.transformer(ids, **writes).last)


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
    stretched = dataclasses.replace(model.config, rope_scaling=YARN)
    for config in (stretched, scaled("gpt2", width=64, depth=1, vocab_size=50, context=32)):
        with pytest.raises(ModelError, match="cannot be given"):
            resized(build_model(config), vocab_size=50, context=33)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_longer_context_changes_no_text_that_fitted(family: str) -> None:
    config = scaled(family, width=64, depth=2, vocab_size=50, context=32)
    model = build_model(config, seed=1).eval()
    if not can_grow(config):
        assert config.position_embedding_type == "absolute" or config.rope_scaling
        return
    new = resized(model, vocab_size=50, context=96)
    ids = torch.randint(0, 50, (2, 96), generator=torch.Generator().manual_seed(0))
    def last(of: Model, length: int) -> torch.Tensor:
        part = ids[:, :length]
        writes = {"decoder_input_ids": part} if of.transformer.encoder is not None and of.transformer.decoder is not None else {}
        with torch.no_grad():
            return of.transformer(part, **writes).last
    assert torch.equal(last(model, 32), last(new, 32)) and last(new, 96).isfinite().all()

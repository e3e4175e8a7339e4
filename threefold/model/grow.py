"""Another vocabulary or context for a model that is already trained: what is kept stays bit for bit.

Decisions:
- A new row is the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings"): the new tokens then start with
  about the average probability, and the loss on old text hardly moves.
- A longer context is for positions that are worked out: waves, rotations as they are, a bias by distance. A learned table has no
  row for them, and a scaled rotation was made for its own length.
- A shorter context cuts learned positions off at its end. Rotations need no cutting, but where their scaling is told by
  the longest context alone (`yarn` without an original one), that one is written down first.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from threefold.errors import ModelError
from threefold.model.base import Model
from threefold.model.build import assemble
from threefold.model.classifiers import PooledClassifier
from threefold.model.config import TransformerConfig
from threefold.model.heads import DenseHead

M = TypeVar("M", bound=Model)


def can_grow(config: TransformerConfig) -> bool:
    """Whether a longer context can be learnt with what the model has."""
    return config.position_embedding_type in ("relative", "sinusoidal") or (config.position_embedding_type == "rotary" and not config.rope_scaling)


def resized_config(config: TransformerConfig, *, vocab_size: int, context: int) -> TransformerConfig:
    """The configuration with that vocabulary and context. Raises ModelError for a smaller vocabulary, or a longer
    context than its positions have."""
    if vocab_size < config.vocab_size:
        raise ModelError(f"a model with {config.vocab_size:,} ids cannot be cut to {vocab_size:,}",
                         hint="the vocabulary can only grow")
    if context > config.max_position_embeddings and not can_grow(config):
        raise ModelError(f"a model for {config.max_position_embeddings:,} positions cannot be given {context:,}",
                         hint="the context can only shrink")
    scaling = dict(config.rope_scaling or ())
    if scaling.get("rope_type") == "yarn":
        scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return dataclasses.replace(config, vocab_size=vocab_size, max_position_embeddings=context,
                               rope_scaling=tuple(scaling.items()) or None)


@torch.no_grad()
def resized(model: M, *, vocab_size: int, context: int) -> M:
    """The model with `vocab_size` rows in embedding and head, for texts of `context` tokens; itself where nothing
    changes."""
    config = resized_config(model.config, vocab_size=vocab_size, context=context)
    if (vocab_size, context) == (model.config.vocab_size, model.config.max_position_embeddings):
        return model
    judge = getattr(model, "head", None)
    new = assemble(config, model.dtype, task=model.task, classes=len(judge.out.weight) if isinstance(judge, DenseHead) else 2,
                   pooling=model.how if isinstance(model, PooledClassifier) else None)
    assert isinstance(new, type(model))
    source = dict(model.named_parameters())
    for name, target in new.named_parameters():
        values = source[name]
        kept = min(len(values), len(target))
        target[:kept] = values[:kept]
        if len(target) > kept:
            target[kept:] = values.mean(0)
    new.compute_dtype, new.notes, new.labels = model.compute_dtype, model.notes, model.labels
    return new.train(model.training)

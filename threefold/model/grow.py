"""A larger vocabulary for a model that is already trained: old rows stay bit for bit, new rows begin in the middle of
them.

Decision: a new row is the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings"): the new tokens then
start with about the average probability, and the loss on old text hardly moves.
"""

from __future__ import annotations

import dataclasses

import torch

from threefold.errors import ModelError
from threefold.model.build import assemble
from threefold.model.heads import CausalLM


@torch.no_grad()
def grow_vocabulary(model: CausalLM, vocab_size: int) -> CausalLM:
    """The model with `vocab_size` rows in embedding and head; itself where it has them already. Raises ModelError to
    shrink."""
    old = model.config.vocab_size
    if vocab_size < old:
        raise ModelError(
            f"a model with {old:,} ids cannot be cut to {vocab_size:,}", hint="the vocabulary can only grow"
        )
    if vocab_size == old:
        return model
    grown = assemble(dataclasses.replace(model.config, vocab_size=vocab_size), model.dtype)
    source = dict(model.named_parameters())
    for name, target in grown.named_parameters():
        values = source[name]
        if target.shape == values.shape:
            target.copy_(values)
        else:
            target[:old] = values
            target[old:] = values.mean(0)
    grown.compute_dtype = model.compute_dtype
    return grown.train(model.training)

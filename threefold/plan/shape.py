"""The plan of one run: what the machine's speed and the data's size suggest, as plain values for the log.

Decision: everything that is chosen for the user (size, context, batch, dtype) is chosen here and written down once, as the
decision `plan` at step 0. A resumed or replayed run reads it and is shaped alike wherever it runs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from threefold import device as machine
from threefold.config import Recipe
from threefold.data.shards import Shards
from threefold.errors import ConfigError, ModelError
from threefold.model.build import scaled, sized
from threefold.model.config import TransformerConfig
from threefold.model.families import family_of
from threefold.model.families.config_json import config_to_hf
from threefold.model.grow import resized_config
from threefold.model.weights import load_config
from threefold.plan import scaling
from threefold.text.tokenizer import Tokenizer

SHORT_BUDGET = 30.0  # seconds, below which an evaluation on the way must be cheap


def plan_run(recipe: Recipe, shards: Shards, tokenizer: Tokenizer, origin: Path | None, device: torch.device, *,
             elapsed: float) -> dict[str, Any]:
    """dtype, model configuration, context and rows of a batch. `elapsed`: seconds of the budget that are gone.

    Raises ConfigError where context, tokenizer and model do not go together.
    """
    t = recipe.train
    choice = machine.pick_dtype(t.dtype, device)
    values: dict[str, Any] = {"dtype": str(choice.dtype).removeprefix("torch."), "why_dtype": choice.why}
    operations = None
    if t.budget is not None:
        rate, threads = scaling.speed(choice.dtype, device, tokenizer.vocab_size)
        values |= {"operations_per_second": round(rate), "threads": t.threads or threads}
        operations = values["operations_per_second"] * max(1.0, t.budget - elapsed)
    elif t.tokens is not None or t.steps is not None:
        operations = scaling.worth_of_steps(t.tokens or (t.steps or 0) * (t.batch_tokens or 2048))
    with_encoder = origin is None and family_of(recipe.model.family).base.num_encoder_layers > 0
    shape = scaling.choose(operations, shards.count("train").tokens, with_encoder=with_encoder)
    config, context = _config(recipe, shape, tokenizer, origin)
    rows = max(1, (t.batch_tokens or shape.batch_tokens) // context)
    subset = scaling.SUBSET_TOKENS // (2 if t.budget is not None and t.budget < SHORT_BUDGET else 1)
    return values | {"config": config.to_dict(), "context": context, "rows": rows,
                     "validation_windows": max(1, subset // context)}


def config_from(fields: dict[str, Any]) -> TransformerConfig:
    """The configuration that a plan holds; JSON has lists where it has tuples."""
    def literal(value: Any) -> Any:
        return tuple(literal(v) for v in value) if isinstance(value, list) else value
    known = {name: literal(value) for name, value in fields.items()}
    if "num_hidden_layers" in known:  # as plans were written before there were three families
        known["num_decoder_layers"] = known.pop("num_hidden_layers")
        known = {"embedding_size": known["hidden_size"], "attention_out_bias": known["attention_bias"], **known}
        return dataclasses.replace(family_of(known["model_type"]).base, **known)
    return TransformerConfig(**known)


def _config(recipe: Recipe, shape: scaling.Shape, tokenizer: Tokenizer, origin: Path | None) -> tuple[TransformerConfig, int]:
    """The model's configuration, and the context that it is trained with."""
    m, vocab = recipe.model, tokenizer.vocab_size
    context = m.context or shape.context
    if not m.context and recipe.train.batch_tokens:
        context = min(context, recipe.train.batch_tokens)  # a row must fit into a batch
    if origin is not None:
        config = load_config(origin)[1]
        context = m.context or min(config.max_position_embeddings, 1024)
        if vocab > config.vocab_size and not m.grow_vocab:
            raise ConfigError(f"the tokenizer has {vocab:,} ids, the model {config.vocab_size:,}",
                              hint="take the model's own tokenizer, or extend both with --grow-vocab")
        config = resized_config(config, vocab_size=max(config.vocab_size, vocab), context=context)
    elif m.size == "auto":
        config = scaled(m.family, vocab_size=vocab, width=shape.width, depth=shape.depth, context=context)
        config = _untied(config)
    else:
        config = sized(m.family, m.size, vocab_size=vocab, context=context)
    ids: dict[str, int | None] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if config.is_encoder_decoder:
        ids["decoder_start_token_id"] = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    if config.position_offset:  # rows of a learned table that stand before position 0, up to the id that pads
        ids["position_offset"] = config.position_offset if tokenizer.pad_id is None else max(config.position_offset, tokenizer.pad_id + 1)
    config = dataclasses.replace(config, **ids)  # type: ignore[arg-type]
    config_to_hf(family_of(config.model_type), config, "float32")  # what could not be written at the end is refused now
    return config, context


def _untied(config: TransformerConfig) -> TransformerConfig:
    """With a head of its own, which learns faster from nothing (docs/log.md), where the family has words for it."""
    untied = dataclasses.replace(config, tie_word_embeddings=False, logit_scale=1.0)
    try:
        config_to_hf(family_of(config.model_type), untied, "float32")
    except ModelError:
        return config
    return untied

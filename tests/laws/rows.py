"""A small random model for every family, and its inputs: what a law needs, whatever kind of model it is.

A row is a family, with the fields that bring out what it has of its own (bands, a narrow embedding, few buckets).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from threefold.model.base import Model
from threefold.model.build import build_model, scaled
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES

VOCABULARY = 53
SUMS = 1e-12  # float64 sums in another order, relative to the largest value
OWN: dict[str, dict[str, Any]] = {
    "transformer": {"pad_token_id": 52, "decoder_start_token_id": 52, "eos_token_id": 0, "scale_embedding": True},
    "roberta": {"pad_token_id": 1},  # its positions begin behind the id that pads
    "electra": {"embedding_size": 20},
    "gpt3": {"attention_windows": (0, 7)},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "attention_windows": (7,)},
    "palm": {"num_key_value_heads": 1},
    "t5": {"relative_buckets": 8, "relative_max_distance": 12, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1},
}
MAIN = {name: next(iter(family.heads)) for name, family in FAMILIES.items()}
PAIRS = [name for name, family in FAMILIES.items() if family.base.is_encoder_decoder]
DECODERS = [name for name, family in FAMILIES.items() if not family.base.num_encoder_layers]
ENCODERS = [name for name in FAMILIES if name not in PAIRS and name not in DECODERS]
CELLS = [(name, task) for name, family in FAMILIES.items() for task in family.heads]

families = pytest.mark.parametrize("family", FAMILIES)
alone = pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
writers = pytest.mark.parametrize("family", [*DECODERS, *PAIRS])
cells = pytest.mark.parametrize(("family", "task"), CELLS)


def small(family: str, **changes: Any) -> TransformerConfig:
    """Two layers a stack, width 32, four heads."""
    config = scaled(family, width=32, depth=2, vocab_size=VOCABULARY, context=160)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return dataclasses.replace(config, **{**heads, **OWN.get(family, {}), **changes})


def random_model(family: str, dtype: torch.dtype = torch.float64, task: str | None = None, **changes: Any) -> Any:
    """All parameters random, so that nothing hides behind zeros."""
    model = build_model(small(family, **changes), 0, dtype=dtype, task=task, classes=3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2 + (p.ndim == 1))
    return model.eval()


def some_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def other(ids: Tensor) -> Tensor:
    """Ids of which each is another one."""
    return (ids + 7) % VOCABULARY


def arguments(model: Model, ids: Tensor, *, mask: Tensor | None = None, read: Tensor | None = None, **more: Any) -> dict[str, Any]:
    """What a model takes for a batch. An encoder-decoder writes `ids`, and reads the same ones unless `read` is given; the
    `mask` holds on both sides."""
    found = {**more, "input_ids": ids} if mask is None else {**more, "input_ids": ids, "attention_mask": mask}
    if not model.config.is_encoder_decoder or model.task not in ("seq2seq", "body"):
        return found
    found |= {"input_ids": ids if read is None else read, "decoder_input_ids": ids}
    return found if mask is None else {**found, "decoder_attention_mask": mask}


def answer(model: Model, ids: Tensor, **more: Any) -> Tensor:
    """The logits (B, T, ...) of a batch, a number or several for each token."""
    out: Tensor = model(**arguments(model, ids, **more)).logits
    return out


def targets(model: Model, ids: Tensor) -> Tensor:
    """Labels of the task for a batch, some of them ignored where the task ignores any."""
    if model.task == "classify":
        return ids[:, 0] % 3
    labels = ids % 3 if model.task == "tag" else ids % 2 if model.task == "replaced" else ids.clone()
    labels[0, 1:3] = -100
    return labels


def ended(ids: Tensor) -> Tensor:
    """Texts with one end, where T5 judges them."""
    return torch.cat([ids[:, :-1].where(ids[:, :-1] != 1, 2), torch.ones_like(ids[:, :1])], 1)


def labelled(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """What a model with a loss takes for a batch."""
    if model.task == "classify" and model.config.model_type == "t5":
        ids = ended(ids)
    pairs = {"next_sentence_label": ids[:, 0] % 2} if model.task == "pretraining" else {}
    return {"input_ids": ids, "labels": targets(model, ids), **pairs}


def loss_of(model: Model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """A loss that reaches all parameters that the task has: the task's own, or the mean square of a body's states."""
    if model.task in ("body", "encoder"):
        out = model(**arguments(model, ids, mask=mask))
        states: Tensor = out.last_hidden_state.square().mean()
        return states if out.pooler_output is None else states + out.pooler_output.sum()
    loss: Tensor = model(**labelled(model, ids), attention_mask=mask).loss
    return loss


def near(a: Tensor, b: Tensor, tolerance: float = SUMS) -> bool:
    """Within a tolerance, as a share of the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())

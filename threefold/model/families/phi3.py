"""Phi-3 (arXiv 2404.14219): Llama's block with queries, keys and values in one projection and gate and up in another, and
a rotation with a factor for each wave for long texts (arXiv 2402.13753).

Published configurations: https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json and
Phi-3-mini-128k-instruct. The factors of the long form come with its checkpoint; a new model of that size begins with ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from threefold.model.config import TransformerConfig
from threefold.model.families import rope
from threefold.model.families.family import Family, Rename, Words, size, without
from threefold.model.families.gpt2 import BLOCK
from threefold.model.families.llama import BASE as LLAMA_BASE
from threefold.model.families.llama import INVERSE_WAVES, KEYS, RENAMES, heads

BASE = dataclasses.replace(
    LLAMA_BASE, model_type="phi3", vocab_size=32064, hidden_size=3072, embedding_size=3072, head_dim=96, intermediate_size=8192,
    max_position_embeddings=4096, norm_eps=1e-5, eos_token_id=32000, pad_token_id=32000)


def _read(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The rotation, whose `longrope` has older names and is told the old context outside of it; and the window."""
    theirs, old = dict(theirs), theirs.get("original_max_position_embeddings", 4096)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(words := theirs.get(name), dict):
            kind = words.get("rope_type", words.get("type", "default"))
            theirs[name] = {**words, "rope_type": "longrope" if kind in ("su", "yarn", "longrope") else kind}
            theirs[name].pop("type", None)
            if theirs[name]["rope_type"] == "longrope":
                theirs[name].setdefault("original_max_position_embeddings", old)
    window = theirs.get("sliding_window")
    return {**rope.read(theirs), "attention_windows": (window,) if window else ()}


def _write(config: TransformerConfig) -> dict[str, Any]:
    """The older dialect as it was published, three words: transformers 4 takes no others."""
    scaling, written = dict(config.rope_scaling or ()), rope.write(config)
    old = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    window = config.attention_windows[0] if len(set(config.attention_windows)) == 1 else None
    if set(scaling) == {"rope_type", "long_factor", "short_factor", "original_max_position_embeddings"}:
        written["rope_scaling"] = {"type": "longrope", **{name: list(scaling[name]) for name in ("long_factor", "short_factor")}}
    return {**written, "original_max_position_embeddings": old, "sliding_window": window}


LONG = (("rope_type", "longrope"), ("long_factor", (1.0,) * 48), ("original_max_position_embeddings", 4096),
        ("short_factor", (1.0,) * 48))
PHI3 = Family(
    name="phi3",
    model_type="phi3",
    tokenizer="bpe",
    prefix="model.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, hidden_size=64, num_decoder_layers=2, num_attention_heads=2, intermediate_size=160,
                     max_position_embeddings=256, tie_word_embeddings=True),
        "phi3-mini-4k": dataclasses.replace(BASE, attention_windows=(2047,)),
        "phi3-mini-128k": dataclasses.replace(BASE, max_position_embeddings=131072, attention_windows=(262144,), rope_scaling=LONG),
    },
    keys={**{theirs: ours for theirs, ours in KEYS.items() if theirs not in ("head_dim", "attention_bias")},
          "resid_pdrop": "resid_pdrop", "embd_pdrop": "embd_pdrop"},
    words=(Words(keys=(*rope.KEYS, "original_max_position_embeddings", "sliding_window"), read=_read, write=_write),),
    heads=heads("Phi3"),
    renames=(
        *without(RENAMES, "qkv", "gate_up", ".bias"),
        Rename(("layers.{}.self_attn.qkv_proj.weight",), BLOCK + "attention.qkv.weight"),
        Rename(("layers.{}.mlp.gate_up_proj.weight",), BLOCK + "feedforward.gate_up.weight"),
    ),
    legacy=INVERSE_WAVES,
    only={"attention_bias": (False,), "embedding_dropout": (0.0,)},
)

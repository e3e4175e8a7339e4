"""GPT-3 (arXiv 2005.14165): GPT-2's blocks, layers in turn dense and banded (arXiv 1904.10509: each token sees so many
tokens back).

GPT-3's weights are not published. Its banded form has the words of `gpt_neo`, whose scores are not scaled and whose
queries, keys and values have no bias: both are fields, and a model that has GPT-2's values in them and no bands is written
as a `gpt2`. Published configurations in these words: https://huggingface.co/EleutherAI/gpt-neo-125m/blob/main/config.json
(and gpt-neo-1.3B, gpt-neo-2.7B).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from threefold.model.config import TransformerConfig
from threefold.model.families.family import Family, Head, Rename, Words, size, without
from threefold.model.families.gpt2 import BASE as GPT2_BASE
from threefold.model.families.gpt2 import BLOCK, CLASSES, GPT2, LM_HEAD, SCORE

BASE = dataclasses.replace(
    GPT2_BASE, model_type="gpt3", hidden_size=2048, embedding_size=2048, num_decoder_layers=24, num_attention_heads=16,
    num_key_value_heads=16, head_dim=128, intermediate_size=8192, max_position_embeddings=2048, attention_scale=1.0,
    attention_bias=False, attention_windows=(0, 256), embd_pdrop=0.0, resid_pdrop=0.0, attention_dropout=0.0)


def _read(theirs: Mapping[str, Any]) -> dict[str, Any]:
    types = theirs.get("attention_types") or [[["global", "local"], 12]]
    layers, told = theirs.get("num_layers", 24), sum(len(names) * times for names, times in types)
    if told != layers:  # before a list of that length is made
        raise ValueError(f"`attention_types` speaks of {told} layers, and `num_layers` is {layers}")
    kinds = [kind for names, times in types for _ in range(times) for kind in names]
    if unknown := set(kinds) - {"global", "local"}:
        raise ValueError(f"`attention_types` has {sorted(unknown)}, understood are `global` and `local`")
    windows = tuple(0 if kind == "global" else theirs.get("window_size", 256) for kind in kinds)
    period = next(n for n in range(1, len(windows) + 1) if windows == (windows[:n] * len(windows))[:len(windows)])
    return {"attention_windows": () if not any(windows) else windows[:period]}


def _write(config: TransformerConfig) -> dict[str, Any]:
    windows = list(itertools.islice(itertools.cycle(config.attention_windows or (0,)), config.num_decoder_layers))
    return {"attention_types": [[["local" if window else "global"], 1] for window in windows],
            "window_size": next((window for window in windows if window), 256)}


def _size(width: int, layers: int, heads: int) -> TransformerConfig:
    return size(BASE, hidden_size=width, num_decoder_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)


PROJECTIONS = tuple(f"h.{{}}.attn.attention.{x}_proj.weight" for x in "qkv")
GPT3 = Family(
    name="gpt3",
    model_type="gpt_neo",
    tokenizer="bpe",
    prefix="transformer.",
    base=BASE,
    same_head_dim=True,
    also=("gpt2",),
    sizes={
        "nano": size(BASE, hidden_size=64, num_decoder_layers=2, num_attention_heads=2, intermediate_size=256,
                     max_position_embeddings=256, attention_windows=(0, 32)),
        "125m": _size(768, 12, 12),
        "350m": _size(1024, 24, 16),
        "760m": _size(1536, 24, 16),
        "1.3b": BASE,
        "2.7b": _size(2560, 32, 32),
        "6.7b": _size(4096, 32, 32),
        "13b": _size(5120, 40, 40),
        "175b": _size(12288, 96, 96),
    },
    keys={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "num_layers": "num_decoder_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "activation_function": "hidden_act",
        "resid_dropout": "resid_pdrop",
        "embed_dropout": "embd_pdrop",
        "attention_dropout": "attention_dropout",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    words=(Words(keys=("attention_types", "attention_layers", "window_size"), read=_read, write=_write),),
    heads={
        "causal": Head(architecture="GPTNeoForCausalLM", renames=LM_HEAD),
        "classify": Head(architecture="GPTNeoForSequenceClassification", renames=SCORE, bias=False),
        "tag": Head(architecture="GPTNeoForTokenClassification", renames=CLASSES),
        "body": Head(architecture="GPTNeoModel"),
    },
    renames=(
        *without(GPT2.renames, "attention.", "feedforward."),
        Rename(PROJECTIONS, BLOCK + "attention.qkv.weight"),
        Rename(("h.{}.attn.attention.out_proj.weight",), BLOCK + "attention.out.weight"),
        Rename(("h.{}.attn.attention.out_proj.bias",), BLOCK + "attention.out.bias"),
        *(dataclasses.replace(rename, transform="same") for rename in GPT2.renames if "feedforward." in rename.ours),
    ),
    legacy=(r"h\.\d+\.attn\.attention\.(masked_)?bias",),
    inert=GPT2.inert | {"resid_pdrop"},
)

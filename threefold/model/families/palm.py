"""PaLM (arXiv 2204.02311): attention and feed-forward side by side, one key head for all queries, SwiGLU, no biases, the
embedding as head.

PaLM's weights are not published. Its words are those of `cohere`, which has the same block; there the two axes of a
rotation stand side by side, and the logits are scaled by 1 / sqrt(width).
"""

from __future__ import annotations

from threefold.model.config import TransformerConfig
from threefold.model.families.family import Family, Head, Rename, Words, plain, size, without
from threefold.model.families.gpt2 import BLOCK, LM_HEAD
from threefold.model.families.llama import INVERSE_WAVES, QKV, QKV_BIAS, RENAMES
from threefold.model.families.rope import KEYS as ROPE_KEYS
from threefold.model.families.rope import read, write

BASE = plain(
    "palm",
    vocab_size=256000,
    hidden_size=8192,
    num_decoder_layers=40,
    num_attention_heads=64,
    intermediate_size=22528,
    max_position_embeddings=8192,
    hidden_act="silu",
    gated_mlp=True,
    norm_type="layer_norm",
    norm_bias=False,
    norm_eps=1e-5,
    norm_order="parallel",
    position_embedding_type="rotary",
    rope_theta=500000.0,
    tie_word_embeddings=True,
    logit_scale=0.0625,
    bos_token_id=5,
    eos_token_id=255001,
    pad_token_id=0,
)


def _size(width: int, layers: int, heads: int, hidden: int, **more: int) -> TransformerConfig:
    return size(BASE, **{
        "vocab_size": 256000, "hidden_size": width, "num_decoder_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": hidden, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "logit_scale": width**-0.5, **more})


PALM = Family(
    name="palm",
    model_type="cohere",
    tokenizer="bpe",
    prefix="model.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": _size(64, 2, 2, 160, head_dim=32, max_position_embeddings=256, vocab_size=32000),
        "8b": _size(4096, 32, 16, 16384),
        "62b": _size(8192, 64, 32, 32768),
        "540b": _size(18432, 118, 48, 73728),
        "command-r": BASE,
    },
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_decoder_layers",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden_act": "hidden_act",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_eps": "norm_eps",
        "logit_scale": "logit_scale",
        "tie_word_embeddings": "tie_word_embeddings",
        "attention_bias": ("attention_bias", "attention_out_bias"),
        "attention_dropout": "attention_dropout",
    },
    words=(Words(keys=ROPE_KEYS, read=lambda theirs: read(theirs, 500000.0), write=write),),
    heads={"causal": Head(architecture="CohereForCausalLM", renames=LM_HEAD), "body": Head(architecture="CohereModel")},
    renames=(
        *without(RENAMES, "qkv", "norm2", "feedforward.gate_up.bias", "feedforward.down.bias"),
        Rename(QKV, BLOCK + "attention.qkv.weight", pairs=2),
        Rename(QKV_BIAS, BLOCK + "attention.qkv.bias", pairs=2),
    ),
    legacy=INVERSE_WAVES,
    inert=frozenset(["model_max_length"]),
    only={"use_qk_norm": (False, None)},
)

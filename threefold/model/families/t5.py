"""T5 (arXiv 1910.10683): an encoder-decoder with a bias for distances instead of positions, RMS norms, scores that are not
scaled, no biases; in version 1.1 (and Flan, arXiv 2210.11416) with a gated GELU and a head of its own.

Published configurations: https://huggingface.co/google-t5/t5-small/blob/main/config.json (to t5-11b),
https://huggingface.co/google/t5-v1_1-small/blob/main/config.json (to -xxl), https://huggingface.co/google/flan-t5-small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from threefold.model.config import TransformerConfig
from threefold.model.families.biogpt import both
from threefold.model.families.family import Family, Head, Rename, Words, plain, size
from threefold.model.families.gpt2 import CLASSES

BASE = plain(
    "t5",
    vocab_size=32128,
    hidden_size=512,
    num_encoder_layers=6,
    num_decoder_layers=6,
    num_attention_heads=8,
    intermediate_size=2048,
    max_position_embeddings=512,
    hidden_act="relu",
    norm_type="rms_norm",
    norm_eps=1e-6,
    position_embedding_type="relative",
    relative_buckets=32,
    relative_max_distance=128,
    attention_scale=1.0,
    tie_word_embeddings=True,
    logit_scale=512**-0.5,
    embd_pdrop=0.1,
    resid_pdrop=0.1,
    attention_dropout=0.1,
    eos_token_id=1,
    pad_token_id=0,
    decoder_start_token_id=0,
)


def _read(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The feed-forward's kind; whether the states are scaled before the head, which the tie of the head stands for; depths."""
    gate, _, name = str(theirs.get("feed_forward_proj", "relu")).rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"`feed_forward_proj` is {theirs['feed_forward_proj']!r}, understood are an activation and `gated-` before one")
    tied = theirs.get("tie_word_embeddings") is not False
    scaled = theirs.get("scale_decoder_outputs", tied)
    depth = theirs.get("num_layers", BASE.num_encoder_layers)
    below = theirs.get("num_decoder_layers")
    return {"hidden_act": "gelu_new" if (gate, name) == ("gated", "gelu") else name, "gated_mlp": bool(gate),
            "tie_word_embeddings": tied, "logit_scale": theirs.get("d_model", BASE.hidden_size)**-0.5 if scaled else 1.0,
            "num_encoder_layers": depth, "num_decoder_layers": depth if below is None else below}


def _write(config: TransformerConfig) -> dict[str, Any]:
    name = "gelu" if config.gated_mlp and config.hidden_act == "gelu_new" else config.hidden_act
    return {"feed_forward_proj": f"gated-{name}" if config.gated_mlp else name, "tie_word_embeddings": config.tie_word_embeddings,
            "scale_decoder_outputs": config.logit_scale != 1, "num_layers": config.num_encoder_layers,
            "num_decoder_layers": config.num_decoder_layers}


def _size(width: int, layers: int, heads: int, hidden: int, head_dim: int = 64, *, first: bool = True) -> TransformerConfig:
    kind = {} if first else {"gated_mlp": True, "hidden_act": "gelu_new", "tie_word_embeddings": False, "logit_scale": 1.0}
    return size(BASE, **{
        "hidden_size": width, "num_encoder_layers": layers, "num_decoder_layers": layers, "num_attention_heads": heads,
        "head_dim": head_dim, "intermediate_size": hidden, "logit_scale": width**-0.5, **kind})


_LATER = {"small": _size(512, 8, 6, 1024, first=False), "base": _size(768, 12, 12, 2048, first=False),
          "large": _size(1024, 24, 16, 2816, first=False), "xl": _size(2048, 24, 32, 5120, first=False),
          "xxl": _size(4096, 24, 64, 10240, first=False)}
READ = "transformer.encoder.blocks.{}."
WRITE = "transformer.decoder.blocks.{}."


def _layers(theirs: str, ours: str, stack: str, last: int) -> tuple[Rename, ...]:
    """Self-attention is layer 0, the feed-forward the last."""
    own, wide = f"{theirs}.block.{{}}.layer.0", f"{theirs}.block.{{}}.layer.{last}"
    return (
        Rename(tuple(f"{own}.SelfAttention.{x}.weight" for x in "qkv"), ours + "attention.qkv.weight"),
        Rename((f"{own}.SelfAttention.o.weight",), ours + "attention.out.weight"),
        Rename((f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",), f"{stack}.relative.weight"),
        Rename((f"{own}.layer_norm.weight",), ours + "norm1.weight"),
        Rename((f"{wide}.DenseReluDense.wi.weight",), ours + "feedforward.up.weight"),
        Rename((f"{wide}.DenseReluDense.wi_0.weight", f"{wide}.DenseReluDense.wi_1.weight"), ours + "feedforward.gate_up.weight"),
        Rename((f"{wide}.DenseReluDense.wo.weight",), ours + "feedforward.down.weight"),
        Rename((f"{wide}.layer_norm.weight",), ours + "norm2.weight"),
        Rename((f"{theirs}.final_layer_norm.weight",), f"{stack}.norm.weight"),
    )


CROSS = "decoder.block.{}.layer.1"
T5 = Family(
    name="t5",
    model_type="t5",
    tokenizer="unigram",
    prefix="",
    base=BASE,
    sizes={
        "nano": _size(64, 2, 2, 256, 32),
        "t5-small": BASE,
        "t5-base": _size(768, 12, 12, 3072),
        "t5-large": _size(1024, 24, 16, 4096),
        "t5-3b": _size(1024, 24, 32, 16384, 128),
        "t5-11b": _size(1024, 24, 128, 65536, 128),
        **{f"t5-v1_1-{name}": found for name, found in _LATER.items()},
        **{f"flan-t5-{name}": found for name, found in _LATER.items()},
    },
    keys={
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "d_kv": "head_dim",
        "d_ff": "intermediate_size",
        "num_heads": "num_attention_heads",
        "relative_attention_num_buckets": "relative_buckets",
        "relative_attention_max_distance": "relative_max_distance",
        "dropout_rate": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
        "layer_norm_epsilon": "norm_eps",
        "n_positions": "max_position_embeddings",
    },
    words=(Words(keys=("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs",
                       "num_layers", "num_decoder_layers"), read=_read, write=_write),),
    heads={
        "seq2seq": Head(architecture="T5ForConditionalGeneration", renames=(Rename(("lm_head.weight",), "lm_head.weight"),)),
        "classify": Head(architecture="T5ForSequenceClassification", prefix="transformer.", reads="end", activation="tanh", renames=(
            *both("classification_head.dense", "head.dense"), *both("classification_head.out_proj", "head.out"))),
        "tag": Head(architecture="T5ForTokenClassification", prefix="transformer.", renames=CLASSES, encoder_alone=True),
        "body": Head(architecture="T5Model"),
        "encoder": Head(architecture="T5EncoderModel", encoder_alone=True),
    },
    renames=(
        Rename(("shared.weight",), "transformer.embed.weight"),
        *_layers("encoder", READ, "transformer.encoder", 1),
        *_layers("decoder", WRITE, "transformer.decoder", 2),
        Rename((f"{CROSS}.EncDecAttention.q.weight",), WRITE + "cross.q.weight"),
        Rename((f"{CROSS}.EncDecAttention.k.weight", f"{CROSS}.EncDecAttention.v.weight"), WRITE + "cross.kv.weight"),
        Rename((f"{CROSS}.EncDecAttention.o.weight",), WRITE + "cross.out.weight"),
        Rename((f"{CROSS}.layer_norm.weight",), WRITE + "cross_norm.weight"),
    ),
    legacy=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    inert=frozenset(["initializer_factor"]),
    only={"is_encoder_decoder": (True, False, None)},  # false where a head reads the encoder alone
)

"""Llama (arXiv 2302.13971, 2407.21783): rotary positions, RMS norms, SwiGLU, grouped queries from the second version
on, no biases.

Published configurations: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json, .../Llama-3.1-8B/...,
https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json,
https://huggingface.co/karpathy/tinyllamas (stories).
"""

from __future__ import annotations

from threefold.model.families.family import Family, Head, Rename, plain, size
from threefold.model.families.gpt2 import BLOCK, LM_HEAD, SCORE
from threefold.model.families.rope import ROPE

BASE = plain(
    "llama",
    vocab_size=32000,
    hidden_size=4096,
    num_decoder_layers=32,
    num_attention_heads=32,
    intermediate_size=11008,
    max_position_embeddings=2048,
    hidden_act="silu",
    gated_mlp=True,
    norm_type="rms_norm",
    norm_eps=1e-6,
    position_embedding_type="rotary",
    rope_theta=10000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def _llama3(factor: float) -> tuple[tuple[str, float | str], ...]:
    return (("rope_type", "llama3"), ("factor", factor), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
            ("original_max_position_embeddings", 8192))


QKV = tuple(f"layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")
QKV_BIAS = tuple(f"layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv")
RENAMES = (
    Rename(("embed_tokens.weight",), "transformer.embed.weight"),
    Rename(("layers.{}.input_layernorm.weight",), BLOCK + "norm1.weight"),
    Rename(QKV, BLOCK + "attention.qkv.weight"),
    Rename(QKV_BIAS, BLOCK + "attention.qkv.bias"),
    Rename(("layers.{}.self_attn.o_proj.weight",), BLOCK + "attention.out.weight"),
    Rename(("layers.{}.self_attn.o_proj.bias",), BLOCK + "attention.out.bias"),
    Rename(("layers.{}.post_attention_layernorm.weight",), BLOCK + "norm2.weight"),
    Rename(("layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"), BLOCK + "feedforward.gate_up.weight"),
    Rename(("layers.{}.mlp.gate_proj.bias", "layers.{}.mlp.up_proj.bias"), BLOCK + "feedforward.gate_up.bias"),
    Rename(("layers.{}.mlp.down_proj.weight",), BLOCK + "feedforward.down.weight"),
    Rename(("layers.{}.mlp.down_proj.bias",), BLOCK + "feedforward.down.bias"),
    Rename(("norm.weight",), "transformer.decoder.norm.weight"),
)
TAGS = (Rename(("score.weight",), "head.out.weight"), Rename(("score.bias",), "head.out.bias"))
INVERSE_WAVES = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")  # follow from the configuration


def heads(name: str) -> dict[str, Head]:
    """The tasks of transformers' decoders of this kind."""
    return {
        "causal": Head(architecture=f"{name}ForCausalLM", renames=LM_HEAD),
        "classify": Head(architecture=f"{name}ForSequenceClassification", renames=SCORE, bias=False),
        "tag": Head(architecture=f"{name}ForTokenClassification", renames=TAGS),
        "body": Head(architecture=f"{name}Model"),
    }


KEYS: dict[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": ("attention_bias", "attention_out_bias"),
    "attention_dropout": "attention_dropout",
}

LLAMA = Family(
    name="llama",
    model_type="llama",
    tokenizer="bpe",
    prefix="model.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(
            BASE,
            vocab_size=32000,
            hidden_size=64,
            num_decoder_layers=2,
            num_attention_heads=2,
            intermediate_size=160,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        ),
        "stories260k": size(
            BASE,
            vocab_size=512,
            hidden_size=64,
            num_decoder_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=172,
            max_position_embeddings=512,
            norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        "stories15m": size(
            BASE,
            hidden_size=288,
            num_decoder_layers=6,
            num_attention_heads=6,
            intermediate_size=768,
            max_position_embeddings=256,
            norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        "tinyllama-1.1b": size(
            BASE,
            hidden_size=2048,
            num_decoder_layers=22,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=5632,
            norm_eps=1e-5,
        ),
        "llama-3.2-1b": size(
            BASE,
            vocab_size=128256,
            hidden_size=2048,
            num_decoder_layers=16,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            max_position_embeddings=131072,
            norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=_llama3(32.0),
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
        ),
        "llama-3.1-8b": size(
            BASE,
            vocab_size=128256,
            num_key_value_heads=8,
            intermediate_size=14336,
            max_position_embeddings=131072,
            norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=_llama3(8.0),
            bos_token_id=128000,
            eos_token_id=128001,
        ),
    },
    keys={**KEYS, "mlp_bias": "mlp_bias"},
    words=(ROPE,),
    heads=heads("Llama"),
    renames=RENAMES,
    legacy=INVERSE_WAVES,
    only={"sliding_window": (None,)},
)

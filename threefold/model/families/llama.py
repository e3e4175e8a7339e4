"""Llama (arXiv 2302.13971, 2407.21783): rotary positions, RMS norms, SwiGLU, grouped queries from the second version
on, no biases.

Published configurations: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json, .../Llama-3.1-8B/...,
https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json,
https://huggingface.co/karpathy/tinyllamas (stories).
"""

from __future__ import annotations

from threefold.model.config import TransformerConfig
from threefold.model.families.family import Family, Rename, size

BASE = TransformerConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    intermediate_size=11008,
    max_position_embeddings=2048,
    hidden_act="silu",
    gated_mlp=True,
    norm_type="rms_norm",
    norm_eps=1e-6,
    position_embedding_type="rotary",
    rope_theta=10000.0,
    rope_scaling=None,
    attention_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=False,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
    attention_dropout=0.0,
    initializer_range=None,
    bos_token_id=1,
    eos_token_id=2,
)


def _llama3(factor: float) -> tuple[tuple[str, float | str], ...]:
    return (("rope_type", "llama3"), ("factor", factor), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
            ("original_max_position_embeddings", 8192))


BLOCK = "transformer.decoder.blocks.{}."
RENAMES = (
    Rename(("embed_tokens.weight",), "transformer.embed.weight"),
    Rename(("layers.{}.input_layernorm.weight",), BLOCK + "norm1.weight"),
    Rename(
        tuple(f"layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
        BLOCK + "attention.qkv.weight",
        "join",
        ("queries", "keys", "keys"),
    ),
    Rename(
        tuple(f"layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"),
        BLOCK + "attention.qkv.bias",
        "join",
        ("queries", "keys", "keys"),
    ),
    Rename(("layers.{}.self_attn.o_proj.weight",), BLOCK + "attention.out.weight"),
    Rename(("layers.{}.self_attn.o_proj.bias",), BLOCK + "attention.out.bias"),
    Rename(("layers.{}.post_attention_layernorm.weight",), BLOCK + "norm2.weight"),
    Rename(
        tuple(f"layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        BLOCK + "feedforward.gate_up.weight",
        "join",
        ("hidden", "hidden"),
    ),
    Rename(
        tuple(f"layers.{{}}.mlp.{x}_proj.bias" for x in ("gate", "up")),
        BLOCK + "feedforward.gate_up.bias",
        "join",
        ("hidden", "hidden"),
    ),
    Rename(("layers.{}.mlp.down_proj.weight",), BLOCK + "feedforward.down.weight"),
    Rename(("layers.{}.mlp.down_proj.bias",), BLOCK + "feedforward.down.bias"),
    Rename(("norm.weight",), "transformer.decoder.norm.weight"),
    Rename(("lm_head.weight",), "lm_head.weight"),
)
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "attention_dropout": "attention_dropout",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    tokenizer="bpe",
    prefix="model.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(
            BASE,
            vocab_size=32000,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=160,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        ),
        "stories260k": size(
            BASE,
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=5,
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
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=768,
            max_position_embeddings=256,
            norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        "tinyllama-1.1b": size(
            BASE,
            hidden_size=2048,
            num_hidden_layers=22,
            num_key_value_heads=4,
            head_dim=64,
            intermediate_size=5632,
            norm_eps=1e-5,
        ),
        "llama-3.2-1b": size(
            BASE,
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=16,
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
    form=("gated_mlp", "norm_type", "position_embedding_type", "qk_norm", "embd_pdrop", "resid_pdrop"),
    renames=RENAMES,
    legacy=(
        r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"rotary_emb\.inv_freq",
    ),  # a function of the configuration, once stored
)

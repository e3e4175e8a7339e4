"""Qwen3 (arXiv 2505.09388): Llama's block with RMS norms on queries and keys and a head width of its own. The default
for new decoders.

Published configurations: https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json (and Qwen3-1.7B, Qwen3-4B,
Qwen3-8B).
"""

from __future__ import annotations

import dataclasses

from threefold.model.families.family import Family, Rename, size
from threefold.model.families.gpt2 import BLOCK
from threefold.model.families.llama import BASE as LLAMA_BASE
from threefold.model.families.llama import INVERSE_WAVES, KEYS, RENAMES, heads
from threefold.model.families.rope import ROPE

BASE = dataclasses.replace(
    LLAMA_BASE,
    model_type="qwen3",
    vocab_size=151936,
    intermediate_size=22016,
    max_position_embeddings=32768,
    qk_norm=True,
    bos_token_id=None,
    eos_token_id=None,
)
_PUBLISHED = dataclasses.replace(
    BASE, max_position_embeddings=40960, rope_theta=1000000.0, bos_token_id=151643, eos_token_id=151645
)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    tokenizer="bpe",
    prefix="model.",
    base=BASE,
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
        "qwen3-0.6b": size(
            _PUBLISHED,
            hidden_size=1024,
            num_decoder_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            tie_word_embeddings=True,
        ),
        "qwen3-1.7b": size(
            _PUBLISHED,
            hidden_size=2048,
            num_decoder_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=6144,
            tie_word_embeddings=True,
        ),
        "qwen3-4b": size(
            _PUBLISHED,
            hidden_size=2560,
            num_decoder_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            tie_word_embeddings=True,
        ),
        "qwen3-8b": size(
            _PUBLISHED,
            hidden_size=4096,
            num_decoder_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=12288,
        ),
    },
    keys=KEYS,
    words=(ROPE,),
    heads=heads("Qwen3"),
    renames=(
        *RENAMES,
        Rename(("layers.{}.self_attn.q_norm.weight",), BLOCK + "attention.q_norm.weight"),
        Rename(("layers.{}.self_attn.k_norm.weight",), BLOCK + "attention.k_norm.weight"),
    ),
    legacy=INVERSE_WAVES,
    inert=frozenset(("max_window_layers", "sliding_window")),  # read only where `use_sliding_window` is on
    only={"use_sliding_window": (False,)},
)

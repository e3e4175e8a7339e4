"""Qwen2 (arXiv 2407.10671): Llama's block with a bias on queries, keys and values, and none behind them.

Published configurations: https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json.
"""

from __future__ import annotations

import dataclasses

from threefold.model.families.family import Family, size
from threefold.model.families.llama import BASE as LLAMA_BASE
from threefold.model.families.llama import INVERSE_WAVES, KEYS, RENAMES, heads
from threefold.model.families.rope import ROPE

BASE = dataclasses.replace(
    LLAMA_BASE,
    model_type="qwen2",
    vocab_size=151936,
    intermediate_size=22016,
    max_position_embeddings=32768,
    attention_bias=True,
    bos_token_id=None,
    eos_token_id=None,
)

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    tokenizer="bpe",
    prefix="model.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, vocab_size=32000, hidden_size=64, num_decoder_layers=2, num_attention_heads=2, intermediate_size=160,
                     max_position_embeddings=256, tie_word_embeddings=True),
        "qwen2.5-0.5b": size(BASE, hidden_size=896, num_decoder_layers=24, num_attention_heads=14, num_key_value_heads=2,
                             intermediate_size=4864, rope_theta=1000000.0, tie_word_embeddings=True, eos_token_id=151643),
    },
    keys={theirs: ours for theirs, ours in KEYS.items() if theirs not in ("attention_bias", "head_dim")},
    words=(ROPE,),
    heads=heads("Qwen2"),
    renames=RENAMES,
    legacy=INVERSE_WAVES,
    inert=frozenset(("max_window_layers", "sliding_window")),  # read only where `use_sliding_window` is on
    only={"use_sliding_window": (False,)},
)

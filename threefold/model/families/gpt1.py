"""GPT-1 (Radford et al., 2018): GPT-2's parts with the norm behind each sum, and none at the end.

Published configuration: https://huggingface.co/openai-community/openai-gpt/blob/main/config.json.
"""

from __future__ import annotations

import dataclasses

from threefold.model.families.family import Family, Head, Rename, Words, size, without
from threefold.model.families.gpt2 import BASE as GPT2_BASE
from threefold.model.families.gpt2 import GPT2, LM_HEAD, SCORE

BASE = dataclasses.replace(GPT2_BASE, model_type="gpt1", vocab_size=40478, max_position_embeddings=512, norm_order="post",
                           bos_token_id=None, eos_token_id=None)
ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu"}  # its `gelu` is the one with a hyperbolic tangent

GPT1 = Family(
    name="gpt1",
    model_type="openai-gpt",
    tokenizer="bpe",
    prefix="transformer.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, hidden_size=64, num_decoder_layers=2, num_attention_heads=2, intermediate_size=256,
                     max_position_embeddings=256, embd_pdrop=0.0, resid_pdrop=0.0, attention_dropout=0.0),
        "openai-gpt": BASE,
    },
    keys={theirs: ours for theirs, ours in GPT2.keys.items() if theirs not in ("n_inner", "activation_function")},
    words=(
        Words(keys=("afn",), read=lambda theirs: {"hidden_act": ACTIVATIONS.get(theirs.get("afn", "gelu"), theirs.get("afn"))},
              write=lambda config: {"afn": next((a for a, b in ACTIVATIONS.items() if b == config.hidden_act), config.hidden_act)}),
        Words(keys=(), read=lambda theirs: {"intermediate_size": 4 * theirs.get("n_embd", 768)}, write=lambda config: {}),
    ),
    heads={
        "causal": Head(architecture="OpenAIGPTLMHeadModel", renames=LM_HEAD),
        "classify": Head(architecture="OpenAIGPTForSequenceClassification", renames=SCORE, bias=False),
        "body": Head(architecture="OpenAIGPTModel"),
    },
    renames=(
        Rename(("tokens_embed.weight",), "transformer.embed.weight"),
        Rename(("positions_embed.weight",), "transformer.decoder.positions.weight"),
        *without(GPT2.renames, "embed.", "positions.", "decoder.norm."),
    ),
    legacy=(*GPT2.legacy, r"position_ids"),
    inert=GPT2.inert,
)

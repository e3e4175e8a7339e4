"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before each branch, GELU, biases everywhere, a tied head.

Published configurations: https://huggingface.co/openai-community/gpt2/blob/main/config.json (and gpt2-medium,
gpt2-large, gpt2-xl).
"""

from __future__ import annotations

from threefold.model.families.family import Family, Head, Rename, plain, size

BASE = plain(
    "gpt2",
    vocab_size=50257,
    hidden_size=768,
    num_decoder_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=1024,
    hidden_act="gelu_new",
    norm_type="layer_norm",
    norm_eps=1e-5,
    position_embedding_type="absolute",
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    embd_pdrop=0.1,
    resid_pdrop=0.1,
    attention_dropout=0.1,
    initializer_range=0.02,
    bos_token_id=50256,
    eos_token_id=50256,
)
BLOCK = "transformer.decoder.blocks.{}."
LM_HEAD = (Rename(("lm_head.weight",), "lm_head.weight"),)
SCORE = (Rename(("score.weight",), "head.out.weight"),)
CLASSES = (Rename(("classifier.weight",), "head.out.weight"), Rename(("classifier.bias",), "head.out.bias"))

GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    tokenizer="bpe",
    prefix="transformer.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, hidden_size=64, num_decoder_layers=2, num_attention_heads=2, intermediate_size=256,
                     max_position_embeddings=256, embd_pdrop=0.0, resid_pdrop=0.0, attention_dropout=0.0),
        "gpt2": BASE,
        "gpt2-medium": size(BASE, hidden_size=1024, num_decoder_layers=24, num_attention_heads=16, intermediate_size=4096),
        "gpt2-large": size(BASE, hidden_size=1280, num_decoder_layers=36, num_attention_heads=20, intermediate_size=5120),
        "gpt2-xl": size(BASE, hidden_size=1600, num_decoder_layers=48, num_attention_heads=25, intermediate_size=6400),
    },
    keys={
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_decoder_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "resid_pdrop": "resid_pdrop",
        "embd_pdrop": "embd_pdrop",
        "attn_pdrop": "attention_dropout",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    heads={
        "causal": Head(architecture="GPT2LMHeadModel", renames=LM_HEAD),
        "classify": Head(architecture="GPT2ForSequenceClassification", renames=SCORE, bias=False),
        "tag": Head(architecture="GPT2ForTokenClassification", renames=CLASSES),
        "body": Head(architecture="GPT2Model"),
    },
    renames=(
        Rename(("wte.weight",), "transformer.embed.weight"),
        Rename(("wpe.weight",), "transformer.decoder.positions.weight"),
        Rename(("h.{}.ln_1.weight",), BLOCK + "norm1.weight"),
        Rename(("h.{}.ln_1.bias",), BLOCK + "norm1.bias"),
        Rename(("h.{}.attn.c_attn.weight",), BLOCK + "attention.qkv.weight", "transpose"),
        Rename(("h.{}.attn.c_attn.bias",), BLOCK + "attention.qkv.bias"),
        Rename(("h.{}.attn.c_proj.weight",), BLOCK + "attention.out.weight", "transpose"),
        Rename(("h.{}.attn.c_proj.bias",), BLOCK + "attention.out.bias"),
        Rename(("h.{}.ln_2.weight",), BLOCK + "norm2.weight"),
        Rename(("h.{}.ln_2.bias",), BLOCK + "norm2.bias"),
        Rename(("h.{}.mlp.c_fc.weight",), BLOCK + "feedforward.up.weight", "transpose"),
        Rename(("h.{}.mlp.c_fc.bias",), BLOCK + "feedforward.up.bias"),
        Rename(("h.{}.mlp.c_proj.weight",), BLOCK + "feedforward.down.weight", "transpose"),
        Rename(("h.{}.mlp.c_proj.bias",), BLOCK + "feedforward.down.bias"),
        Rename(("ln_f.weight",), "transformer.decoder.norm.weight"),
        Rename(("ln_f.bias",), "transformer.decoder.norm.bias"),
    ),
    legacy=(r"h\.\d+\.attn\.bias", r"h\.\d+\.attn\.masked_bias"),  # the causal triangle, stored as a buffer
    inert=frozenset(
        ["n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
          "summary_first_dropout", "reorder_and_upcast_attn"]
    ),
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
)

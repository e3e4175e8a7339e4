"""BioGPT (arXiv 2210.10341): a decoder for biomedical text: token vectors times sqrt(D), learned positions behind two
unused rows, the exact GELU, and an embedding as head.

Published configurations: https://huggingface.co/microsoft/biogpt/blob/main/config.json and BioGPT-Large.
"""

from __future__ import annotations

from threefold.model.families.family import Family, Head, Rename, plain, size
from threefold.model.families.gpt2 import BLOCK, CLASSES, SCORE

BASE = plain(
    "biogpt",
    vocab_size=42384,
    hidden_size=1024,
    num_decoder_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=1024,
    hidden_act="gelu",
    norm_type="layer_norm",
    norm_eps=1e-5,
    scale_embedding=True,
    position_embedding_type="absolute",
    position_offset=2,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    embd_pdrop=0.1,
    resid_pdrop=0.1,
    attention_dropout=0.1,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)


def attention(theirs: str, ours: str) -> tuple[Rename, ...]:
    """The four projections of an attention of this kind, each with a bias."""
    return tuple(
        rename for kind in ("weight", "bias") for rename in (
            Rename(tuple(f"{theirs}.{x}_proj.{kind}" for x in "qkv"), f"{ours}.qkv.{kind}"),
            Rename((f"{theirs}.out_proj.{kind}",), f"{ours}.out.{kind}")))


def both(theirs: str, ours: str) -> tuple[Rename, ...]:
    """A weight and its bias."""
    return tuple(Rename((f"{theirs}.{kind}",), f"{ours}.{kind}") for kind in ("weight", "bias"))


BIOGPT = Family(
    name="biogpt",
    model_type="biogpt",
    tokenizer="bpe",
    prefix="biogpt.",
    base=BASE,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, hidden_size=64, num_decoder_layers=2, num_attention_heads=2, intermediate_size=256,
                     max_position_embeddings=256, embd_pdrop=0.0, resid_pdrop=0.0, attention_dropout=0.0),
        "biogpt": BASE,
        "biogpt-large": size(BASE, vocab_size=57717, hidden_size=1600, num_decoder_layers=48, num_attention_heads=25,
                             intermediate_size=6400, max_position_embeddings=2048),
    },
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_decoder_layers",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "hidden_act": "hidden_act",
        "max_position_embeddings": "max_position_embeddings",
        "scale_embedding": "scale_embedding",
        "hidden_dropout_prob": ("resid_pdrop", "embd_pdrop"),
        "attention_probs_dropout_prob": "attention_dropout",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    heads={
        "causal": Head(architecture="BioGptForCausalLM", renames=(Rename(("output_projection.weight",), "lm_head.weight"),)),
        "classify": Head(architecture="BioGptForSequenceClassification", renames=SCORE, bias=False),
        "tag": Head(architecture="BioGptForTokenClassification", renames=CLASSES),
        "body": Head(architecture="BioGptModel"),
    },
    renames=(
        Rename(("embed_tokens.weight",), "transformer.embed.weight"),
        Rename(("embed_positions.weight",), "transformer.decoder.positions.weight"),
        *attention("layers.{}.self_attn", BLOCK + "attention"),
        *both("layers.{}.self_attn_layer_norm", BLOCK + "norm1"),
        *both("layers.{}.fc1", BLOCK + "feedforward.up"),
        *both("layers.{}.fc2", BLOCK + "feedforward.down"),
        *both("layers.{}.final_layer_norm", BLOCK + "norm2"),
        *both("layer_norm", "transformer.decoder.norm"),
    ),
    inert=frozenset(["layer_norm_eps"]),  # its norms have torch's own
)

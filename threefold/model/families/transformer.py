"""The Transformer of 2017 (arXiv 1706.03762): encoder and decoder with the norm behind each sum, waves as positions, ReLU,
token vectors times sqrt(D), and one table for both texts and the head.

Its words are those of `marian` with the activation `relu`. There all sines of a position stand before all cosines, a
permutation of the paper's channels that training does not notice. Published configurations in these words:
https://huggingface.co/Helsinki-NLP/opus-mt-en-de/blob/main/config.json.
"""

from __future__ import annotations

from threefold.model.families.biogpt import attention, both
from threefold.model.families.family import Family, Head, Rename, plain, size

BASE = plain(
    "transformer",
    vocab_size=58101,
    hidden_size=1024,
    num_encoder_layers=12,
    num_decoder_layers=12,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=1024,
    hidden_act="gelu",
    norm_type="layer_norm",
    norm_eps=1e-5,
    norm_order="post",
    position_embedding_type="sinusoidal",
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    head_bias=True,
    embd_pdrop=0.1,
    resid_pdrop=0.1,
    initializer_range=0.02,
    eos_token_id=0,
    pad_token_id=58100,
    decoder_start_token_id=58100,
)
OF_2017 = {"vocab_size": 37000, "hidden_act": "relu", "scale_embedding": True, "pad_token_id": 36999, "decoder_start_token_id": 36999}
READ = "transformer.encoder.blocks.{}."
WRITE = "transformer.decoder.blocks.{}."


def _block(theirs: str, ours: str) -> tuple[Rename, ...]:
    return (
        *attention(f"{theirs}.self_attn", ours + "attention"),
        *both(f"{theirs}.self_attn_layer_norm", ours + "norm1"),
        *both(f"{theirs}.fc1", ours + "feedforward.up"),
        *both(f"{theirs}.fc2", ours + "feedforward.down"),
        *both(f"{theirs}.final_layer_norm", ours + "norm2"),
    )


TRANSFORMER = Family(
    name="transformer",
    model_type="marian",
    tokenizer="unigram",
    prefix="model.",
    base=BASE,
    new={"hidden_act": "relu", "scale_embedding": True},
    same_head_dim=True,
    sizes={
        "nano": size(BASE, **OF_2017 | {
            "hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
            "max_position_embeddings": 256, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
        "base": size(BASE, **OF_2017 | {
            "hidden_size": 512, "num_encoder_layers": 6, "num_decoder_layers": 6, "num_attention_heads": 8,
            "intermediate_size": 2048}),
        "big": size(BASE, **OF_2017 | {"num_encoder_layers": 6, "num_decoder_layers": 6, "embd_pdrop": 0.3, "resid_pdrop": 0.3}),
        "opus-mt": size(BASE, hidden_size=512, num_encoder_layers=6, num_decoder_layers=6, num_attention_heads=8,
                        intermediate_size=2048, max_position_embeddings=512, hidden_act="silu", scale_embedding=True),
    },
    keys={
        "vocab_size": "vocab_size",
        "decoder_vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "encoder_layers": "num_encoder_layers",
        "decoder_layers": "num_decoder_layers",
        "encoder_attention_heads": "num_attention_heads",
        "decoder_attention_heads": "num_attention_heads",
        "encoder_ffn_dim": "intermediate_size",
        "decoder_ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "max_position_embeddings": "max_position_embeddings",
        "scale_embedding": "scale_embedding",
        "dropout": ("resid_pdrop", "embd_pdrop"),
        "attention_dropout": "attention_dropout",
    },
    heads={
        "seq2seq": Head(architecture="MarianMTModel", renames=(
            Rename(("lm_head.weight",), "lm_head.weight"), Rename(("final_logits_bias",), "lm_head.bias", "row"))),
        "body": Head(architecture="MarianModel"),
    },
    renames=(
        Rename(("shared.weight",), "transformer.embed.weight"),
        *_block("encoder.layers.{}", READ),
        *_block("decoder.layers.{}", WRITE),
        *(Rename((f"decoder.layers.{{}}.encoder_attn.q_proj.{kind}",), f"{WRITE}cross.q.{kind}") for kind in ("weight", "bias")),
        *(Rename(tuple(f"decoder.layers.{{}}.encoder_attn.{x}_proj.{kind}" for x in "kv"), f"{WRITE}cross.kv.{kind}")
          for kind in ("weight", "bias")),
        *both("decoder.layers.{}.encoder_attn.out_proj", WRITE + "cross.out"),
        *both("decoder.layers.{}.encoder_attn_layer_norm", WRITE + "cross_norm"),
    ),
    legacy=(r"(encoder|decoder)\.embed_positions\.weight",),  # the waves, stored as a table
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    inert=frozenset(["init_std", "num_hidden_layers", "add_bias_logits", "classif_dropout", "extra_pos_embeddings"]),
    only={"encoder_layerdrop": (0.0, 0), "decoder_layerdrop": (0.0, 0), "share_encoder_decoder_embeddings": (True,),
          "normalize_before": (False,), "normalize_embedding": (False,), "add_final_layer_norm": (False,),
          "static_position_embeddings": (True,), "tie_word_embeddings": (True, None)},
)

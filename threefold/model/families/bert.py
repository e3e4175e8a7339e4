"""BERT (arXiv 1810.04805): an encoder with the norm behind each sum, segments, a pooler; it learns from hidden tokens and
from pairs of sentences.

Published configurations: https://huggingface.co/google-bert/bert-base-uncased/blob/main/config.json (and
bert-large-uncased, bert-base-cased, bert-base-multilingual-cased).
"""

from __future__ import annotations

from threefold.model.families.biogpt import both
from threefold.model.families.family import Family, Head, Rename, plain, size
from threefold.model.families.gpt2 import CLASSES

BASE = plain(
    "bert",
    vocab_size=30522,
    hidden_size=768,
    num_encoder_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
    hidden_act="gelu",
    norm_type="layer_norm",
    norm_eps=1e-12,
    norm_order="post",
    embedding_norm=True,
    position_embedding_type="absolute",
    attention_bias=True,
    mlp_bias=True,
    type_vocab_size=2,
    tie_word_embeddings=True,
    head_transform=True,
    head_bias=True,
    embd_pdrop=0.1,
    resid_pdrop=0.1,
    attention_dropout=0.1,
    initializer_range=0.02,
    pad_token_id=0,
)
IDENTITY = {"initializer_range": None}  # a new encoder begins as the identity, and learns sooner (docs/log.md)
NANO = {"hidden_size": 64, "num_encoder_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
        "max_position_embeddings": 256, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0}
LARGE = {"hidden_size": 1024, "num_encoder_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BLOCK = "transformer.encoder.blocks.{}."
BODY = (
    Rename(("embeddings.word_embeddings.weight",), "transformer.embed.weight"),
    Rename(("embeddings.position_embeddings.weight",), "transformer.encoder.positions.weight"),
    Rename(("embeddings.token_type_embeddings.weight",), "transformer.encoder.types.weight"),
    *both("embeddings.LayerNorm", "transformer.encoder.entrance_norm"),
    *(Rename(tuple(f"encoder.layer.{{}}.attention.self.{x}.{kind}" for x in ("query", "key", "value")), f"{BLOCK}attention.qkv.{kind}")
      for kind in ("weight", "bias")),
    *both("encoder.layer.{}.attention.output.dense", BLOCK + "attention.out"),
    *both("encoder.layer.{}.attention.output.LayerNorm", BLOCK + "norm1"),
    *both("encoder.layer.{}.intermediate.dense", BLOCK + "feedforward.up"),
    *both("encoder.layer.{}.output.dense", BLOCK + "feedforward.down"),
    *both("encoder.layer.{}.output.LayerNorm", BLOCK + "norm2"),
    *both("pooler.dense", "pooler.dense"),
)
PREDICTIONS = (
    *both("cls.predictions.transform.dense", "lm_head.transform.dense"),
    *both("cls.predictions.transform.LayerNorm", "lm_head.transform.norm"),
    Rename(("cls.predictions.decoder.weight",), "lm_head.weight"),
    Rename(("cls.predictions.bias",), "lm_head.bias"),
)
TWICE = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
KEYS: dict[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_encoder_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": ("resid_pdrop", "embd_pdrop"),
    "attention_probs_dropout_prob": "attention_dropout",
}
POOLER_KEYS = frozenset(f"pooler_{word}" for word in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type"))
ONLY: dict[str, tuple[object, ...]] = {
    "is_decoder": (False, None), "tie_word_embeddings": (True, None), "directionality": ("bidi",),
    "position_embedding_type": ("absolute", None)}
SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

BERT = Family(
    name="bert",
    model_type="bert",
    tokenizer="wordpiece",
    prefix="bert.",
    base=BASE,
    new=IDENTITY,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, **NANO),
        "bert-base-uncased": BASE,
        "bert-base-cased": size(BASE, vocab_size=28996),
        "bert-base-multilingual-cased": size(BASE, vocab_size=119547),
        "bert-large-uncased": size(BASE, **LARGE),
        "bert-large-cased": size(BASE, vocab_size=28996, **LARGE),
        "base": BASE,
        "large": size(BASE, **LARGE),
    },
    keys=KEYS,
    heads={
        "masked": Head(architecture="BertForMaskedLM", renames=PREDICTIONS, copies=TWICE),
        "pretraining": Head(architecture="BertForPreTraining", pooler=True, copies=TWICE,
                            renames=(*PREDICTIONS, *both("cls.seq_relationship", "pairs"))),
        "classify": Head(architecture="BertForSequenceClassification", renames=CLASSES, pooler=True, reads="pooled"),
        "tag": Head(architecture="BertForTokenClassification", renames=CLASSES),
        "body": Head(architecture="BertModel", pooler=True),
    },
    renames=BODY,
    legacy=(r"embeddings\.(position|token_type)_ids",),
    spellings=SPELLINGS,
    inert=POOLER_KEYS,
    only=ONLY,
)

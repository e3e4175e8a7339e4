"""ELECTRA (arXiv 2003.10555): BERT's encoder that learns to tell which tokens a small generator has replaced. The
embedding has a width of its own.

Published configurations: https://huggingface.co/google/electra-small-discriminator/blob/main/config.json (and -base-,
-large-, and the generators).
"""

from __future__ import annotations

import dataclasses

from threefold.model.families.bert import BASE as BERT_BASE
from threefold.model.families.bert import BODY, IDENTITY, KEYS, LARGE, NANO, ONLY, SPELLINGS
from threefold.model.families.biogpt import both
from threefold.model.families.family import Family, Head, Rename, size
from threefold.model.families.gpt2 import CLASSES
from threefold.model.families.roberta import DENSE

BASE = dataclasses.replace(
    BERT_BASE, model_type="electra", hidden_size=256, embedding_size=128, num_attention_heads=4, num_key_value_heads=4,
    head_dim=64, intermediate_size=1024)

ELECTRA = Family(
    name="electra",
    model_type="electra",
    tokenizer="wordpiece",
    prefix="electra.",
    base=BASE,
    new=IDENTITY,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, **NANO),
        "small": BASE,
        "base": size(BASE, hidden_size=768, num_attention_heads=12, intermediate_size=3072),
        "large": size(BASE, **LARGE),
    },
    keys={**KEYS, "embedding_size": "embedding_size"},
    heads={
        "replaced": Head(architecture="ElectraForPreTraining", activation="hidden_act", renames=(
            *both("discriminator_predictions.dense", "head.dense"),
            *both("discriminator_predictions.dense_prediction", "head.out"))),
        "masked": Head(architecture="ElectraForMaskedLM", renames=(
            *both("generator_predictions.dense", "lm_head.transform.dense"),
            *both("generator_predictions.LayerNorm", "lm_head.transform.norm"),
            Rename(("generator_lm_head.weight",), "lm_head.weight"),
            Rename(("generator_lm_head.bias",), "lm_head.bias"))),
        "classify": Head(architecture="ElectraForSequenceClassification", renames=DENSE, reads="first", activation="gelu"),
        "tag": Head(architecture="ElectraForTokenClassification", renames=CLASSES),
        "body": Head(architecture="ElectraModel"),
    },
    renames=(*BODY, *both("embeddings_project", "transformer.encoder.project")),
    legacy=(r"embeddings\.(position|token_type)_ids",),
    spellings=SPELLINGS,
    inert=frozenset(["summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"]),
    only=ONLY,
)

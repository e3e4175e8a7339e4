"""RoBERTa (arXiv 1907.11692): BERT on byte-level BPE, without pairs of sentences; positions begin behind two unused rows.

Published configurations: https://huggingface.co/FacebookAI/roberta-base/blob/main/config.json and roberta-large. Their
`max_position_embeddings` counts the rows of the table, ours the tokens of a text; the unused rows are those up to the id
that pads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from threefold.model.config import TransformerConfig
from threefold.model.families.bert import BASE as BERT_BASE
from threefold.model.families.bert import BODY, IDENTITY, KEYS, LARGE, NANO, ONLY, SPELLINGS
from threefold.model.families.biogpt import both
from threefold.model.families.family import Family, Head, Rename, Words, size
from threefold.model.families.gpt2 import CLASSES


def _read(theirs: Mapping[str, Any]) -> dict[str, Any]:
    padding = theirs.get("pad_token_id", 1)
    offset = 0 if padding is None else padding + 1
    return {"position_offset": offset, "max_position_embeddings": theirs.get("max_position_embeddings", 512) - offset}


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.max_position_embeddings + config.position_offset}


BASE = dataclasses.replace(BERT_BASE, model_type="roberta", vocab_size=50265, max_position_embeddings=510, position_offset=2,
                           bos_token_id=0, eos_token_id=2, pad_token_id=1)
_PUBLISHED: dict[str, Any] = {"max_position_embeddings": 512, "type_vocab_size": 1, "norm_eps": 1e-5}
DENSE = (*both("classifier.dense", "head.dense"), *both("classifier.out_proj", "head.out"))

ROBERTA = Family(
    name="roberta",
    model_type="roberta",
    tokenizer="bpe",
    prefix="roberta.",
    base=BASE,
    new=IDENTITY,
    same_head_dim=True,
    sizes={
        "nano": size(BASE, **{**_PUBLISHED, **NANO}),
        "roberta-base": size(BASE, **_PUBLISHED),
        "roberta-large": size(BASE, **_PUBLISHED, **LARGE),
    },
    keys={theirs: ours for theirs, ours in KEYS.items() if theirs != "max_position_embeddings"},
    words=(Words(keys=("max_position_embeddings",), read=_read, write=_write),),
    heads={
        "masked": Head(architecture="RobertaForMaskedLM", copies={"lm_head.decoder.bias": "lm_head.bias"}, renames=(
            *both("lm_head.dense", "lm_head.transform.dense"),
            *both("lm_head.layer_norm", "lm_head.transform.norm"),
            Rename(("lm_head.decoder.weight",), "lm_head.weight"),
            Rename(("lm_head.bias",), "lm_head.bias"))),
        "classify": Head(architecture="RobertaForSequenceClassification", renames=DENSE, reads="first", activation="tanh"),
        "tag": Head(architecture="RobertaForTokenClassification", renames=CLASSES),
        "body": Head(architecture="RobertaModel", pooler=True),
    },
    renames=BODY,
    legacy=(r"embeddings\.(position|token_type)_ids",),
    spellings=SPELLINGS,
    only=ONLY,
)

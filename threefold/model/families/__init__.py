"""The families, by the name that a user gives; `MODEL_TYPES` by the one that transformers calls `model_type`."""

from __future__ import annotations

from threefold.errors import UsageError, did_you_mean
from threefold.model.families.bert import BERT
from threefold.model.families.biogpt import BIOGPT
from threefold.model.families.electra import ELECTRA
from threefold.model.families.family import Family
from threefold.model.families.gpt1 import GPT1
from threefold.model.families.gpt2 import GPT2
from threefold.model.families.gpt3 import GPT3
from threefold.model.families.llama import LLAMA
from threefold.model.families.palm import PALM
from threefold.model.families.phi3 import PHI3
from threefold.model.families.qwen3 import QWEN3
from threefold.model.families.roberta import ROBERTA
from threefold.model.families.t5 import T5
from threefold.model.families.transformer import TRANSFORMER

FAMILIES: dict[str, Family] = {
    "transformer": TRANSFORMER, "bert": BERT, "roberta": ROBERTA, "electra": ELECTRA, "gpt1": GPT1, "gpt2": GPT2, "gpt3": GPT3,
    "llama": LLAMA, "qwen3": QWEN3, "phi3": PHI3, "palm": PALM, "biogpt": BIOGPT, "t5": T5,
}
MODEL_TYPES = {family.model_type: family for family in FAMILIES.values()}


def family_of(name: str) -> Family:
    """The family of that name; raises `UsageError` with the nearest known one."""
    if name not in FAMILIES:
        raise UsageError(f"`{name}` is not a known family of models", hint=did_you_mean(str(name), FAMILIES))
    return FAMILIES[name]

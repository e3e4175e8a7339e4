"""The families, by the name that transformers calls `model_type`."""

from __future__ import annotations

from threefold.errors import UsageError, did_you_mean
from threefold.model.families.family import Family
from threefold.model.families.gpt2 import GPT2
from threefold.model.families.llama import LLAMA
from threefold.model.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}


def family_of(name: str) -> Family:
    """The family of that name; raises `UsageError` with the nearest known one."""
    if name not in FAMILIES:
        raise UsageError(f"`{name}` is not a known family of models", hint=did_you_mean(str(name), FAMILIES))
    return FAMILIES[name]

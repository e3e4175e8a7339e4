"""threefold: make, understand and use a language model, whole.

    from threefold import AutoModelForCausalLM, AutoTokenizer, pipeline
    import threefold
    model, tokenizer = threefold.load("runs/tour")

Names are looked up when they are first used, so that `import threefold` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threefold.auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTextEncoding,
        AutoModelForTokenClassification,
        AutoTokenizer,
        load,
    )
    from threefold.evaluation.loss import evaluate_model as evaluate
    from threefold.finetune import train
    from threefold.model.attention import attention
    from threefold.tasks import pipeline

__version__ = "0.1.0"

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTextEncoding",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "__version__",
    "attention",
    "evaluate",
    "load",
    "pipeline",
    "train",
]

_PLACES = {
    "AutoModel": ("auto", "AutoModel"),
    "AutoModelForCausalLM": ("auto", "AutoModelForCausalLM"),
    "AutoModelForMaskedLM": ("auto", "AutoModelForMaskedLM"),
    "AutoModelForPreTraining": ("auto", "AutoModelForPreTraining"),
    "AutoModelForSeq2SeqLM": ("auto", "AutoModelForSeq2SeqLM"),
    "AutoModelForSequenceClassification": ("auto", "AutoModelForSequenceClassification"),
    "AutoModelForTextEncoding": ("auto", "AutoModelForTextEncoding"),
    "AutoModelForTokenClassification": ("auto", "AutoModelForTokenClassification"),
    "AutoTokenizer": ("auto", "AutoTokenizer"),
    "attention": ("model.attention", "attention"),
    "evaluate": ("evaluation.loss", "evaluate_model"),
    "load": ("auto", "load"),
    "pipeline": ("tasks", "pipeline"),
    "train": ("finetune", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module `threefold` has no `{name}`; it has {', '.join(__all__)}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(importlib.import_module(f"threefold.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

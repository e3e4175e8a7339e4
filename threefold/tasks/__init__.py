"""`pipeline(task, model=...)`: text in, text or judgements out, with transformers' argument names and result shapes.

Decisions:
- Shapes are those of transformers 5; tasks that it has dropped (text2text-generation, summarization, translation) keep those
  of version 4, with the prefixes and settings that config.json has for them in `task_specific_params`.
- Nothing is cut unless `truncation=True` says so, and no argument is dropped in silence.
- A model may be a path, a hub name or a loaded one; a loaded one stays on its device unless `device` names another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from threefold import auto, remote
from threefold.errors import UsageError, did_you_mean
from threefold.model.base import Model
from threefold.tasks.asking import QuestionAnswering, TextToSql
from threefold.tasks.base import Pipeline
from threefold.tasks.judging import FeatureExtraction, FillMask, SentenceSimilarity, TextClassification, TokenClassification
from threefold.tasks.served import ServedGeneration, served
from threefold.tasks.writing import Summarization, Text2Text, TextGeneration, Translation
from threefold.tasks.zero_shot import ZeroShotClassification
from threefold.text.pretrained import PretrainedTokenizer

_TRANSLATION = re.compile(r"translation_(\w+)_to_(\w+)")
TASKS: dict[str, type[Pipeline]] = {
    "text-generation": TextGeneration, "text2text-generation": Text2Text, "summarization": Summarization, "translation": Translation,
    "fill-mask": FillMask, "feature-extraction": FeatureExtraction, "text-classification": TextClassification,
    "token-classification": TokenClassification, "zero-shot-classification": ZeroShotClassification,
    "sentence-similarity": SentenceSimilarity, "question-answering": QuestionAnswering, "text-to-sql": TextToSql,
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}


OF_HEADS = {"causal": "text-generation", "seq2seq": "text2text-generation", "masked": "fill-mask", "pretraining": "fill-mask",
            "classify": "text-classification", "tag": "token-classification", "body": "feature-extraction", "encoder": "feature-extraction"}


def pipeline(
    task: str | None = None,
    model: str | Model | Any = None,
    tokenizer: str | PretrainedTokenizer | Any = None,
    *,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool | None = None,
    use_fast: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> Pipeline | ServedGeneration:
    """What does `task` with a model: call it with texts.

    task        one of `TASKS` or `ALIASES`, or `translation_XX_to_YY`; None: what the model was saved, or loaded, for
    model       a run directory, a Hugging Face directory, a hub name, a served model (`openai:NAME`), or one that is loaded
    tokenizer   the same; the model's own where it is not given
    device      a number (-1 is the CPU), a name or torch's own; None: the best there is for a path, else where the model is
    defaults    arguments of every call, which a call may replace

    Raises `UsageError` for an unknown task and a model that cannot do it.
    """
    known = {**TASKS, **{alias: TASKS[name] for alias, name in ALIASES.items()}}
    kind = None if task is None else known.get("translation" if _TRANSLATION.fullmatch(task) else task)
    if kind is None and task is not None:
        raise UsageError(f"`{task}` is not a known task", hint=did_you_mean(task, [*known, "translation_XX_to_YY"]))
    if model is None:
        raise UsageError(f"`pipeline({task or ''!r})` needs a model", hint="give a directory, a hub name or a loaded model")
    if isinstance(model, str) and remote.is_remote(model):
        model = remote.open(model)
    if isinstance(model, remote.RemoteModel):
        return served(task or "text-generation", model, defaults)
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    if not isinstance(model, Model):
        where = device_map if device_map is not None else "auto" if device is None else device
        loading = {"dtype": dtype, "torch_dtype": torch_dtype, "device_map": where, "revision": revision, "token": token,
                   "trust_remote_code": trust_remote_code, **(model_kwargs or {})}
        model = (auto._Auto if kind is None else kind.loader).from_pretrained(model, **loading)
    elif device is not None:
        model.to(auto.place(device, model.notes))
    if task is None or kind is None:
        if model.task not in OF_HEADS:
            raise UsageError(f"no task follows from a model for `{model.task}`", hint=f"name one: {', '.join(TASKS)}")
        task, kind = OF_HEADS[model.task], TASKS[OF_HEADS[model.task]]
    if model.task not in kind.heads:
        loader = next((one.__name__ for one in auto.AUTO_MODELS if one is kind.loader), None)
        raise UsageError(f"`{task}` cannot be done by a model that was loaded for `{model.task}`",
                         hint=f"load it with {loader}" if loader else f"it is done by models for {', '.join(f'`{head}`' for head in kind.heads)}")
    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", None)
        if tokenizer is None:
            raise UsageError("a tokenizer is missing: this model was made, not loaded", hint="give `tokenizer`")
    if not isinstance(tokenizer, PretrainedTokenizer):
        tokenizer = auto.AutoTokenizer.from_pretrained(tokenizer, revision=revision, token=token, use_fast=use_fast)
    return kind(task, model.eval(), tokenizer, defaults)

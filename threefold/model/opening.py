"""A directory -> the model in it: a whole one, or the base of an adapter with the adapter beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from threefold import hub
from threefold.errors import ModelError
from threefold.model import adapters
from threefold.model.base import Model
from threefold.model.grow import resized
from threefold.model.weights import load_config, load_model


def open_model(folder: Path, dtype: torch.dtype | None, task_of: Callable[[Path], str | None], classes: int | None = None) -> Model:
    """The model of a directory, in evaluation mode. `task_of` says of a whole model what its head is to be for (None: what it was saved
    for). Raises `ModelError` for an adapter whose base has other weights than it was made beside."""
    if not adapters.is_adapter(folder):
        return load_model(folder, dtype, task=task_of(folder), classes=classes)
    name, task, labels = adapters.described(folder)
    base = hub.resolve(name)
    known = adapters.details(folder).get("base")
    if known is not None and known != adapters.print_of(base):
        raise ModelError(f"the adapter in `{folder}` was made beside other weights than those in `{base}`: it would be added to what it does not fit",
                         hint=f"put its base back, or name the base in {adapters.CONFIG}; of one that was only stored anew, take `base` out of "
                              f"{adapters.DETAILS}")
    task = task_of(base) or task
    if task == "body" and "encoder" in load_config(base)[0].heads:  # what makes vectors of an encoder-decoder
        task = "encoder"
    model = load_model(base, dtype, task=task, classes=classes or len(labels) or adapters.classes_of(base, folder, task))
    if (rows := adapters.vocabulary_of(model, folder)) is not None and rows > model.config.vocab_size:
        model = resized(model, vocab_size=rows, context=model.config.max_position_embeddings)
    adapters.load(model, folder)
    model.labels = labels or model.labels
    return model.eval()

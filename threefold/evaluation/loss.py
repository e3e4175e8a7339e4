"""Loss, bits per byte and perplexity on held-out text, by the one definition behind all figures of this package.

Decisions:
- The definition is that of data/windows.py: windows of at most `context` inputs that do not overlap and never cross a
  document; every id but the first of a document is predicted once, the closing special token included.
- Loss is in nats per predicted token, computed in float32 whatever the model trains in: `compute_dtype` is set aside
  for the time of the evaluation unless `exact=False`. Sums over batches are in float64.
- Bits per byte divide the whole loss by the bytes of the predicted ids, so that tokenizers can be compared.
- The model is in evaluation mode for the time, and is left as it was found.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import torch

from threefold.data.loader import Batch
from threefold.data.shards import Shards, is_prepared
from threefold.data.windows import document_windows, validation_windows
from threefold.errors import NumericError, UsageError
from threefold.model.base import Model
from threefold.model.language import CausalLM

BATCH_TOKENS = 8192  # activations of a small model then stay in a CPU's cache
TEXTS_AT_ONCE = 256  # encoded together, on all threads


class Encoder(Protocol):
    """What evaluation needs of a tokenizer."""

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]: ...

    def token_bytes(self) -> list[bytes | None]: ...


class Evaluation(TypedDict):
    """What an evaluation says. `bits_per_byte` is None where the bytes of the tokens are not known."""

    loss: float
    bits_per_byte: float | None
    perplexity: float
    tokens: int
    bytes: int


def evaluate_model(name: str | os.PathLike[str], data: str | Sequence[str] = (), columns: Mapping[str, str] | None = None, *,
                   context: int | None = None, batch_tokens: int = BATCH_TOKENS, exact: bool = True) -> Evaluation:
    """Evaluate a model, given as a MODEL of the command line.

    data     sources of text (one or several files, folders, globs, `python`), all of which is used; none: the run's own
             held-out part
    columns  other names of the column `text` in rows
    """
    from threefold import console, hub  # a trainer, which needs this file's other functions, reads no text
    from threefold.device import pick_device
    from threefold.model.opening import open_model
    from threefold.text.clean import normalise
    from threefold.text.sources import parse_source, read_documents
    from threefold.text.tokenizer import Tokenizer

    data = [data] if isinstance(data, str) else data
    folder = hub.resolve(name, needs=("model", "tokenizer"))
    shards = None if data else own_shards(Path(name), folder)
    model, tokenizer = open_model(folder, None, lambda base: "causal").to(pick_device(note=console.note)), Tokenizer.load(folder)
    assert isinstance(model, CausalLM)
    console.notes(model.notes)
    if shards is not None:
        return evaluate_shards(model, shards, context, tokenizer.token_bytes(), batch_tokens=batch_tokens, exact=exact)
    sources = [parse_source(spec) for spec in data]
    texts = (
        normalise(document.text) for source in sources for document in read_documents(source.path, dict(columns or {}))
    )
    return evaluate_text(model, tokenizer, texts, context, batch_tokens=batch_tokens, exact=exact)


def own_shards(name: Path, folder: Path) -> Shards:
    """The data of the run that a model came from."""
    from threefold.config.toml import load_recipe

    for run in dict.fromkeys((name, folder.parent)):
        if is_prepared(run / "data"):
            return Shards.open(run / "data")
        if (run / "recipe.toml").is_file() and folder.parent == run:
            paths = load_recipe(run / "recipe.toml").data.paths
            if len(paths) == 1 and is_prepared(paths[0]):
                return Shards.open(paths[0])
    raise UsageError(f"`{name}` has no held-out text of its own", hint="name some: --data FILE")


def evaluate(
    model: CausalLM,
    documents: Iterable[np.ndarray | Sequence[int]],
    context: int | None = None,
    token_bytes: Sequence[bytes | None] = (),
    *,
    batch_tokens: int = BATCH_TOKENS,
    exact: bool = True,
) -> Evaluation:
    """Evaluate on documents of ids, each framed with the special tokens the model was trained with.

    context       ids in a window, at most and by default the model's own
    token_bytes   bytes of each id, None for special ones (`tokenizer.token_bytes()`); without it there are no bits per
    byte batch_tokens  ids in a forward pass; changes speed and memory, not the result
    exact         float32; False computes as the model trains

    Raises `DataError` where there is nothing to predict, `NumericError` where the loss is not finite.
    """
    context = checked_context(model, context)
    return evaluate_batches(
        model, document_windows(documents, context, token_bytes=token_bytes, batch_tokens=batch_tokens), exact=exact
    )


def evaluate_text(model: CausalLM, tokenizer: Encoder, texts: Iterable[str], context: int | None = None, *,
                  batch_tokens: int = BATCH_TOKENS, exact: bool = True) -> Evaluation:
    """Evaluate on texts, one document each, framed by the tokenizer."""
    remaining = iter(texts)
    parts = iter(lambda: list(itertools.islice(remaining, TEXTS_AT_ONCE)), [])
    documents = (ids for part in parts for ids in tokenizer.encode_documents(part))
    return evaluate(model, documents, context, tokenizer.token_bytes(), batch_tokens=batch_tokens, exact=exact)


def evaluate_shards(
    model: CausalLM,
    shards: Shards,
    context: int | None = None,
    token_bytes: Sequence[bytes | None] = (),
    *,
    split: str = "validation",
    subset: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    exact: bool = True,
) -> Evaluation:
    """Evaluate on a split of prepared data, or on `subset` windows of each source, always the same ones."""
    windows = validation_windows(shards, checked_context(model, context), split=split, token_bytes=token_bytes,
                                 batch_tokens=batch_tokens, subset=subset)
    return evaluate_batches(model, windows, exact=exact)


def evaluate_batches(model: CausalLM, batches: Iterable[Batch], *, exact: bool = True) -> Evaluation:
    """Evaluate on batches of windows (labels already shifted, -100 where nothing is predicted)."""
    total, tokens, size = 0.0, 0, 0
    with evaluating(model, exact=exact):
        device = model.device
        for batch in batches:
            loss, count = model.loss_sum(batch.input_ids.to(device), batch.labels.to(device),
                                         None if batch.positions is None else batch.positions.to(device),
                                         None if batch.documents is None else batch.documents.to(device))
            total, tokens, size = total + float(loss), tokens + count, size + batch.bytes
    return summary(total, tokens, size)


def summary(nats: float, tokens: int, size: int) -> Evaluation:
    """The figures that follow from a summed loss in nats over `tokens` predicted ids of `size` bytes."""
    assert tokens > 0, "windows without anything to predict are refused where they are cut"
    loss = nats / tokens
    if not math.isfinite(loss):
        raise NumericError(
            f"the loss over {tokens:,} held-out tokens is {loss}", hint="the weights may hold NaN or infinity"
        )
    return {"loss": loss, "bits_per_byte": nats / math.log(2) / size if size else None,
            "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens, "bytes": size}


@contextlib.contextmanager
def evaluating(model: Model, *, exact: bool = True) -> Iterator[None]:
    """Evaluation mode, no gradients and (with `exact`) the parameters' own precision, for a `with` block."""
    training, compute_dtype = model.training, model.compute_dtype
    model.eval()
    if exact:
        model.compute_dtype = None
    try:
        with torch.inference_mode():
            yield
    finally:
        model.compute_dtype = compute_dtype
        model.train(training)


def checked_context(model: CausalLM, context: int | None) -> int:
    """The context to evaluate with: the model's own, or a shorter one that was asked for."""
    longest = model.config.max_position_embeddings
    if context is None:
        return longest
    if not 1 <= context <= longest:
        raise UsageError(
            f"a context of {context} was asked for, and the model's is {longest}", hint=f"choose 1 to {longest}"
        )
    return context

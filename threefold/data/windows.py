"""Validation windows: every id but the first of each document is predicted once, and no window crosses a document.

Decisions:
- The definition is fixed: the ids t0..tn of a document, with its special tokens, give inputs t0..t(n-1) in windows of
  `context`, one after another, the last shorter one included. What is free is which windows share a batch.
- Windows of like length share a batch, so that twenty thousand short reviews cost little more than their tokens.
  Shorter rows are filled at the end, where a causal model cannot see it, and predict nothing there.
- A subset, for evaluations while training, is the first windows of a keyed order: the same ones every time.
- Bits per byte divide by the bytes of the predicted ids. Special tokens have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from threefold import seeds
from threefold.data.loader import IGNORED, Batch
from threefold.data.order import permute
from threefold.data.shards import Shards
from threefold.data.stream import TokenStream
from threefold.errors import DataError, UsageError

BATCH_TOKENS = 8192
GROUP = 2**22  # ids that are held at once

Ints = npt.NDArray[np.int64]


def validation_windows(shards: Shards, context: int, *, split: str = "validation", source: int | None = None,
                       token_bytes: Sequence[bytes | None] = (), batch_tokens: int = BATCH_TOKENS,
                       subset: int | None = None) -> Iterator[Batch]:
    """The windows of a split as batches of at most `batch_tokens` places (one row at least).

    `token_bytes` are the bytes of each id (`tokenizer.token_bytes()`); with them `batch.bytes` is the number of bytes
    of the predicted ids. `subset` takes only so many windows of each source, always the same. `batch.samples` numbers
    the windows of a source in the order of its text. Raises `DataError` where there is nothing to predict.
    """
    sources = range(len(shards.sources)) if source is None else [source]
    if not any(shards.stream(split, number).tokens > shards.stream(split, number).documents for number in sources):
        raise DataError(f"the {split} part of `{shards.directory}` holds nothing to predict",
                        hint="prepare the data with a --val-fraction above 0")
    lengths = byte_lengths(token_bytes)
    for number in sources:
        yield from stream_windows(shards.stream(split, number), context, filler=shards.filler_id, lengths=lengths,
                                  batch_tokens=batch_tokens, subset=subset, source=number)


def document_windows(documents: Iterable[npt.ArrayLike], context: int, *, filler: int = 0,
                     token_bytes: Sequence[bytes | None] = (), batch_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """The windows of documents given as ids, each framed with the special tokens that it is to be judged with."""
    lengths, some = byte_lengths(token_bytes), False
    for arrays in _groups(documents):
        ids, sizes = np.concatenate(arrays), np.asarray([array.size for array in arrays])
        some = some or bool((sizes > 1).any())
        stream = TokenStream([ids], np.cumsum(sizes) - sizes, len(ids))
        yield from stream_windows(stream, context, filler=filler, lengths=lengths, batch_tokens=batch_tokens)
    if not some:
        raise DataError("there is nothing to predict: no document has two ids or more")


def _groups(documents: Iterable[npt.ArrayLike]) -> Iterator[list[Ints]]:
    """Documents in groups of about so many ids: any amount of text is judged in little memory."""
    group, size = list[Ints](), 0
    for document in documents:
        if (array := np.asarray(document, dtype=np.int64)).size:
            group.append(array)
            size += array.size
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def stream_windows(stream: TokenStream, context: int, *, filler: int, lengths: Ints, batch_tokens: int = BATCH_TOKENS,
                   subset: int | None = None, source: int = 0) -> Iterator[Batch]:
    """The windows of one stream; `lengths` holds the bytes of each id, or is empty where they are not wanted."""
    if context < 1 or batch_tokens < 1:
        raise UsageError(f"cannot cut windows of {context} ids into batches of {batch_tokens}",
                         hint="both must be 1 or more")
    first, length = cut(stream, context)
    number = np.arange(len(first))
    if subset is not None and subset < len(first):
        number = permute(len(first), seeds.key(0, "validation subset"), np.arange(subset))
    number = number[np.argsort(-length[number], kind="stable")]
    start = 0
    while start < len(number):
        width = int(length[number[start]])
        chosen = number[start:start + max(1, batch_tokens // width)]
        start += len(chosen)
        place = first[chosen][:, None] + np.arange(width)
        beyond = np.arange(width) >= length[chosen][:, None]
        place[beyond] = 0
        ids, labels = stream.take(place), stream.take(place + 1)
        ids[beyond], labels[beyond] = filler, IGNORED
        count = int(lengths[labels[~beyond]].sum()) if lengths.size else 0
        yield Batch(torch.from_numpy(ids), torch.from_numpy(labels), None, None, chosen.astype(np.int64),
                    np.full(len(chosen), source, dtype=np.int64), count)


def cut(stream: TokenStream, context: int) -> tuple[Ints, Ints]:
    """First position and number of inputs of every window of a stream, in the order of the text."""
    inputs = np.diff(stream.starts, append=stream.tokens) - 1
    count = -(-inputs // context)
    document = np.repeat(np.arange(len(count)), count)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)) * context
    return stream.starts[document] + within, np.minimum(inputs[document] - within, context)


def byte_lengths(token_bytes: Sequence[bytes | None]) -> Ints:
    """The number of bytes of each id; an id without bytes, such as a special token, has 0."""
    return np.asarray([len(piece) if piece is not None else 0 for piece in token_bytes], dtype=np.int64)

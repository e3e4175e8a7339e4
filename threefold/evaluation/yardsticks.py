"""What a language model must beat: the same held-out text in bits per byte, by counting and by compressing.

Decisions:
- Every figure is for the same bytes, so that it can stand in one table with a model's bits per byte. Counting models
  see documents framed as the language model does and pay for the end of each document too.
- Counting models are interpolated by Witten and Bell's rule (IEEE Trans. Inf. Theory 37(4), 1991): an order with c
  observations of T distinct followers gets the weight c / (c + T), the rest goes to the next lower order, and last to
  the uniform distribution. There is nothing to tune, so nothing can be tuned on the held-out text.
- A compressor is given the held-out text alone (`gzip`, `xz`), which is what it is made for, and after the end of the
  training text (`gzip primed`: the 32 KiB that its window holds, as a preset dictionary; `xz primed`: size of the end
  of the training text and the held-out text together, less the size of the former alone), which is the fairer opponent
  of a trained model.
- All of it is counting, sorting and looking up in numpy: about a second for 2 MB of text. Of a large training text the
  counting models see whole documents spread evenly over it, about TRAIN_BYTES of them; the held-out text is always all
  of it.
"""

from __future__ import annotations

import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from threefold.data.shards import Shards

TRAIN_BYTES = 6_000_000
DENSE = 2**25                # n-grams that are counted in a table with a place for each
PRIMING_BYTES = 2**19  # of training text shown to xz: enough to help, small enough to be quick
GZIP_WINDOW = 2**15
END = 256  # the symbol that frames a document of bytes


class Pieces(Protocol):
    """What the yardsticks need of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self) -> list[bytes | None]: ...


def yardsticks(shards: Shards, tokenizer: Pieces) -> dict[str, float]:
    """Bits per byte of the held-out part of prepared data, given its training part, by method. Lower is better."""
    table = tokenizer.token_bytes()
    train, validation = (
        _spread(shards.documents("train"), shards.count("train").bytes),
        list(shards.documents("validation")),
    )
    figures = text_yardsticks([_text(ids, table) for ids in train], [_text(ids, table) for ids in validation])
    return figures | token_yardsticks(train, validation, tokenizer.vocab_size, table)


def text_yardsticks(train: Sequence[bytes], validation: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of the UTF-8 texts `validation`, given `train`; no figure where there is nothing to predict."""
    total = sum(map(len, validation))
    if total == 0:
        return {}
    framed_train, framed_validation = _frame(train), _frame(validation)
    figures = {f"byte {name}": ngram_bits(framed_train, framed_validation, order, END + 1) / total
               for name, order in (("unigram", 1), ("bigram", 2), ("4-gram", 4))}
    return figures | compressors(b"".join(train), b"".join(validation))


def token_yardsticks(train: Sequence[np.ndarray], validation: Sequence[np.ndarray], vocab_size: int,
                     token_bytes: Sequence[bytes | None]) -> dict[str, float]:
    """Bits per byte of framed documents of token ids, for counting models over the language model's own tokens."""
    lengths = np.array([len(b or b"") for b in token_bytes])
    total = sum(int(lengths[ids[1:]].sum()) for ids in validation)
    if total == 0:
        return {}
    return {f"token {name}": ngram_bits(train, validation, order, vocab_size) / total
            for name, order in (("unigram", 1), ("bigram", 2))}


def ngram_bits(train: Sequence[np.ndarray], validation: Sequence[np.ndarray], order: int, vocab_size: int) -> float:
    """Bits that an interpolated n-gram model of `train` spends on ids 1, 2, ... of each validation document.

    Contexts never cross a document; near the beginning of one they are as short as they must be.
    """
    assert vocab_size ** order < 2**63, "n-grams are numbered with 63 bits"
    seen, depth = _joined(train)
    asked, asked_depth = _joined(validation)
    predicted = asked_depth >= 1
    probability = np.full(int(predicted.sum()), 1.0 / vocab_size)
    seen_gram, asked_gram = np.zeros_like(seen), np.zeros_like(asked)
    for n in range(1, order + 1):
        # The n-gram that ends at i is numbered by its ids as digits; its context is the (n-1)-gram that ends at i - 1.
        seen_gram = seen_gram + _shifted(seen, n - 1) * vocab_size ** (n - 1)
        asked_gram = asked_gram + _shifted(asked, n - 1) * vocab_size ** (n - 1)
        whole = depth >= max(n - 1, 1)  # id 0 of a document is given, not predicted, so it counts for nothing
        count_of, context_count_of, distinct_of = _count(seen_gram[whole], n, vocab_size)
        wanted = asked_gram[predicted]
        context = wanted // vocab_size
        count, context_count, distinct = count_of(wanted), context_count_of(context), distinct_of(context)
        fits = (context_count > 0) & (asked_depth[predicted] >= n - 1)
        mixed = (count + distinct * probability) / np.maximum(context_count + distinct, 1)
        probability = np.where(fits, mixed, probability)
    return float(-np.log2(probability).sum())


_Look = Callable[[np.ndarray], np.ndarray]


def _count(grams: np.ndarray, n: int, vocab_size: int) -> tuple[_Look, _Look, _Look]:
    """How often an n-gram was seen, how often its context, and with how many different followers."""
    if vocab_size ** n <= DENSE:
        counts = np.bincount(grams, minlength=vocab_size ** n).reshape(-1, vocab_size)
        return counts.ravel().__getitem__, counts.sum(1).__getitem__, (counts > 0).sum(1).__getitem__
    keys, counts = np.unique(grams, return_counts=True)
    contexts, first, followers = np.unique(keys // vocab_size, return_index=True, return_counts=True)
    context_counts = np.add.reduceat(counts, first) if len(first) else first
    return (lambda wanted: _look_up(keys, counts, wanted), lambda wanted: _look_up(contexts, context_counts, wanted),
            lambda wanted: _look_up(contexts, followers, wanted))


def compressors(train: bytes, validation: bytes) -> dict[str, float]:
    """Bits per byte of `validation` by gzip and xz, alone and after the end of `train`."""
    def gzip(primer: bytes) -> int:
        machine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_DEFAULT_STRATEGY, primer) if primer \
            else zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
        return len(machine.compress(validation)) + len(machine.flush())

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_ALONE, preset=6))

    tail = train[-PRIMING_BYTES:]
    sizes = {
        "gzip": gzip(b""),
        "gzip primed": gzip(tail[-GZIP_WINDOW:]),
        "xz": xz(validation),
        "xz primed": xz(tail + validation) - xz(tail),
    }
    return {name: 8 * size / len(validation) for name, size in sizes.items()}


def _spread(documents: Iterable[np.ndarray], size: int) -> list[np.ndarray]:
    """Every k-th document, so that about TRAIN_BYTES remain; the end of a single large one."""
    chosen = list(itertools.islice(documents, 0, None, max(1, -(-size // TRAIN_BYTES))))
    if len(chosen) == 1 and size > TRAIN_BYTES:
        chosen[0] = chosen[0][-max(1, len(chosen[0]) * TRAIN_BYTES // size):]
    return chosen


def _text(ids: np.ndarray, table: Sequence[bytes | None]) -> bytes:
    return b"".join([table[i] or b"" for i in ids.tolist()])


def _frame(texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.concatenate(([END], np.frombuffer(text, np.uint8), [END])) for text in texts]


def _joined(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All ids in one int64 array, and how many ids of the same document stand before each."""
    ids = np.concatenate([np.asarray(d, np.int64) for d in documents]) if len(documents) else np.zeros(0, np.int64)
    lengths = np.array([len(d) for d in documents], np.int64)
    return ids, np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _shifted(ids: np.ndarray, by: int) -> np.ndarray:
    return np.concatenate((np.zeros(min(by, len(ids)), np.int64), ids[:max(len(ids) - by, 0)]))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the places of `wanted` in the sorted `keys`; 0 where there is none."""
    if len(keys) == 0:
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)

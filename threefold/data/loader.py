"""Batches as a pure function of (data fingerprint, seed, step).

Decisions:
- The train stream of a source, T tokens, is a ring of M = T - 1 places; at place p stands token p, and what is to be
  predicted there is token p + 1. An epoch cuts the ring into ceil(M / context) samples, from an offset that is keyed on
  the epoch, so that the cuts fall elsewhere each time. So every token that has a predecessor in its document is a
  target exactly once in an epoch: nothing is dropped at the end, and nothing is padded but the end of the last sample.
- A row may hold pieces of several documents. `documents` and `positions` tell them apart; where every row lies in one
  piece both are None, and attention needs no mask.
- The loader's state is one integer, the step, and nothing is kept between batches, so threads share a loader freely.
  Workers, micro-batches, ranks and resuming only choose which rows of which step are computed where, and a row does not
  depend on that choice.
- The loader knows of no objective: it cuts rows, and an `example` that is handed in makes of them what is learnt from.
- Workers are threads: the work is NumPy on mapped files, and threads need no `/dev/shm`, no fork and no pickling.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from threefold import seeds
from threefold.data.mixture import Slots, mixture
from threefold.data.shards import Shards
from threefold.data.stream import TokenStream
from threefold.errors import DataError, UsageError

IGNORED = -100

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens (B batch, T target length; S source length where a text is read and another written).

    As the loader cuts them, `labels` are those of a causal model, already shifted: `labels[b, t]` is the token that follows
    `input_ids[b, t]` in its document, or -100, and `lengths` says how many places of a row hold text. An objective makes its
    example of it: other labels, and what a model takes besides. `documents` numbers the pieces of documents within each
    row, 0 1 2 ..., and `positions` counts from the start of each piece; both are None where every row is one piece.
    `samples` name the rows (see `Loader.describe`), `sources` their sources. `bytes` is the UTF-8 length of the labels'
    text where it is needed (validation), else 0.
    """

    input_ids: torch.Tensor                 # (B, T) int64; (B, S) where labels are another text
    labels: torch.Tensor                    # (B, T) int64
    documents: torch.Tensor | None          # (B, T) int32
    positions: torch.Tensor | None          # (B, T) int64
    samples: Ints                           # (B,)
    sources: Ints                           # (B,)
    bytes: int = 0
    lengths: Ints | None = None             # (B,)
    attention_mask: torch.Tensor | None = None  # (B, S) int64: 1 where there is text; None: everywhere
    types: torch.Tensor | None = None       # (B, T) int64: the kind of segment
    pairs: torch.Tensor | None = None       # (B,) int64: 0 where the second segment follows the first, 1 where not
    draws: torch.Tensor | None = None       # (B, T) float64 in [0, 1): what is drawn at a place

    def __len__(self) -> int:
        return len(self.input_ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name; each has a row for every row of the batch."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device; itself where they are there."""
        if self.input_ids.device == device:
            return self
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator[Batch]:
        """The rows in pieces of at most `size`, in order, each as `Loader.batch` would cut those rows."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            part: dict[str, Any] = {name: tensor[rows] for name, tensor in self.tensors().items()}
            if "documents" in part and not bool(part["documents"].any()):
                part |= {"documents": None, "positions": None}
            yield replace(self, **part, samples=self.samples[rows], sources=self.sources[rows], bytes=0,
                          lengths=None if self.lengths is None else self.lengths[rows])


class Batches(Protocol):
    """Where batches come from: `batch(step)` is a function of the step alone, cut ahead by `follow`."""

    seed: int
    notes: list[str]

    @property
    def tokens_per_step(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def follow(self, steps: Iterable[int], workers: int = 1) -> Iterator[tuple[int, Batch]]: ...

    def describe(self, sample: int) -> dict[str, Any]: ...


Example = Callable[[Batch, Callable[[Ints], Batch]], Batch]  # of rows, and of what gives further rows by their names


class Loader:
    """Cuts samples of `context` tokens from shards, `batch_size` a step.

    The order depends on (data fingerprint, seed) alone. Without `shares` every sample of every source is one of the epoch. Raises
    `DataError` where there is nothing to predict, and `ConfigError` for shares that cannot be kept. `notes` holds what a user should be told about
    the fit of data and context.
    """

    def __init__(self, shards: Shards, context: int, batch_size: int, seed: int, split: str = "train", *,
                 example: Example | None = None, shares: bool = True) -> None:
        for name, value in (("context", context), ("batch size", batch_size)):
            if value < 1:
                raise UsageError(f"the {name} is {value}", hint="it must be 1 or more")
        self.shards, self.context, self.batch_size, self.seed, self.split = shards, context, batch_size, seed, split
        self.names = [source.name for source in shards.sources]
        self._streams = [shards.stream(split, source) for source in range(len(self.names))]
        self._rings = np.asarray([max(len(stream) - 1, 0) for stream in self._streams], dtype=np.int64)
        self._samples = -(-self._rings // context)
        self._first_id = np.cumsum([0, *self._samples])
        self.samples = int(self._first_id[-1])
        if not self.samples:
            raise DataError(f"the {split} part of `{shards.directory}` holds nothing to predict: "
                            f"{sum(len(stream) for stream in self._streams)} tokens",
                            hint="add text: a single token has no successor")
        self._mixture = mixture(self.names, [source.share if shares else None for source in shards.sources],
                                [int(n) for n in self._samples], shards.fingerprint, seed)
        self._filler, self._example = shards.filler_id, example
        self.notes = self._fit()

    # How much there is

    @property
    def epoch_steps(self) -> int:
        """Steps until as many samples are taken as the data holds (with shares, not the same ones)."""
        return math.ceil(self.samples / self.batch_size)

    @property
    def tokens_per_step(self) -> int:
        """Places in a batch: batch size x context."""
        return self.batch_size * self.context

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self.shards.vocab_size

    # Batches

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or some rows of it (`rows=slice(a, b)`)."""
        start, stop, stride = (rows or slice(None)).indices(self.batch_size)
        numbers = step * self.batch_size + np.arange(start, stop, stride, dtype=np.int64)
        if step < 0 or not numbers.size:
            raise UsageError(f"rows {start}:{stop}:{stride} of step {step} hold no sample",
                             hint=f"a step has the rows 0 to {self.batch_size - 1}")
        return self._made(self._mixture.slots(numbers))

    def follow(self, steps: Iterable[int], workers: int = 1) -> Iterator[tuple[int, Batch]]:
        """(step, batch) along any steps, in the order given, cut ahead by `workers` threads: a run that skips some
        steps says which ones.

        With 0 workers, or where the system gives no thread, batches are cut when asked for. The result is the same.
        """
        return ahead(self.batch, steps, workers)

    # Where a sample comes from

    def describe(self, sample: int) -> dict[str, Any]:
        """What a sample id names: source, epoch, sample, the ranges of tokens it covers and their documents."""
        epoch, place = divmod(int(sample), self.samples)
        source = int(np.searchsorted(self._first_id, place, side="right")) - 1
        number = place - int(self._first_id[source])
        ring, stream = int(self._rings[source]), self._streams[source]
        first = self._offset(source, epoch) + number * self.context
        length = min(self.context, ring - number * self.context)
        first %= ring
        ranges = [(first, min(first + length, ring))]
        if first + length > ring:
            ranges.append((0, first + length - ring))
        documents = [(stream.document_at(start), stream.document_at(stop - 1)) for start, stop in ranges]
        return {"source": self.names[source], "epoch": epoch, "sample": number, "tokens": ranges,
                "documents": documents}

    # How a sample is cut

    def _offset(self, source: int, epoch: int) -> int:
        """Where the ring of a source is cut open in an epoch."""
        return seeds.key(self.seed, "offset", self.shards.fingerprint, source, epoch) % int(self._rings[source])

    def _made(self, slots: Slots) -> Batch:
        """The rows of some slots as the objective wants them."""
        batch = self._cut(slots)
        return batch if self._example is None else self._example(batch, self._named)

    def _named(self, samples: Ints) -> Batch:
        """The rows that some numbers name (any numbers: they are taken modulo what there is), as the loader cuts them."""
        epoch_B, place_B = np.divmod(samples, self.samples)
        source_B = np.searchsorted(self._first_id, place_B, side="right") - 1
        return self._cut(Slots(source_B, np.abs(epoch_B), place_B - self._first_id[source_B]))

    def _cut(self, slots: Slots) -> Batch:
        """Gather the rows of some slots; all arrays are (B, T) but for those that end in _B."""
        ids = np.full((len(slots.source), self.context), self._filler, dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        border = np.zeros(ids.shape, dtype=bool)
        lengths_B = np.full(len(ids), self.context, dtype=np.int64)
        for source in np.unique(slots.source):
            rows_B = np.flatnonzero(slots.source == source)
            epoch_B, sample_B = slots.epoch[rows_B], slots.sample[rows_B]
            epochs, which_B = np.unique(epoch_B, return_inverse=True)
            offset_B = np.asarray([self._offset(int(source), int(epoch)) for epoch in epochs], dtype=np.int64)[which_B]
            ring = int(self._rings[source])
            first_B = (offset_B + sample_B * self.context) % ring
            length_B = lengths_B[rows_B] = np.minimum(ring - sample_B * self.context, self.context)
            if len(rows_B) == len(ids):
                _fill(self._streams[source], ring, first_B, length_B, ids, labels, border)
            else:
                part = ids[rows_B], labels[rows_B], border[rows_B]
                _fill(self._streams[source], ring, first_B, length_B, *part)
                ids[rows_B], labels[rows_B], border[rows_B] = part
        documents, positions = pieces(border)
        names = slots.epoch * self.samples + self._first_id[slots.source] + slots.sample
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), documents, positions, names, slots.source,
                     lengths=lengths_B)

    def _fit(self) -> list[str]:
        notes = []
        for name, ring in zip(self.names, self._rings, strict=True):
            if 0 < ring < self.context:
                notes.append(f"`{name}` holds {ring + 1} tokens, fewer than a context of {self.context}: "
                             f"{self.context - ring} places of each of its samples stay empty")
        if self.samples < self.batch_size:
            notes.append(f"the data holds {self.samples} samples of {self.context} tokens, fewer than a batch of "
                         f"{self.batch_size}: a step goes through it {self.batch_size / self.samples:.1f} times")
        return notes


def ahead(batch: Callable[[int], Batch], steps: Iterable[int], workers: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch(step)) along any steps, made ahead by `workers` threads; with 0, or where the system gives no thread,
    when they are asked for."""
    coming = iter(steps)
    waiting: deque[tuple[int, Future[Batch] | None]] = deque()
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="threefold-data")
    try:
        while True:
            for step in itertools.islice(coming, max(2 * workers - len(waiting), 0 if waiting else 1)):
                future = None
                if workers:
                    try:
                        future = pool.submit(batch, step)
                    except RuntimeError:        # "can't start new thread"
                        workers = 0
                waiting.append((step, future))
            if not waiting:
                return
            step, future = waiting.popleft()
            yield step, batch(step) if future is None else future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def pieces(border: npt.NDArray[np.bool_]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`documents` and `positions` (B, T) from where a new piece begins within a row; (None, None) where none does."""
    if not border.any():
        return None, None
    place = np.arange(border.shape[1], dtype=np.int64)
    begin = np.maximum.accumulate(np.where(border, place, 0), axis=1)
    return torch.from_numpy(np.cumsum(border, axis=1, dtype=np.int32)), torch.from_numpy(place - begin)


def _fill(stream: TokenStream, ring: int, first_B: Ints, length_B: Ints, ids: Ints, labels: Ints,
          border: npt.NDArray[np.bool_]) -> None:
    """Fill the rows that begin at `first_B` on a ring of `ring` places and have `length_B` of them; the rest stays."""
    context = ids.shape[1]
    short = bool((length_B < context).any())
    wrapped_B = np.flatnonzero(first_B + length_B > ring)
    place = first_B[:, None] + np.arange(context, dtype=np.int64)
    if wrapped_B.size or short:
        place %= ring
    found, following = stream.take(place), stream.take(place + 1)
    if short:
        beyond = np.arange(context) >= length_B[:, None]
        found[beyond], following[beyond] = ids[beyond], IGNORED
    ids[:], labels[:] = found, following

    # A document's first token follows nothing: the place before it predicts nothing, and a piece begins with it.
    row, column = _starts(stream.starts, first_B, np.minimum(first_B + length_B, ring))
    labels[row, column - 1] = IGNORED
    inside = column < length_B[row]
    border[row[inside], column[inside]] = True
    if wrapped_B.size:
        turn_B = ring - first_B[wrapped_B]
        border[wrapped_B, turn_B] = True
        row, column = _starts(stream.starts, np.zeros_like(turn_B), length_B[wrapped_B] - turn_B)
        labels[wrapped_B[row], turn_B[row] + column - 1] = IGNORED
        inside = turn_B[row] + column < length_B[wrapped_B[row]]
        border[wrapped_B[row[inside]], (turn_B[row] + column)[inside]] = True
    if short:
        rows = np.flatnonzero(length_B < context)
        border[rows, length_B[rows]] = True


def _starts(starts: Ints, first_B: Ints, last_B: Ints) -> tuple[Ints, Ints]:
    """Every document start in (first, last] of each row, as (row, place within the row)."""
    low_B, high_B = np.searchsorted(starts, first_B, side="right"), np.searchsorted(starts, last_B, side="right")
    count_B = high_B - low_B
    row = np.repeat(np.arange(len(first_B)), count_B)
    number = np.arange(len(row)) - np.repeat(np.cumsum(count_B) - count_B, count_B) + low_B[row]
    return row, starts[number] - first_B[row]

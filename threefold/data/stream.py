"""A token stream: the ids of one source and split on disk, end to end, and where each document starts.

Decisions:
- The files are memory-mapped and read where they lie; opening a terabyte costs nothing, and the mapping outlives its
  file descriptor, so that a process which runs out of descriptors goes on reading.
- A stream may lie in several files. All but the last hold `part_tokens` tokens, so that the file of a token is
  a division.
- An open stream is plain data without a cursor: threads may read it side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from threefold.errors import DamagedData

Ids = npt.NDArray[np.int64]


def map_file(path: Path, dtype: str) -> npt.NDArray[np.generic]:
    """The content of a file as a read-only array, mapped; an empty file gives an empty array."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except (OSError, ValueError) as error:
        raise DamagedData(f"cannot open `{path}`: {error}",
                          hint="prepare the data again, or restore the file") from error


class TokenStream:
    """The tokens of one source and split.

    `len(stream)` is the number of tokens, `starts` the position of the first token of each document, ascending from 0.
    """

    def __init__(self, parts: Sequence[npt.NDArray[np.generic]], starts: npt.ArrayLike, part_tokens: int) -> None:
        self.parts = list(parts)
        self.part_tokens = part_tokens
        self.tokens = sum(len(part) for part in self.parts)
        # As signed integers: NumPy turns uint64 mixed with int64 into float64, which cannot hold every position.
        self.starts: Ids = np.asarray(starts).astype(np.int64, copy=False)

    def __len__(self) -> int:
        return self.tokens

    @property
    def documents(self) -> int:
        """How many documents the stream holds."""
        return len(self.starts)

    def take(self, positions: Ids) -> Ids:
        """The ids at `positions`, an int64 array of any shape with values in [0, len(self))."""
        if len(self.parts) == 1:
            return self.parts[0].take(positions).astype(np.int64)
        part, within = np.divmod(positions, self.part_tokens)
        ids = np.empty(positions.shape, dtype=np.int64)
        for number in np.unique(part):
            here = part == number
            ids[here] = self.parts[number].take(within[here])
        return ids

    def slice(self, start: int, stop: int) -> Ids:
        """The ids of [start, stop) in one piece."""
        pieces = []
        while start < stop:
            part, within = divmod(start, self.part_tokens)
            end = min(stop, (part + 1) * self.part_tokens)
            pieces.append(self.parts[part][within:within + end - start].astype(np.int64))
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *pieces])

    def document_at(self, position: int) -> int:
        """The number of the document that a token belongs to."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def bounds(self, document: int) -> tuple[int, int]:
        """Where a document lies: its first position and the one after its last."""
        last = document + 1 == len(self.starts)
        return int(self.starts[document]), self.tokens if last else int(self.starts[document + 1])

    def document(self, number: int) -> Ids:
        """The ids of one document, with the special tokens that frame it."""
        return self.slice(*self.bounds(number))

    def __iter__(self) -> Iterator[Ids]:
        """All documents, one after another."""
        return (self.document(number) for number in range(len(self.starts)))

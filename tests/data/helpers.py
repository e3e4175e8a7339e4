"""Shards in memory, for tests that need streams and no disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from threefold import files
from threefold.data.manifest import Manifest, Part, SourceEntry
from threefold.data.shards import Shards
from threefold.data.stream import TokenStream


class Codes:
    """A tokenizer whose ids are code points, framed with 1."""

    bos_id = eos_id = 1

    def __init__(self, vocab_size: int = 2**16) -> None:
        self.vocab_size, self.fingerprint = vocab_size, f"codes-{vocab_size}"

    def encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The framed ids of each text."""
        return [np.asarray([1, *map(ord, text), 1], dtype=np.int32) for text in texts]

    def save(self, folder: Path) -> None:
        """Write what a tokenizer writes: files of any name."""
        files.write_file(folder / "tokenizer.json", f'{{"vocab_size": {self.vocab_size}}}')


Documents = Sequence[Sequence[int]]


def stream_of(documents: Documents, part_tokens: int = 2**28) -> TokenStream:
    """A token stream over `documents`, in files of `part_tokens`."""
    lengths = np.asarray([len(document) for document in documents], dtype=np.int64)
    ids = np.concatenate([np.empty(0, dtype=np.uint16), *(np.asarray(d, dtype=np.uint16) for d in documents)])
    parts = [ids[start:start + part_tokens] for start in range(0, len(ids), part_tokens)]
    return TokenStream(parts, np.cumsum(lengths) - lengths, part_tokens)


def shards_of(*sources: Documents, shares: Sequence[float | None] | None = None,
              validation: Sequence[Documents] | None = None, part_tokens: int = 2**28) -> Shards:
    """Shards with the given documents (framed ids) as train part of each source."""
    streams, entries = {}, []
    for index, documents in enumerate(sources):
        sides = {"train": documents, "validation": validation[index] if validation else []}
        for split, side in sides.items():
            streams[split, index] = stream_of(side, part_tokens)
        parts = {split: Part(len(side), sum(map(len, side)), 0, 0) for split, side in sides.items()}
        entries.append(SourceEntry(f"source-{index}", shares[index] if shares else None, [], **parts))
    fingerprint = hashlib.sha256(repr(sources).encode()).hexdigest()
    manifest = Manifest(1, "<u2", part_tokens, 2**16, 1, 1, "", {}, "", entries, {}, fingerprint, [], {})
    return Shards(Path("memory"), manifest, streams)


def numbered(*lengths: int, first: int = 100) -> list[list[int]]:
    """Documents of the given lengths whose ids are all different, so that an id names its place."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents

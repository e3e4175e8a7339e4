"""Cleaned documents, once through: encoded, spooled to disk, and divided into train and validation.

Decisions:
- One pass over the text. The ids of all documents go to a spool file in reading order; what stays in memory is a row
  of numbers for each document. The split is decided at the end, when the size of the corpus is known, and the streams
  are copied from the spool.
- A single document is cut in two by character, and each half is then a document of its own, framed with the
  tokenizer's special tokens: the model sees that the text begins and ends there, on both sides alike.
- The sources are one corpus, divided as one, unless shares were given: then each source is divided by itself, so that
  none of them ends up wholly on one side.
- Documents are put on a side by the hash of their content: two equal documents cannot come to stand on both sides, in
  whichever order or folder they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from threefold import files
from threefold.data.stream import map_file
from threefold.errors import TokenizerError

Progress = Callable[[int, int], None]

_BUFFERED = 2**22           # characters encoded in one call
_COPIED = 2**20             # tokens copied at a time
OVERSHOOT = 2               # times what is held out, that a document may have to be held out


class Encoder(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode_documents(self, texts: Sequence[str]) -> Sequence[npt.NDArray[np.int32]]:
        """The ids of each text, with the special tokens that frame it."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        ...


@dataclass
class Corpus:
    """What is known of each document of a corpus, in reading order; `spool` holds the ids."""

    spool: Path
    dtype: str
    source: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)             # bytes of text in UTF-8
    side: list[bool | None] = field(default_factory=list)       # whether in validation; None while undecided

    def chosen(self, source: int, validation: bool) -> npt.NDArray[np.bool_]:
        """For each document whether it belongs to a source and side."""
        side = np.asarray(self.side, dtype=np.bool_)
        chosen: npt.NDArray[np.bool_] = (np.asarray(self.source) == source) & (side == validation)
        return chosen

    def ids(self, source: int, validation: bool) -> Iterator[npt.NDArray[np.generic]]:
        """The ids of one source and side, in pieces; neighbouring documents are copied together."""
        spool = map_file(self.spool, self.dtype)
        places = np.cumsum([0, *self.tokens])
        edges = np.flatnonzero(np.diff(self.chosen(source, validation).astype(np.int8), prepend=0, append=0))
        for first, last in edges.reshape(-1, 2):
            for begin in range(places[first], places[last], _COPIED):
                yield spool[begin:min(begin + _COPIED, places[last])]


def content_hash(encoded: bytes) -> bytes:
    """The hash by which a document is known: SHA-256 of its cleaned text, `encoded` in UTF-8."""
    return hashlib.sha256(encoded).digest()


def cut(text: str, fraction: float) -> tuple[str, str]:
    """A single document in two: train, and the last `fraction` of its characters for validation."""
    place = int((1 - fraction) * len(text))
    return text[:place], text[place:]


def validation_of(hashes: Sequence[bytes], characters: Sequence[int], fraction: float) -> list[bool]:
    """For each of several documents whether it is for validation.

    They are taken in order of their hash until `fraction` of the characters is reached: at least one, never all, and
    equal hashes together. One that is more than twice as long as all that is wanted is passed over, unless none is shorter: a novel
    beside some notes would be most of the text. With a fraction of 0 none is taken.
    """
    order = sorted(range(len(hashes)), key=lambda i: hashes[i])
    wanted = fraction * sum(characters)
    longest = max(OVERSHOOT * wanted, min(characters, default=0))
    spared = hashes[order[-1]] if order and max(characters) <= longest else None  # where there are longer ones, those are
    taken, side = 0, [False] * len(hashes)
    for place, i in enumerate(order):
        if characters[i] > longest:
            continue
        if place and hashes[i] == hashes[order[place - 1]]:
            side[i] = side[order[place - 1]]
        elif hashes[i] != spared:
            side[i] = taken < wanted
        taken += characters[i]
    return side


def encode_corpus(documents: Iterable[tuple[int, str]], tokenizer: Encoder, spool: Path, *, fraction: float,
                  group_of: Callable[[int], int], progress: Progress | None = None) -> Corpus:
    """Encode `(source, text)` documents into `spool` and decide the side of each.

    `group_of(source)` says which corpus a source belongs to; the documents of a group come one after another.
    `progress(documents, characters)` is called now and then. Raises `TokenizerError` for an id beyond the vocabulary.
    """
    corpus = Corpus(spool, "<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    def fill(writer: files.Writer) -> None:
        waiting: list[str] = []
        size = characters = 0

        def add(source: int, text: str, side: bool | None = None) -> None:
            nonlocal size
            if text:
                encoded = text.encode()
                corpus.source.append(source)
                corpus.characters.append(len(text))
                corpus.sizes.append(len(encoded))
                corpus.hashes.append(content_hash(encoded))
                corpus.side.append(side)
                waiting.append(text)
                size += len(text)
                if size >= _BUFFERED:
                    flush()

        def flush() -> None:
            nonlocal size, characters
            if waiting:
                documents = tokenizer.encode_documents(waiting)
                corpus.tokens.extend(len(ids) for ids in documents)
                ids = np.concatenate(documents)
                _check_ids(ids, tokenizer.vocab_size)
                writer.write(ids.astype(corpus.dtype).data)
            waiting.clear()
            characters, size = characters + size, 0
            if progress is not None:
                progress(len(corpus.tokens), characters)

        held: tuple[int, str] | None = None
        group = first = -1
        for source, text in documents:
            if group_of(source) != group:
                _end_group(corpus, held, first, fraction, add)
                group, first, held = group_of(source), len(corpus.source), (source, text)
                continue
            if held is not None:
                add(*held)
                held = None
            add(source, text)
        _end_group(corpus, held, first, fraction, add)
        flush()

    files.write_file(spool, fill, sync=False)
    return corpus


def _end_group(corpus: Corpus, held: tuple[int, str] | None, first: int, fraction: float,
               add: Callable[[int, str, bool], None]) -> None:
    """Divide the corpus that begins with document `first`, or consists of the one document that is `held`."""
    if held is not None:
        source, text = held
        train, validation = cut(text, fraction)
        add(source, train, False)
        add(source, validation, True)
    elif first >= 0:
        corpus.side[first:] = validation_of(corpus.hashes[first:], corpus.characters[first:], fraction)


def _check_ids(ids: npt.NDArray[Any], vocab_size: int) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise TokenizerError(f"the tokenizer gave the id {wrong} and says that it has "
                             f"{vocab_size} ids",
                             hint="the tokenizer's files do not fit together: train or fetch it again")

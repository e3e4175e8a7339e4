"""Documents that are equal, or nearly equal.

Decisions:
- Equal means equal in every character, by a 128-bit BLAKE2b hash.
- Nearly equal means that the sets of runs of five words have a Jaccard similarity of 0.8 or more. Case and punctuation
  in ASCII are not looked at, nor are texts of fewer than 50 words: short texts resemble each other without being
  copies.
- MinHash by one permutation: each run of words is hashed once, the hash's upper bits choose one of 120 bins, and the
  smallest hash of a bin is its value (Li, Owen, Zhang 2012, arXiv:1208.1259); an empty bin borrows from another that
  only its number decides (Shrivastava 2017, arXiv:1703.04664). 20 bands of 6 bins find pairs of 0.8 with 99.7 %.
- A pair that was found is confirmed with the 128 smallest hashes of both, which is exact up to 128 runs of words and an
  estimate with a standard error of 0.035 beyond.
- The outcome depends on the documents and their order, never on a seed, a process or a number of workers: the first of
  a group stays. All hashing is arithmetic on whole arrays of bytes.
- The first document is put aside and looked at when a second one comes: a corpus of one document costs nothing.
- Memory is about 1.3 KB for each document of 50 words or more; beyond a million of these later ones are compared with
  the first million.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

MIN_WORDS = 50
SHINGLE = 5
SIMILAR = 0.8
BANDS, ROWS = 20, 6
BINS = BANDS * ROWS
SKETCH = 128
MOST_KEPT = 1_000_000
_SLICE = 2**22  # bytes hashed at a time

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)
_DROP, _SPACE = 255, 0


def _table() -> npt.NDArray[np.uint8]:
    """What each byte counts as: white space, nothing (punctuation), or itself in lower case."""
    table = np.arange(256, dtype=np.uint8)
    for byte in range(128):
        char = chr(byte)
        table[byte] = _SPACE if char.isspace() else ord(char.lower()) if char.isalnum() or char == "_" else _DROP
    return table


_BYTES = _table()


def _powers(base: int, count: int) -> Hashes:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _mixed(values: Hashes) -> Hashes:
    """SplitMix64's finaliser: every bit of the input reaches every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Powers:
    """Powers of the base and of its inverse, grown as longer texts come."""

    def __init__(self) -> None:
        self.up, self.down = _powers(_BASE, 2**12), _powers(_INVERSE, 2**12)

    def get(self, count: int) -> tuple[Hashes, Hashes]:
        if count > len(self.up):
            count = max(count, 2 * len(self.up))
            self.up, self.down = _powers(_BASE, count), _powers(_INVERSE, count)
        return self.up, self.down


_grown = _Powers()


def word_hashes(text: str) -> Hashes:
    """A 64-bit hash of each word: the polynomial of its bytes, from differences of one running sum."""
    data = text.encode("utf-8", errors="replace")
    parts = []
    start = 0
    while start < len(data):
        end = min(start + _SLICE, len(data))
        while end < len(data) and data[end] not in b" \n\t":  # not inside a word
            end += 1
        parts.append(_slice_hashes(np.frombuffer(data, np.uint8, end - start, start)))
        start = end
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _slice_hashes(raw: npt.NDArray[np.uint8]) -> Hashes:
    coded = _BYTES[raw]
    coded = coded[coded != _DROP]
    inside = coded != _SPACE
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    up, down = _grown.get(len(coded) + 1)
    sums = np.zeros(len(coded) + 1, np.uint64)
    np.cumsum(coded.astype(np.uint64) * up[: len(coded)], out=sums[1:])
    return _mixed((sums[ends] - sums[starts]) * down[starts])


def shingles(text: str) -> Hashes:
    """The sorted, distinct hashes of all runs of five words; empty for a text of fewer than 50 words."""
    if len(text) < 2 * MIN_WORDS - 1:
        return np.zeros(0, np.uint64)
    words = word_hashes(text)
    if len(words) < MIN_WORDS:
        return np.zeros(0, np.uint64)
    count = len(words) - SHINGLE + 1
    total = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        total = total * np.uint64(_BASE) + words[place : place + count]
    return np.unique(_mixed(total))


def _signature(hashes: Hashes) -> Hashes:
    """The smallest hash in each bin, (BINS,); empty bins borrow."""
    bins = ((hashes >> np.uint64(32)) * np.uint64(BINS) >> np.uint64(32)).astype(np.int64)
    values = np.zeros(BINS, np.uint64)
    full = np.zeros(BINS, np.bool_)
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    values[bins[first]], full[bins[first]] = hashes[first], True
    attempt = 0
    while not full.all():
        empty = np.flatnonzero(~full)
        attempt += 1
        donors = (_mixed(empty.astype(np.uint64) * np.uint64(1_000_003) + np.uint64(attempt)) % np.uint64(BINS)).astype(
            np.int64
        )
        lent = full[donors]
        values[empty[lent]], now = values[donors[lent]] + np.uint64(attempt), empty[lent]
        full[now] = True
    return values


def _bands(signature: Hashes) -> Hashes:
    rows = signature.reshape(BANDS, ROWS)
    total = np.arange(1, BANDS + 1, dtype=np.uint64)
    for column in range(ROWS):
        total = _mixed(total * np.uint64(_BASE) + rows[:, column])
    return total | np.uint64(1)  # 0 marks a free place of the table


def similarity(a: Hashes, b: Hashes) -> float:
    """Jaccard similarity from the smallest hashes of two sets: the share of the union's smallest that both have."""
    union = np.union1d(a, b)[:SKETCH] if len(a) >= SKETCH or len(b) >= SKETCH else np.union1d(a, b)
    if not len(union):
        return 0.0
    common = np.intersect1d(a, b, assume_unique=True)
    return float(np.count_nonzero(common <= union[-1])) / len(union)


class NearDuplicates:
    """Remembers what it was shown; says whether a text nearly equals an earlier one."""

    def __init__(self) -> None:
        self._sketches: list[npt.NDArray[np.uint32]] = []
        self._keys = np.zeros(2**12, np.uint64)  # open addressing: band -> number of the document
        self._values = np.zeros(2**12, np.uint32)
        self._used = 0

    def seen(self, text: str) -> bool:
        """Whether a text of at least 50 words nearly equals one that was shown before; if not, it is remembered."""
        hashes = shingles(text)
        if not len(hashes):
            return False
        bands = _bands(_signature(hashes))
        sketch = (hashes[:SKETCH] >> np.uint64(32)).astype(np.uint32)
        for number in np.unique(self._look_up(bands)).tolist():
            if similarity(sketch.astype(np.uint64), self._sketches[number].astype(np.uint64)) >= SIMILAR:
                return True
        if len(self._sketches) < MOST_KEPT:
            self._insert(bands, len(self._sketches))
            self._sketches.append(sketch)
        return False

    def _places(self, bands: Hashes) -> npt.NDArray[np.int64]:
        """For each key its place in the table, or the free place where it belongs."""
        mask = np.uint64(len(self._keys) - 1)
        places = (bands >> np.uint64(20)) & mask
        while True:
            there = self._keys[places]
            wrong = (there != bands) & (there != 0)
            if not wrong.any():
                return places.astype(np.int64)
            places[wrong] = (places[wrong] + np.uint64(1)) & mask

    def _look_up(self, bands: Hashes) -> npt.NDArray[np.uint32]:
        places = self._places(bands)
        found: npt.NDArray[np.uint32] = self._values[places[self._keys[places] != 0]]
        return found

    def _insert(self, bands: Hashes, number: int) -> None:
        if 2 * (self._used + BANDS) > len(self._keys):
            there = self._keys != 0
            keys, values = self._keys[there], self._values[there]
            self._keys, self._values = np.zeros(4 * len(there), np.uint64), np.zeros(4 * len(there), np.uint32)
            self._used = 0
            self._put(keys, values)
        self._put(bands, np.full(BANDS, number, np.uint32))

    def _put(self, keys: Hashes, values: npt.NDArray[np.uint32]) -> None:
        """Enter keys; one that is there keeps its value. Of keys that want the same free place the first has it."""
        while len(keys):
            places = self._places(keys)
            free = self._keys[places] == 0
            keys, values, places = keys[free], values[free], places[free]
            taken, first = np.unique(places, return_index=True)
            self._keys[taken], self._values[taken] = keys[first], values[first]
            self._used += len(taken)
            rest = np.ones(len(keys), np.bool_)
            rest[first] = False
            keys, values = keys[rest], values[rest]


class Duplicates:
    """Exact and near duplicates among documents that come one after another."""

    def __init__(self) -> None:
        self._exact: set[bytes] = set()
        self._near = NearDuplicates()
        self._waiting: tuple[str, bool] | None = None
        self._begun = False

    def check(self, text: str, *, near: bool = True) -> str | None:
        """`exact duplicate`, `near duplicate`, or None for a text that is new and from now on known."""
        if not self._begun:
            self._begun, self._waiting = True, (text, near)
            return None
        if self._waiting is not None:
            (first, first_near), self._waiting = self._waiting, None
            self._look(first, first_near)
        return self._look(text, near)

    def _look(self, text: str, near: bool) -> str | None:
        name = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
        if name in self._exact:
            return "exact duplicate"
        if near and self._near.seen(text):
            return "near duplicate"
        self._exact.add(name)
        return None

"""Which source the next sample comes from: a function of the slot's number, for shares or without.

Decisions:
- A slot is a place in the run: slot g = step * batch size + row. It names a source and a counter, the number of
  earlier slots of that source. Both are computed from g alone, so a loader has nothing to save.
- Without shares the sources are one corpus: an epoch is all samples of all sources in one keyed order, each once.
- With shares the slots repeat a pattern of `PATTERN` slots: each source holds its share of it, rounded by largest
  remainder, in a keyed order. Each source then has epochs of its own, at its own pace, exactly once in each.
- Sources without a share, in a mixture that names some, divide what the named shares leave, by their samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from threefold import seeds
from threefold.data.order import permute
from threefold.errors import ConfigError

PATTERN = 10_000

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slots:
    """What a run of slots holds: for each the source, the epoch of that source, and the sample's number within it."""

    source: Ints
    epoch: Ints
    sample: Ints


class Mixture(Protocol):
    """Slots to samples."""

    def slots(self, numbers: Ints) -> Slots:
        """The samples of the slots `numbers` (N,)."""
        ...


class OneCorpus:
    """All sources as one corpus: an epoch takes every sample of every source once, in one keyed order."""

    def __init__(self, samples: Sequence[int], fingerprint: str, seed: int) -> None:
        self._first = np.cumsum([0, *samples])
        self._total = int(self._first[-1])
        self._names = (seed, "order", fingerprint)

    def slots(self, numbers: Ints) -> Slots:
        epoch, place = np.divmod(numbers, self._total)
        ordered = _ordered(self._total, self._names, epoch, place)
        source = np.searchsorted(self._first, ordered, side="right") - 1
        return Slots(source, epoch, ordered - self._first[source])


class Shares:
    """Sources at fixed shares of the slots, each going through epochs of its own."""

    def __init__(self, samples: Sequence[int], shares: Sequence[float], fingerprint: str, seed: int) -> None:
        self._samples = [int(n) for n in samples]
        self._names = (seed, "order", fingerprint)
        self.counts = np.asarray(largest_remainder(shares, PATTERN), dtype=np.int64)
        kinds = np.repeat(np.arange(len(shares)), self.counts)
        self._pattern = kinds[permute(PATTERN, seeds.key(seed, "mixture", fingerprint), np.arange(PATTERN))]
        self._earlier = np.empty(PATTERN, dtype=np.int64)
        for source in range(len(shares)):
            here = self._pattern == source
            self._earlier[here] = np.arange(int(here.sum()))

    def slots(self, numbers: Ints) -> Slots:
        block, place = np.divmod(numbers, PATTERN)
        source = self._pattern[place]
        epoch, counter = np.divmod(block * self.counts[source] + self._earlier[place],
                                   np.asarray(self._samples, dtype=np.int64)[source])
        sample = np.empty_like(counter)
        for number in np.unique(source):
            here = source == number
            names = (*self._names, int(number))
            sample[here] = _ordered(self._samples[number], names, epoch[here], counter[here])
        return Slots(source, epoch, sample)


def mixture(names: Sequence[str], shares: Sequence[float | None], samples: Sequence[int], fingerprint: str,
            seed: int) -> Mixture:
    """The mixture for sources called `names` with `shares` (None where none was given) and `samples` an epoch each.

    Raises `ConfigError` for shares that cannot be kept: negative, of a source without samples, too small, or summing
    to 1 or more while another source waits for the rest.
    """
    if all(share is None for share in shares):
        return OneCorpus(samples, fingerprint, seed)
    given = sum(share for share in shares if share is not None)
    rest = sum(n for n, share in zip(samples, shares, strict=True) if share is None)
    problems = []
    for name, share, n in zip(names, shares, samples, strict=True):
        if share is not None and not share >= 0:
            problems.append(f"`{name}` has the share {share}, which is not a number of 0 or more")
        elif share and not n:
            problems.append(f"`{name}` has the share {share} and no text to train on")
    if rest and given >= 1:
        problems.append(f"the shares sum to {given:g}, which leaves nothing for the sources without one")
    if not given > 0 and not rest:
        problems.append("all shares are 0")
    if not problems:
        whole = 1.0 if rest else given
        parts = [share / whole if share is not None else (1 - given) * n / rest if n else 0.0
                 for share, n in zip(shares, samples, strict=True)]
        counts = largest_remainder(parts, PATTERN)
        problems = [f"`{name}` has a share of {part:.2g}, which is less than one sample in {PATTERN}"
                    for name, part, count in zip(names, parts, counts, strict=True) if part > 0 and not count]
    if problems:
        raise ConfigError("; ".join(problems), hint="give every source a share, such as `a.txt:0.7 b.txt:0.3`")
    return Shares(samples, parts, fingerprint, seed)


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share (Hamilton's method; ties go to the first)."""
    exact = [share * total / sum(shares) for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[:total - sum(counts)]:
        counts[i] += 1
    return counts


def _ordered(n: int, names: tuple[int, str, str] | tuple[int, str, str, int], epoch: Ints, place: Ints) -> Ints:
    """The sample at `place` of `epoch` in the keyed order of `n` samples that `names` and the epoch name."""
    if epoch.size and epoch[0] == epoch[-1] and (epoch == epoch[0]).all():
        return permute(n, seeds.key(*names, int(epoch[0])), place)
    result = np.empty_like(place)
    for number in np.unique(epoch):
        here = epoch == number
        result[here] = permute(n, seeds.key(*names, int(number)), place[here])
    return result

"""Guards: a step whose numbers cannot be trusted does not reach the weights.

Decisions:
- Loss and gradient norm are looked at before the optimizer steps; a NaN in one gradient alone shows in the norm.
- The default for a number that is not finite is to stop, with the step, the samples and the batch written beside the
  log: it is a bug or a bad sample, and a person should see it. `nonfinite="skip"` goes on, at most three steps in a
  row.
- A spike is a loss or a norm above mean + 6 standard deviations of the last 128 steps (OLMo-core's constants;
  Groeneveld et al., arXiv:2402.00838). It is logged; `spike="skip"` drops the update, `spike="rollback"` goes back to
  an earlier checkpoint and skips the batches since (PaLM, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from threefold import files
from threefold.data.loader import Batch
from threefold.errors import DiskError
from threefold.model.tensors import write_safetensors

WINDOW = 128
SIGMAS = 6.0
MOST_SKIPS = 3


class SpikeGuard:
    """Mean and deviation of the last 128 losses and gradient norms. Its state is those numbers."""

    def __init__(self) -> None:
        self._history: tuple[deque[float], deque[float]] = (deque(maxlen=WINDOW), deque(maxlen=WINDOW))

    def is_spike(self, loss: float, norm: float) -> bool:
        """Whether this step stands out; needs a full window, so that the fall of the first steps is not noise."""
        return any(_stands_out(value, past) for value, past in zip((loss, norm), self._history, strict=True))

    def add(self, loss: float, norm: float) -> None:
        """Take a step that was applied into the window."""
        for value, past in zip((loss, norm), self._history, strict=True):
            past.append(value)

    def state(self) -> list[list[float]]:
        """The numbers in the window, for the checkpoint."""
        return [list(past) for past in self._history]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        """Take back what `state` gave."""
        for past, values in zip(self._history, state, strict=True):
            past.clear()
            past.extend(values)


def is_finite(*values: float) -> bool:
    """Whether all of them are ordinary numbers."""
    return all(math.isfinite(v) for v in values)


def dump_batch(path: Path, batch: Batch) -> str:
    """Put a batch where a person can look at it; returns words about it. A disk that refuses does not hide the news."""
    tensors = {**batch.tensors(), "samples": torch.from_numpy(batch.samples)}
    try:
        files.make_dirs(path.parent)
        write_safetensors(path, tensors)
    except DiskError as error:
        return f"and the batch could not be written: {error}"
    return f"the batch is in `{path}`"


def _stands_out(value: float, past: deque[float]) -> bool:
    if len(past) < WINDOW:
        return False
    mean = math.fsum(past) / len(past)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in past) / len(past))
    return value > mean + SIGMAS * deviation

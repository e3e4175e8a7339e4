"""Named, stateless random streams.

Decisions:
- No random state is ever stored. A stream is named by what it is for (`"dropout", step`) and made afresh from the
  seed, so that skipping, resuming and rolling back need nothing but integers.
- Names are hashed with BLAKE2b: the same in every process, on every platform and for every `PYTHONHASHSEED`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, *names: str | int) -> int:
    """A 63-bit integer that depends on the seed and on every name, in order."""
    text = "\x1f".join([str(int(seed)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the named stream."""
    return np.random.Generator(np.random.PCG64(key(seed, *names)))


def generator(seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator for the named stream."""
    import torch

    return torch.Generator(device=device).manual_seed(key(seed, *names))

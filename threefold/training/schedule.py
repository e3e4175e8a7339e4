"""Learning-rate schedules as pure functions of progress.

Decisions:
- A schedule maps progress (0 at the first step, 1 after the last) to a factor of the peak rate, so that a run whose
  number of steps is bought by a time budget has the same shape as one whose steps were given.
- Warm-up is counted in steps, not in progress: the first steps are the same whatever is later learnt about the length
  of the run, and it is in them that the length is measured.
- `inverse_sqrt` is that of the Transformer of 2017 (arXiv:1706.03762): it falls with the root of the steps, whatever the end is.
- `wsd` (warm-up, stable, decay; arXiv:2405.18392) keeps the peak until a last fraction: it is what an open end needs.
"""

from __future__ import annotations

import math

KINDS = ("linear", "cosine", "wsd", "inverse_sqrt", "constant")


def factor(kind: str, step: int, total: int | None, *, warmup: int, cooldown: float = 1.0) -> float:
    """The factor of the peak learning rate at `step` of `total` (None: no end is known yet).

    warmup: steps of linear warm-up. cooldown: share of the run that decays (`wsd` alone).
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    if kind == "inverse_sqrt":
        return rise * math.sqrt(max(1, warmup) / max(warmup, step + 1))
    if total is None or kind == "constant":
        return rise
    left = 1.0 - min(1.0, step / max(1, total))  # 1 at the start, 0 at the end
    if kind == "cosine":
        shape = 0.5 - 0.5 * math.cos(math.pi * left)
    elif kind == "wsd":
        shape = min(1.0, left / cooldown) if cooldown > 0 else 1.0
    else:
        shape = left
    return rise * shape

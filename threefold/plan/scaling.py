"""Which model, context and batch suit the compute and the data at hand: the rule behind `--size auto`.

Decisions:
- Compute is steps' worth of floating-point operations: what a budget buys at the speed this machine was measured to have. The rule was
  fitted to runs of 5 to 1,200 seconds on two CPU cores over English, Korean and source code (docs/log.md holds the runs).
- At these scales the best model is larger and sees fewer tokens than the asymptotic law says (Hoffmann et al. 2022,
  arXiv:2203.15556): Muon learns fast per token, and wide matrices use the machine better. The rule bends towards
  that law as compute grows.
- Context starts short: in the first seconds a model learns from its last few dozen characters, and short rows mean more updates.
- The rule gives plain numbers, and the run writes them down as a decision. `--size`, `model.context` and `train.batch_tokens` overrule it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

TERA = 1e12


@dataclass(frozen=True)
class Shape:
    """parameters: inside the blocks. context: tokens in a row. batch_tokens: tokens of one update."""

    parameters: int
    context: int
    batch_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As written in the log."""
        return asdict(self)


def parameters_for(operations: float) -> float:
    """Parameters inside the blocks that make best use of `operations` (floating-point, whole training)."""
    return 0.70e6 * (operations / TERA) ** 0.42


def context_for(operations: float) -> int:
    """Tokens in a row: a power of two between 64 and 1,024, doubling with each fivefold compute."""
    return 2 ** min(10, max(6, round(6 + math.log(max(operations, 1.0) / TERA / 2, 5))))


def batch_for(operations: float) -> int:
    """Tokens of one update, a power of two; grows with the square root of compute (McCandlish et al. 2018, arXiv:1812.06162)."""
    return 2 ** min(16, max(10, round(10 + 0.5 * math.log2(max(operations, 1.0) / TERA / 8))))


def choose(operations: float | None, train_tokens: int) -> Shape:
    """The shape for so much compute; None means: as much as the data deserves (`--until converged`)."""
    if operations is None:
        operations = worth_of(train_tokens)
    context = context_for(operations)
    while context > 64 and context * 8 > train_tokens:
        context //= 2
    return Shape(round(parameters_for(operations)), context, max(context, batch_for(operations)))


def worth_of(train_tokens: int) -> float:
    """Operations that a corpus deserves: about ten epochs of the model that they would pay for."""
    operations = TERA
    for _ in range(50):  # parameters depend on operations: a fixed point, reached quickly because the exponent is below one
        operations = 6 * parameters_for(operations) * 10 * train_tokens
    return operations

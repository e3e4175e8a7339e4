"""A matrix product whose weight follows the activations, and small matrices beside it.

Decisions:
- The weight is stored once, as the master that the optimizer changes, and is cast to the dtype of the activations
  where it is used. There is no autocast: what runs in which precision can be read off the activations alone.
- A product may have a `side`: what an adapter adds to it (lowrank.py). It is None but where one was attached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T + b with W (out, in), computed in the dtype of x. Its values come from first_values.py or from a file.

    parts: row counts of the independent maps that lie under each other in W. ends: it is the last map of a branch.
    """

    folds = True  # whether its weight is a matrix that something may be added to
    side: nn.Module | None
    weight: Tensor

    def __init__(
        self, width_in: int, width_out: int, *, bias: bool = False, parts: tuple[int, ...] = (), ends: bool = False
    ) -> None:
        super().__init__()
        self.parts, self.ends, self.width_in = parts or (width_out,), ends, width_in
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.side = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(x) if self.side is None else self.side(x, self)
        return y

    def plain(self, x: Tensor) -> Tensor:
        """The product without what stands beside it."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

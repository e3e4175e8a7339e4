"""Rows of a batch without what fills them up: tokens side by side (1, N, D) where a layer treats each by itself, and rows (B, T, D)
where attention reads along them.

    rows    a b c . .      flat    a b c d e f g h
            d e f g h

Decisions:
- Only what nobody reads is left out: padding, and in a causal stack what stands behind the last place that is wanted. States of such
  places come back as zeros, and are made nowhere where somebody asked for all states.
- What stands in a row's unused places between the two forms is another token's vector: it is masked as a key, and as a query nobody
  reads it. A copy of a row of numbers is cheaper than zeros that are written first.
- Dropout of a token is the same in both forms (dropout.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from threefold.model.dropout import further
from threefold.model.mask import at_hand

WORTH = 0.95  # of the places; where more are used, leaving out the others gains nothing


class _Move(torch.autograd.Function):
    """Rows of x (N, D) by number, where going back is another choice of numbers: nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, absent: Tensor | None) -> Tensor:
        ctx.there, ctx.back, ctx.absent = there, back, absent
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        found = gradient.index_select(0, ctx.back)
        if ctx.absent is not None:
            found.index_fill_(0, ctx.absent, 0)
        return found, None, None, None


class Layout:
    """Where the N tokens that are computed stand in their rows."""

    def __init__(self, needed_BT: Tensor) -> None:
        self.rows, self.length = needed_BT.shape
        needed = needed_BT.flatten()
        self.places = needed.nonzero()[:, 0]
        self.absent = (~needed).nonzero()[:, 0]
        self.numbers = torch.zeros(len(needed), dtype=torch.int64, device=needed.device)
        self.numbers[self.places] = torch.arange(len(self.places), device=needed.device)

    def flat(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (1, N, D)"""
        moved: Tensor = _Move.apply(x_BTD.reshape(-1, x_BTD.shape[-1]), self.places, self.numbers, self.absent)  # type: ignore[no-untyped-call]
        return moved[None]

    def apart(self, x_1ND: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D), other tokens in the places that are not computed, whose gradient goes nowhere."""
        moved: Tensor = _Move.apply(x_1ND[0], self.numbers, self.places, None)  # type: ignore[no-untyped-call]
        return moved.view(self.rows, self.length, -1)

    def restored(self, x_1ND: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D) with zeros in those places."""
        return self.apart(x_1ND).flatten(0, 1).index_fill(0, self.absent, 0).view(self.rows, self.length, -1)

    def starts(self, starts_B: Tensor, width: int) -> Tensor:
        """(N,) where the bits of each token begin, of the rows' beginnings."""
        return further(starts_B[self.places // self.length], self.places % self.length, width)


def layout_of(wanted_BT: Tensor, attention_mask: Tensor | None, only_B: Tensor | None, *, causal: bool) -> Layout | None:
    """What has to be computed for the states that are wanted; None where that is nearly everything, and where asking makes a
    device wait."""
    if not at_hand(wanted_BT):
        return None
    needed = None if attention_mask is None else attention_mask != 0
    if causal:
        ahead = wanted_BT.ne(0).to(torch.int8).flip(1).cummax(1).values.flip(1) != 0
        needed = ahead if needed is None else needed & ahead
    if needed is not None and only_B is not None:  # it may be padding that a head reads
        needed = needed.scatter(1, only_B[:, None], True)
    if needed is None or float(needed.float().mean()) > WORTH or not bool(needed.any()):
        return None
    return Layout(needed)

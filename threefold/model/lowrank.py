"""The small matrices beside a product (LoRA, arXiv 2106.09685), and the ways of computing both.

    y = x W^T + alpha / rank * (x A^T) B^T        A (rank, in) begins at random, B (out, rank) at zero

Decisions:
- Where W is brought to the dtype of the activations anyway, B A is added to it on the way, and there is one product instead of
  three that are as long as the batch. The gradients of A and B are taken from x and dy as ever: that of W is never made.
- What is dropped of x is dropped in front of A alone: then, beside codes, and where W is used as it lies, both ways stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.model.dropout import dropout, site_keys
from threefold.model.linear import Linear

SITE = 2**20  # of dropout, apart from those of the model


@dataclass(frozen=True)
class Shape:
    """What an adapter is: rank, alpha, dropout."""

    rank: int
    alpha: float
    dropout: float = 0.0


class LowRank(nn.Module):
    """One adapter beside one product: A and B for each part that has one."""

    def __init__(self, parts: Sequence[int], chosen: Sequence[int], width_in: int, shape: Shape, like: Tensor) -> None:
        super().__init__()
        self.parts, self.chosen, self.scale, self.dropout = tuple(parts), tuple(chosen), shape.alpha / shape.rank, shape.dropout
        self.down = nn.ParameterDict({str(n): torch.empty(shape.rank, width_in, dtype=like.dtype, device=like.device) for n in chosen})
        self.up = nn.ParameterDict({str(n): torch.zeros(parts[n], shape.rank, dtype=like.dtype, device=like.device) for n in chosen})

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for number, rows in enumerate(self.parts):
            if number in self.chosen:
                inner: Tensor = F.linear(x, self.down[str(number)].to(x.dtype))
                found.append(F.linear(inner, self.up[str(number)].to(x.dtype)) * self.scale)
            else:
                found.append(x.new_zeros(*x.shape[:-1], rows))
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def matrices(self) -> list[Tensor]:
        """A of each chosen part, then B of each."""
        return [*(self.down[str(n)] for n in self.chosen), *(self.up[str(n)] for n in self.chosen)]

    def product(self, number: int) -> Tensor:
        """What it adds to the weight of a part, in float64."""
        product: Tensor = self.up[str(number)].detach().double() @ self.down[str(number)].detach().double()
        return product * self.scale


class Side(nn.Module):
    """All adapters beside one product; `use` names the one that counts. `keys` are those of the batch's rows, for dropout."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.named = nn.ModuleDict()
        self.use: str | None = None
        self.site = site
        self.keys: Tensor | None = None

    @property
    def drops(self) -> bool:
        """Whether something of its input is dropped in this pass."""
        adapter = self.get(self.use)
        return self.keys is not None and adapter is not None and adapter.dropout > 0

    def get(self, name: str | None) -> LowRank | None:
        """The adapter of a name, where it stands here."""
        found = self.named[name] if name is not None and name in self.named else None
        assert found is None or isinstance(found, LowRank)
        return found

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """The product of x with the weight and the adapter in use."""
        adapter = self.get(self.use)
        if adapter is None:
            return linear.plain(x)
        if self.keys is not None and self.drops:
            return linear.plain(x) + adapter(dropout(x, adapter.dropout, site_keys(self.keys, SITE + self.site)))  # type: ignore[no-any-return]
        if linear.folds and linear.weight.dtype != x.dtype and not linear.weight.requires_grad:
            whole: Tensor = _Folded.apply(x, linear.weight, linear.bias, adapter, *adapter.matrices())  # type: ignore[no-untyped-call]
            return whole
        return linear.plain(x) + adapter(x)  # type: ignore[no-any-return]


class _Folded(torch.autograd.Function):
    """x (W + s B A)^T, the sum in the dtype of W. The matrices are A of each part that has one, then B of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank, *matrices: Tensor) -> Tensor:
        found = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        pairs = dict(zip(adapter.chosen, zip(matrices[:len(matrices) // 2], matrices[len(matrices) // 2:], strict=True), strict=True))
        for number, (into, part) in enumerate(zip(torch.split(found, list(adapter.parts)), torch.split(weight, list(adapter.parts)), strict=True)):
            into.copy_(part if number not in pairs else torch.addmm(part, pairs[number][1], pairs[number][0], alpha=adapter.scale))
        ctx.save_for_backward(x, found, *matrices)
        ctx.adapter, ctx.biased = adapter, bias is not None and bias.requires_grad
        return F.linear(x, found, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, found, *matrices = ctx.saved_tensors
        downs, ups = (torch.cat(matrices[:len(matrices) // 2]), matrices[len(matrices) // 2:])
        x_NI, dy_NO, adapter = x.flatten(0, -2), dy.flatten(0, -2), ctx.adapter
        parts = [part for number, part in enumerate(torch.split(dy_NO, list(adapter.parts), 1)) if number in adapter.chosen]
        inner = (x_NI @ downs.to(x.dtype).T).split([up.shape[1] for up in ups], 1)
        back = torch.cat([part @ up.to(x.dtype) for part, up in zip(parts, ups, strict=True)], 1)
        d_downs = (back.T @ x_NI).to(downs.dtype).mul_(adapter.scale).split([up.shape[1] for up in ups])
        d_ups = [(part.T @ u).to(up.dtype).mul_(adapter.scale) for part, u, up in zip(parts, inner, ups, strict=True)]
        dx = dy @ found if ctx.needs_input_grad[0] else None
        dbias = dy_NO.sum(0).to(matrices[0].dtype) if ctx.biased else None
        return dx, None, dbias, None, *d_downs, *d_ups

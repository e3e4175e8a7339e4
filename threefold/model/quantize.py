"""Weights in 8 or 4 bits: a base that takes a quarter or a seventh of its memory while adapters beside it learn (QLoRA, arXiv
2305.14314).

    8 bits   one scale a row, symmetric            w ~ code * scale
    4 bits   a scale and a least value for each 64 columns, two codes a byte      w ~ code * scale + least

Decisions:
- The products of the blocks are quantised; embeddings, norms, biases and heads stay as they are.
- A quantised weight is for reading. It is brought back to the dtype of the activations where it is used, in the backward pass
  once more: what is kept between the two is the activations that a product of frozen weights needs, which is none.
- What it costs is measured by whoever quantises, and said (`finetune.py`); nothing is calibrated on data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.errors import ModelError, UsageError
from threefold.model.base import Model
from threefold.model.linear import Linear

BITS = (8, 4)
GROUP = 64  # columns that share a scale in 4 bits, or the largest half of it that divides the width


class Quantized(Linear):
    """A product whose weight is codes: int8 (out, in), or uint8 (out, in / 2) with two to a byte."""

    folds = False
    scale: Tensor
    least: Tensor | None

    def plain(self, x: Tensor) -> Tensor:
        """The product with the weight as its codes have it."""
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), as near as its codes are."""
        if self.least is None:
            return (self.weight * self.scale).to(dtype)
        codes = torch.stack([self.weight & 15, self.weight >> 4], -1).flatten(1)
        grouped = codes.view(len(codes), self.scale.shape[1], -1) * self.scale[..., None] + self.least[..., None]
        return grouped.flatten(1).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T for a weight that is not learnt."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Quantized) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.restored(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight: Tensor = ctx.linear.restored(gradient.dtype)
        return gradient @ weight, None


@torch.no_grad()
def quantize(model: Model, bits: int) -> float:
    """Put the weights of the blocks into 8 or 4 bits, in place; returns the length of what they lost as a share of their own.

    Raises UsageError for another number, ModelError for weights that are not finite or a width that two codes a byte do not
    fill."""
    if bits not in BITS:
        raise UsageError(f"weights of {bits} bits are not known", hint="8 or 4")
    lost = whole = 0.0
    for path, module in model.named_modules():
        if isinstance(module, Linear) and not isinstance(module, Quantized) and ".blocks." in path:
            if not bool(torch.isfinite(module.weight).all()):
                raise ModelError(f"`{path}` holds weights that are not finite: they have no codes")
            before = module.weight
            codes, scale, least = _codes8(before) if bits == 8 else _codes4(path, before)
            module.__class__ = Quantized
            module.weight = nn.Parameter(codes, requires_grad=False)
            module.register_buffer("scale", scale, persistent=False)
            module.register_buffer("least", least, persistent=False)
            assert isinstance(module, Quantized)
            lost += float((module.restored(before.dtype) - before.detach()).square().sum())
            whole += float(before.detach().square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def is_quantized(model: nn.Module) -> bool:
    """Whether some of its weights are codes."""
    return any(isinstance(module, Quantized) for module in model.modules())


def refuse_quantized(model: nn.Module, to: str) -> None:
    """Raise UsageError where the model's own weights are wanted and are codes."""
    if is_quantized(model):
        raise UsageError(f"a model of quantised weights cannot be {to}", hint="load it anew, in its own dtype")


def stored_bytes(model: nn.Module) -> int:
    """What its parameters and scales take."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _codes8(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale, None


def _codes4(path: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns = weight.shape[1]
    if columns % 2:
        raise ModelError(f"`{path}` has {columns} columns, and two codes make a byte", hint="take 8 bits")
    group = GROUP
    while columns % group:
        group //= 2
    grouped = weight.reshape(len(weight), -1, group)
    least, most = grouped.amin(-1), grouped.amax(-1)
    scale = ((most - least) / 15).clamp(min=torch.finfo(weight.dtype).tiny)
    codes = ((grouped - least[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale, least

"""Norms: every token's vector brought to a common size.

Decisions:
- The mean square is accumulated in float32 for narrower dtypes and in the input's own dtype otherwise: float64 stays
  float64.
- The RMS norm has its own backward pass, because the composed one reads and writes the activations about three times
  as often, and small models on a CPU are bound by that. Under torch.compile the composed form is used, which the
  compiler fuses by itself.
- LayerNorm is torch's, which is one fused kernel already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept, in x's dtype."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = 1 / rms(x). Backward: dx = r (w dy - xh mean(w dy xh)), dw = sum(dy xh), with xh = x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = inverse_rms(x, eps)
        hat = x * r
        ctx.save_for_backward(hat, r, weight)
        return hat * weight.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        hat, r, weight = ctx.saved_tensors
        dx = torch.empty_like(hat)
        return dx, norm_back(dy, hat, r, weight, out=dx), None


def norm_back(dy: Tensor, hat: Tensor, r: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """The gradient of y = weight hat, hat = x r, for x into `out` (of any strides) and for the weight as the result."""
    width = hat.shape[-1]
    w = weight.to(dy.dtype)
    product = (dy * hat).reshape(-1, width)
    # Sums over tokens and over the width as matrix products: they accumulate in float32 and use every lane.
    dweight = product.new_ones(1, product.shape[0]).mm(product).view(width).to(weight.dtype)
    mean = product.mv(w).view(r.shape).mul_(1 / width)
    torch.mul(torch.addcmul(dy * w, hat, mean, value=-1), r, out=out)
    return dweight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            r = (x.to(wide(x.dtype)).square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return x * r.to(x.dtype) * self.weight.to(x.dtype)
        if not torch.is_grad_enabled():
            return x * inverse_rms(x, self.eps) * self.weight.to(x.dtype)
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class LayerNorm(nn.Module):
    """(x - mean) / std * weight (+ bias) over the last axis (arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)

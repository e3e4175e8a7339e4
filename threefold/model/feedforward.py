"""The feed-forward half of a block: every token by itself, through a wider space and back.

Decisions:
- Gate and up projection are one matrix product; their weight is stored as one, (2 F, D), and the rename tables cut it.
- SiLU with a gate has its own backward pass, which writes both gradients into one buffer and keeps silu(gate), because
  an exponential costs more than reading it again; every other activation is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.model.linear import Linear


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": F.relu, "silu": F.silu}


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of one buffer (..., 2 F), whose gradient is one buffer too (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        torch.mul(dy, active, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return out


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where it is gated."""

    def __init__(self, width: int, hidden: int, *, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        if gated:
            self.gate_up = Linear(width, 2 * hidden, bias=bias, parts=(hidden, hidden))
        else:
            self.up = Linear(width, hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias, ends=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return self.down(act(self.up(x_BTD)))  # type: ignore[no-any-return]
        both = self.gate_up(x_BTD)
        if self.activation == "silu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.down(_SwiGLU.apply(both))  # type: ignore[no-any-return,no-untyped-call]
        gate, up = both.chunk(2, -1)
        return self.down(act(gate) * up)  # type: ignore[no-any-return]

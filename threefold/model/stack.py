"""Blocks over an entrance: token vectors -> hidden states. An encoder is a stack, and so is a decoder.

Decisions:
- The entrance adds what a family adds to a token's vector (position, segment), norms, drops and brings to the width.
- What all layers need of a forward pass (masks, rotation tables, relative bias) is made once here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.model.block import AnyBlock, Pass
from threefold.model.cache import Cache
from threefold.model.dropout import dropout
from threefold.model.linear import Linear
from threefold.model.mask import Mask
from threefold.model.padding import Layout
from threefold.model.positions import Learned, RelativeBias, Rotary, Sinusoidal


@dataclass(frozen=True)
class Trace:
    """What a pass leaves: the last hidden state (B, T, D), and where asked for all of them and the attention
    probabilities. `encoder` is the trace of the encoder that a decoder has read."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder: Trace | None = None


class Types(nn.Module):
    """A vector for each kind of segment."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, types_BT: Tensor | None, like: Tensor) -> Tensor:
        """(B, T, D) for the kinds, or (D,) of the first kind where all are of it, in the dtype of `like`."""
        found = self.weight[0] if types_BT is None else F.embedding(types_BT, self.weight)
        return found.to(like.dtype)


class Stack(nn.Module):
    """Entrance, blocks, and the norm behind them (None where blocks end in one). `windows` are those of the layers."""

    def __init__(
        self,
        blocks: Sequence[AnyBlock],
        *,
        causal: bool,
        norm: nn.Module | None,
        positions: Learned | Sinusoidal | None = None,
        rotary: Rotary | None = None,
        relative: RelativeBias | None = None,
        types: Types | None = None,
        entrance_norm: nn.Module | None = None,
        project: Linear | None = None,
        scale: float = 1.0,
        dropout: float,
        site: int,
    ) -> None:
        super().__init__()
        self.positions, self.rotary, self.relative, self.types = positions, rotary, relative, types
        self.entrance_norm, self.project, self.scale, self.dropout, self.site = entrance_norm, project, scale, dropout, site
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.causal = causal
        self.windows = sorted({block.attention.window for block in blocks})
        self.drops = dropout > 0 or any(block.dropout > 0 or block.attention.dropout > 0 for block in blocks)

    def entrance(self, x_BTD: Tensor, positions_BT: Tensor | None, types_BT: Tensor | None, keys_B: Tensor | None) -> Tensor:
        """Token vectors -> what the first block gets."""
        if self.scale != 1:
            x_BTD = x_BTD * self.scale
        if self.types is not None:
            x_BTD = x_BTD + self.types(types_BT, x_BTD)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT, x_BTD.shape[1], x_BTD)
        if self.entrance_norm is not None:
            x_BTD = self.entrance_norm(x_BTD)
        x_BTD = dropout(x_BTD, self.dropout, keys_B)
        return x_BTD if self.project is None else self.project(x_BTD)

    def forward(
        self,
        x_BTD: Tensor,
        masks: dict[int, Mask],
        positions_BT: Tensor | None,
        *,
        types_BT: Tensor | None = None,
        memory_BSD: Tensor | None = None,
        memory_mask: Mask | None = None,
        cache: Cache | None = None,
        keys_B: Tensor | None = None,
        with_states: bool = False,
        with_attentions: bool = False,
        layout: Layout | None = None,
        only_B: Tensor | None = None,
    ) -> Trace:
        """(B, T, D) -> `Trace`; `hidden_states` are the L inputs of the blocks and then the output, normed where the
        stack has a norm. A `layout` says which places are computed: the others are zeros. With `only_B` the last layer works out
        that one place of each row, and the output is (B, 1, D)."""
        length = x_BTD.shape[1]
        if self.relative is not None:
            bias = self.relative(length, length + (0 if cache is None else len(cache)), x_BTD)
            masks = {window: mask.plus(bias, length) for window, mask in masks.items()}
        at = Pass(masks, None if self.rotary is None else self.rotary(positions_BT, length, x_BTD), memory_BSD, memory_mask,
                  cache, keys_B, with_attentions, layout)
        x_BTD = self.entrance(x_BTD, positions_BT, types_BT, at.keys(self.site))
        if layout is not None:
            x_BTD = layout.flat(x_BTD)
        states, own, read = [], [], []
        for number, block in enumerate(self.blocks, 1):
            if with_states:
                states.append(x_BTD)
            x_BTD, (attention, cross) = block(x_BTD, at if number < len(self.blocks) else replace(at, only_B=only_B))
            own.append(attention)
            read.append(cross)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        if layout is not None and only_B is None:
            x_BTD = layout.restored(x_BTD)
        return Trace(x_BTD, (*states, x_BTD) if with_states else None, tuple(own) if with_attentions else None,
                     tuple(read) if with_attentions and memory_BSD is not None else None)

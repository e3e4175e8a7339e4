"""One layer: mix along the sequence, in a decoder behind an encoder also with what that has read, then along the width.

    Block           x + branch(norm(x))       the norm before each branch (arXiv 2002.04745)
    PostBlock       norm(x + branch(x))       the norm behind each sum (arXiv 1706.03762)
    ParallelBlock   x + attention(y) + feedforward(y) with y = norm(x)       both from one norm (arXiv 2204.02311)

Decisions:
- The order of norms is a class and no flag; the parts are handed in, and one set of words serves all three.
- `site` is the first of the four places in which a block drops: attention, and the ends of its branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from threefold.model.attention import Attention, CrossAttention
from threefold.model.cache import Cache
from threefold.model.dropout import dropout, further, site_keys
from threefold.model.feedforward import FeedForward
from threefold.model.mask import Mask
from threefold.model.padding import Layout
from threefold.model.positions import Tables

SITES = 5  # of dropout in a block


@dataclass(frozen=True)
class Pass:
    """What the layers of a stack share in one forward pass. `masks` by the window of a layer, `memory_BSD` the states of
    an encoder and `memory_mask` who may see them. `layout`: states are flat, (1, N, D) for (B, T, D) everywhere. `only_B`: the one
    place of each row that the last layer works out."""

    masks: dict[int, Mask]
    tables: Tables | None = None
    memory_BSD: Tensor | None = None
    memory_mask: Mask | None = None
    cache: Cache | None = None
    keys_B: Tensor | None = None
    with_probabilities: bool = False
    layout: Layout | None = None
    only_B: Tensor | None = None

    def kept(self, x_BTD: Tensor) -> Tensor:
        """The places that are worked out: all, or one of each row (B, 1, D)."""
        if self.only_B is None:
            return x_BTD
        rows = torch.arange(len(self.only_B), device=x_BTD.device)
        if self.layout is not None:
            return x_BTD[0, self.layout.numbers[rows * self.layout.length + self.only_B]][:, None]
        return x_BTD[rows, self.only_B][:, None]

    def keys(self, site: int) -> Tensor | None:
        """Where the bits of each row begin in one place of dropout."""
        return None if self.keys_B is None else site_keys(self.keys_B, site)

    def drop(self, x_BTD: Tensor, p: float, site: int) -> Tensor:
        """Dropout of states, in whichever form they are."""
        starts = self.keys(site)
        if starts is not None and self.only_B is not None:
            starts = further(starts, self.only_B, x_BTD.shape[-1])
        elif starts is not None and self.layout is not None:
            starts = self.layout.starts(starts, x_BTD.shape[-1])
        return dropout(x_BTD, p, starts)


Probabilities = tuple[Tensor | None, Tensor | None]  # of the attention to the own text, and to the encoder's


class Block(nn.Module):
    """x + attention(norm(x)), + cross(norm(x)) where there is one, + feedforward(norm(x))."""

    def __init__(self, norm1: nn.Module, attention: Attention, norm2: nn.Module, feedforward: FeedForward, *, dropout: float,
                 site: int, cross_norm: nn.Module | None = None, cross: CrossAttention | None = None) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feedforward = norm1, attention, norm2, feedforward
        self.cross_norm, self.cross, self.dropout, self.site = cross_norm, cross, dropout, site

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Probabilities]:
        """(B, T, D) -> (B, T, D), or (B, 1, D) of one place, and where asked for the attention probabilities."""
        branch, own = _attended(self, self.norm1(x_BTD), at)
        x_BTD, read = at.kept(x_BTD) + at.drop(branch, self.dropout, self.site + 1), None
        if self.cross is not None and self.cross_norm is not None:
            branch, read = _read(self, self.cross_norm(x_BTD), at)
            x_BTD = x_BTD + at.drop(branch, self.dropout, self.site + 3)
        return x_BTD + at.drop(self.feedforward(self.norm2(x_BTD)), self.dropout, self.site + 4), (own, read)


class PostBlock(nn.Module):
    """norm(x + attention(x)), norm(x + cross(x)) where there is one, norm(x + feedforward(x))."""

    def __init__(self, norm1: nn.Module, attention: Attention, norm2: nn.Module, feedforward: FeedForward, *, dropout: float,
                 site: int, cross_norm: nn.Module | None = None, cross: CrossAttention | None = None) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feedforward = norm1, attention, norm2, feedforward
        self.cross_norm, self.cross, self.dropout, self.site = cross_norm, cross, dropout, site

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Probabilities]:
        """(B, T, D) -> (B, T, D), or (B, 1, D) of one place, and where asked for the attention probabilities."""
        branch, own = _attended(self, x_BTD, at)
        x_BTD, read = self.norm1(at.kept(x_BTD) + at.drop(branch, self.dropout, self.site + 1)), None
        if self.cross is not None and self.cross_norm is not None:
            branch, read = _read(self, x_BTD, at)
            x_BTD = self.cross_norm(x_BTD + at.drop(branch, self.dropout, self.site + 3))
        branch = at.drop(self.feedforward(x_BTD), self.dropout, self.site + 4)
        return self.norm2(x_BTD + branch), (own, read)


class ParallelBlock(nn.Module):
    """x + attention(y) + feedforward(y) with y = norm(x)."""

    def __init__(self, norm1: nn.Module, attention: Attention, feedforward: FeedForward, *, dropout: float, site: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.feedforward = norm1, attention, feedforward
        self.dropout, self.site = dropout, site

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Probabilities]:
        """(B, T, D) -> (B, T, D), or (B, 1, D) of one place, and where asked for the attention probabilities."""
        y_BTD = self.norm1(x_BTD)
        branch, own = _attended(self, y_BTD, at)
        x_BTD = at.kept(x_BTD) + at.drop(branch, self.dropout, self.site + 1)
        return x_BTD + at.drop(self.feedforward(at.kept(y_BTD)), self.dropout, self.site + 4), (own, None)


AnyBlock = Block | PostBlock | ParallelBlock


def _attended(block: AnyBlock, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Tensor | None]:
    return block.attention(x_BTD, at.tables, at.masks[block.attention.window], cache=at.cache,  # type: ignore[no-any-return]
                           keys_B=at.keys(block.site), with_probabilities=at.with_probabilities,
                           layout=at.layout, only_B=at.only_B)


def _read(block: Block | PostBlock, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Tensor | None]:
    assert block.cross is not None and at.memory_BSD is not None and at.memory_mask is not None
    return block.cross(x_BTD, at.memory_BSD, at.memory_mask, cache=at.cache,  # type: ignore[no-any-return]
                       keys_B=at.keys(block.site + 2), with_probabilities=at.with_probabilities,
                       layout=at.layout if at.only_B is None else None)

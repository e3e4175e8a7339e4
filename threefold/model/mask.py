"""Who may see whom.

Decisions:
- A mask is made once a forward pass and shared by all layers of a kind: additive, zero or minus infinity. A row that may
  see nothing is let see everything inside the softmax and set to zero behind it, so that neither it nor its gradient is
  ever NaN.
- What is not restricted costs nothing: a causal pass without padding, packing or bands has no tensor at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Who may see whom: `causal` alone where `bias` is None, else all of it in `bias`, which broadcasts against (B, H, T,
    S)."""

    causal: bool
    bias: Tensor | None = None
    dead: Tensor | None = None  # broadcasts against (B, H, T, 1): rows that may see nothing

    @property
    def learned(self) -> bool:
        """Whether the bias wants a gradient, as a relative position bias does."""
        return self.bias is not None and self.bias.requires_grad

    def plus(self, bias: Tensor, length: int) -> Mask:
        """The mask with a bias (1 or B, H, T, S) added to the scores that it lets through, for T = `length` queries."""
        restricted = self.bias
        if restricted is None and self.causal and length > 1:
            restricted = triangle(length, bias.shape[-1], bias.dtype, bias.device)
        return Mask(self.causal, bias if restricted is None else bias + restricted, self.dead)

    def of(self, places_B: Tensor, like: Tensor) -> Mask:
        """That of one query in each row, at its place among the keys of `like` (B, K, S, E)."""
        def picked(table: Tensor | None) -> Tensor | None:
            if table is None or table.shape[2] == 1:
                return table
            rows = torch.arange(len(places_B), device=table.device)
            return table.expand(len(places_B), *table.shape[1:])[rows, :, places_B][:, :, None]
        bias = self.bias
        if bias is None and self.causal:
            bias = triangle(like.shape[2], like.shape[2], like.dtype, like.device)[None, None]
        return Mask(False, picked(bias), picked(self.dead))


def make_mask(length: int, sources: int, *, like: Tensor, causal: bool = True, documents_BT: Tensor | None = None,
              sources_BS: Tensor | None = None, allowed: Tensor | None = None, window: int = 0) -> Mask:
    """The mask of T queries at the end of S keys. `documents_BT` parts packed texts, `sources_BS` is nonzero for keys
    that are no padding, `allowed`, broadcast against (B, H, T, S), is true where seeing is allowed. A `window` > 0 lets a
    query see no further back than so many tokens, itself included."""
    if 0 < window < sources:
        band = torch.ones(length, sources, dtype=torch.bool, device=like.device).triu(sources - length - window + 1)[None, None]
        allowed = band if allowed is None else allowed & band
    blind = causal and length > sources  # the first queries stand before every key
    if documents_BT is None and sources_BS is None and allowed is None and not blind:
        return Mask(causal)
    # With documents alone each token sees itself: no row is dead.
    alive = documents_BT is not None and sources_BS is None and allowed is None and causal
    if causal:
        past = torch.ones(length, sources, dtype=torch.bool, device=like.device).tril(sources - length)[None, None]
        allowed = past if allowed is None else allowed & past
    if documents_BT is not None:
        same = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
        allowed = same if allowed is None else allowed & same
    if sources_BS is not None:
        keys = (sources_BS != 0)[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    assert allowed is not None
    dead = ~allowed.any(-1, keepdim=True)
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~(allowed | dead), -math.inf)
    if not alive and at_hand(dead):
        alive = not bool(dead.any())
    return Mask(causal, bias, None if alive else dead)


def at_hand(x: Tensor) -> bool:
    """Whether its numbers can be looked at for nothing: on a GPU it is a wait, and for a compiler a break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def triangle(length: int, sources: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity in the future of each of T queries at the end of S keys, else zero: (T, S)."""
    return torch.full((length, sources), -math.inf, dtype=dtype, device=device).triu(sources - length + 1)

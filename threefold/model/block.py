"""One layer: mix along the sequence, then along the width, each on a normed copy and added back.

Decisions:
- The norm stands before the branch (arXiv 2002.04745), as in every family so far; the parts are handed in, so that
  another order or a third branch is another small class and not a flag.
"""

from __future__ import annotations

from torch import Tensor, nn

from threefold.model.attention import Attention, Mask
from threefold.model.cache import Cache
from threefold.model.dropout import dropout, site_keys
from threefold.model.feedforward import FeedForward
from threefold.model.positions import Tables


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(
        self, norm1: nn.Module, attention: Attention, norm2: nn.Module, feedforward: FeedForward, *, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feedforward, self.dropout = (
            norm1,
            attention,
            norm2,
            feedforward,
            dropout,
        )

    def forward(
        self,
        x_BTD: Tensor,
        tables: Tables | None,
        mask: Mask,
        *,
        cache: Cache | None = None,
        keys_B: Tensor | None = None,
        with_probabilities: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and, where asked for, the attention probabilities (B, H, T, S)."""
        first = second = third = None
        if keys_B is not None:
            site = 3 * self.attention.layer
            first, second, third = (site_keys(keys_B, site + i) for i in (1, 2, 3))
        branch, probabilities = self.attention(
            self.norm1(x_BTD), tables, mask, cache=cache, keys_B=first, with_probabilities=with_probabilities
        )
        x_BTD = x_BTD + dropout(branch, self.dropout, second)
        return x_BTD + dropout(self.feedforward(self.norm2(x_BTD)), self.dropout, third), probabilities

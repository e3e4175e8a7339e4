"""What stands behind the hidden states: small modules that turn them into logits.

    LanguageHead     a logit for each token of the vocabulary; its weight may be the embedding
    Transform        dense, activation, norm: what BERT puts before its head (arXiv 1810.04805)
    DenseHead        logits of a vector: a projection alone, or dense, activation and projection

Decision: a head is told once, when it is built, whether its weight is its own. Where it is the embedding, the embedding is
handed to each call, so that one parameter has one name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.model.feedforward import ACTIVATIONS
from threefold.model.linear import Linear
from threefold.model.losses import cross_entropy_each, token_losses


class Transform(nn.Module):
    """norm(act(dense(x))), to the width of the embedding."""

    def __init__(self, width: int, out: int, norm: nn.Module, *, activation: str) -> None:
        super().__init__()
        self.dense, self.norm, self.activation = Linear(width, out, bias=True), norm, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))  # type: ignore[no-any-return]


class LanguageHead(nn.Module):
    """(..., D) -> logits (..., V), times `scale`. `weight` (V, D) is None where the embedding is the head."""

    def __init__(self, width: int, vocabulary: int, *, own: bool, bias: bool, scale: float, transform: Transform | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width)) if own else None
        self.bias = nn.Parameter(torch.empty(vocabulary)) if bias else None
        self.transform, self.scale = transform, scale

    def ready(self, hidden: Tensor) -> Tensor:
        """The hidden states as the last product takes them."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        return hidden if self.scale == 1 else hidden * self.scale

    def matrix(self, embedding_VD: Tensor) -> Tensor:
        """The weight (V, D) of the last product: the head's own, or the embedding."""
        return embedding_VD if self.weight is None else self.weight

    def forward(self, hidden: Tensor, embedding_VD: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(self.ready(hidden), self.matrix(embedding_VD).to(hidden.dtype), bias)

    def losses(self, hidden_ND: Tensor, embedding_VD: Tensor, labels_N: Tensor, *, smoothing: float = 0.0, checked: bool = False
               ) -> tuple[Tensor, Tensor]:
        """The summed loss in nats and that of each token, without the logits of all tokens at once."""
        return cross_entropy_each(self.ready(hidden_ND), self.matrix(embedding_VD), labels_N, self.bias, smoothing=smoothing,
                                  checked=checked)

    def token_losses(self, hidden_ND: Tensor, embedding_VD: Tensor, labels_N: Tensor) -> Tensor:
        """The loss of each token in nats, each with its gradient."""
        return token_losses(self.ready(hidden_ND), self.matrix(embedding_VD), labels_N, self.bias)


class DenseHead(nn.Module):
    """Logits of a vector (..., D): out(x), or out(act(dense(x))) where an activation is named."""

    def __init__(self, width: int, count: int, *, activation: str | None, bias: bool) -> None:
        super().__init__()
        self.dense = None if activation is None else Linear(width, width, bias=True)
        self.activation = activation
        self.out = Linear(width, count, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None and self.activation is not None:
            x = torch.tanh(self.dense(x)) if self.activation == "tanh" else ACTIVATIONS[self.activation](self.dense(x))
        return self.out(x)  # type: ignore[no-any-return]


class Pooler(nn.Module):
    """tanh(dense(x)) of a text's first state: (B, T, D) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width, bias=True)

    def forward(self, states_BTD: Tensor) -> Tensor:
        return torch.tanh(self.dense(states_BTD[:, 0]))

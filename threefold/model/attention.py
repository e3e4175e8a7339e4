"""Attention: every token reads from those it may see.

    MHA   q q q q    GQA   q q q q    MQA   q q q q      queries share keys and values in groups of G = H / K
          k k k k          k   k            k            (arXiv 1706.03762, 2305.13245, 1911.02150)

Decisions:
- A mask is made once a forward pass and shared by all layers: additive, zero or minus infinity. A row that may see nothing is let
  see everything inside the softmax and set to zero behind it, so that neither it nor its gradient is ever NaN.
- On a CPU, training computes the scores explicitly (matrix product, softmax, matrix product) with a backward pass of its own, in
  blocks of queries that skip what lies in the future: torch's fused kernel has a backward pass several times slower at the contexts
  that a CPU trains. Inference takes torch's fused kernel, which needs no memory for the scores. A GPU always takes the fused one.
- Queries that share a key are laid side by side as rows of one matrix, so that keys are never copied for each query head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from threefold.model.cache import Cache
from threefold.model.dropout import dropout
from threefold.model.linear import Linear
from threefold.model.norms import RMSNorm
from threefold.model.positions import Tables, rotate


@dataclass(frozen=True)
class Mask:
    """Who may see whom: `causal` alone where `bias` is None, else all of it in `bias` (1 or B, 1, T, S)."""

    causal: bool
    bias: Tensor | None = None
    dead: Tensor | None = None  # (B, 1, T, 1): rows that may see nothing


def make_mask(length: int, sources: int, *, like: Tensor, causal: bool = True, documents_BT: Tensor | None = None,
              sources_BS: Tensor | None = None, allowed: Tensor | None = None) -> Mask:
    """The mask of T queries at the end of S keys. `documents_BT` parts packed texts, `sources_BS` is nonzero for keys that are no padding,
    `allowed` (1 or B, 1, T, S) is true where seeing is allowed. What is not restricted costs nothing."""
    if documents_BT is None and sources_BS is None and allowed is None:
        return Mask(causal)
    if causal:
        triangle = torch.ones(length, sources, dtype=torch.bool, device=like.device).tril(sources - length)[None, None]
        allowed = triangle if allowed is None else allowed & triangle
    if documents_BT is not None:
        same = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
        allowed = same if allowed is None else allowed & same
    if sources_BS is not None:
        keys = (sources_BS != 0)[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    assert allowed is not None
    dead = ~allowed.any(-1, keepdim=True)
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~(allowed | dead), -math.inf)
    alive = documents_BT is not None and sources_BS is None and causal  # each token sees itself: no row is dead
    return Mask(causal, bias, None if alive else dead)


def attention(q: Float[Tensor, "B H T E"], k: Float[Tensor, "B K S E"], v: Float[Tensor, "B K S E"], *, causal: bool = False,
              documents: Int[Tensor, "B T"] | None = None, mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
              scale: float | None = None) -> Float[Tensor, "B H T E"]:
    """softmax(q k^T scale + mask) v, by whichever way is the fastest here; gradients included.

    H is a multiple of K; queries h * K / H share a key. `causal` lets query t see the keys up to S - T + t. `documents` (B, T), with S = T,
    lets tokens see only those with the same number. `mask`, broadcast against (B, H, T, S), is boolean (true: may see)
    or added to the scores. `scale` is 1 / sqrt(E) unless given. A query that may see nothing gets zeros.

    Source: arXiv 1706.03762. Raises ValueError for shapes that do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention takes q (B, H, T, E) and k, v (B, K, S, E) with H a multiple of K, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    length, sources = q.shape[2], k.shape[2]
    if documents is not None and length != sources:
        raise ValueError(f"`documents` needs as many queries as keys, got {length} and {sources}")
    allowed = bias = None
    if mask is not None:
        view = mask.view((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.dtype == torch.bool:
            allowed = view
        else:
            allowed, bias = view != -math.inf, view
    made = make_mask(length, sources, like=q, causal=causal, documents_BT=documents, allowed=allowed)
    if bias is not None and made.bias is not None:
        made = Mask(causal, made.bias + bias.masked_fill(bias == -math.inf, 0).to(q.dtype), made.dead)
    return attend(q, k, v, made, scale)


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """`attention` with a mask that is already made."""
    scale = q_BHTE.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _composed(q_BHTE, k_BKSE, v_BKSE, mask, scale)
    return out


def _composed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, p: float = 0.0, keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, in torch's own operations; returns the output (B, H, T, E) and the probabilities (B, H, T, S)."""
    (batch, heads, length, width), (_, shared, sources, _) = q.shape, k.shape
    rows = q.reshape(batch, shared, heads // shared * length, width)
    scores = (rows @ k.mT * scale).view(batch, heads, length, sources)
    bias = mask.bias
    if bias is None and mask.causal and length > 1:
        bias = _triangle(length, sources, q.dtype, q.device)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(-1)
    if mask.dead is not None:
        probabilities = probabilities.masked_fill(mask.dead, 0)
    probabilities = dropout(probabilities, p, keys_B)
    return (probabilities.view(batch, shared, -1, sources) @ v).view(q.shape), probabilities


def _triangle(length: int, sources: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((length, sources), -math.inf, dtype=dtype, device=device).triu(sources - length + 1)


class Attention(nn.Module):
    """Projections, rotation, attention, and the projection back. Queries, keys and values are rows of one weight, in that order."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, *, layer: int, bias: bool, qk_norm_eps: float | None,
                 dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer, self.dropout = heads, kv_heads, head_dim, layer, dropout
        self.qkv = Linear(width, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, width, bias=bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(self, x_BTD: Tensor, tables: Tables | None, mask: Mask, *, cache: Cache | None = None, keys_B: Tensor | None = None,
                with_probabilities: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and, where asked for, the probabilities (B, H, T, S)."""
        batch, length, _ = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(batch, length, -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BKTE, v_BKTE = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if tables is not None:
            cos, sin = tables[0][:, None], tables[1][:, None]
            q_BHTE, k_BKTE = rotate(q_BHTE, cos, sin), rotate(k_BKTE, cos, sin)
        if cache is not None:
            k_BKTE, v_BKTE = cache.append(self.layer, k_BKTE, v_BKTE)
        probabilities = None
        if with_probabilities or (self.dropout and keys_B is not None):
            out_BHTE, probabilities = _composed(q_BHTE, k_BKTE, v_BKTE, mask, self.head_dim ** -0.5, self.dropout, keys_B)
        else:
            out_BHTE = attend(q_BHTE, k_BKTE, v_BKTE, mask)
        return self.out(out_BHTE.transpose(1, 2).reshape(batch, length, -1)), probabilities

"""Attention: every token reads from those it may see.

    MHA   q q q q    GQA   q q q q    MQA   q q q q      queries share keys and values in groups of G = H / K
          k k k k          k   k            k            (arXiv 1706.03762, 2305.13245, 1911.02150)

Decisions:
- On a CPU the scores are computed explicitly (matrix product, softmax, matrix product), in blocks of queries that skip
  what lies in the future, with a backward pass of their own. Measured on one core against torch's fused kernel, in
  milliseconds: training 1,024 tokens 17 against 30 in bfloat16 and 25 against 35 in float32; 8 rows decoding one token
  behind 512, in bfloat16, 0.4 against 3.5. The fused kernel wins at long contexts in float32 (3,072 tokens: 133
  against 173) and is taken there, and always on a GPU.
- Queries that share a key are laid side by side as rows of one matrix, so that keys are never copied for each query
  head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from threefold.model.cache import Cache
from threefold.model.dropout import dropout, kept
from threefold.model.linear import Linear
from threefold.model.mask import Mask, make_mask, triangle
from threefold.model.norms import RMSNorm, inverse_rms, norm_back
from threefold.model.padding import Layout
from threefold.model.positions import Tables, rotate, rotate_back
from threefold.model.scores import blocks, blocks_back, grouped


def attention(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B K S E"],
    v: Float[Tensor, "B K S E"],
    *,
    causal: bool = False,
    documents: Int[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T E"]:
    """softmax(q k^T scale + mask) v, by whichever way is the fastest here; gradients included.

    H is a multiple of K; queries h * K / H share a key. `causal` lets query t see the keys up to S - T + t.
    `documents` (B, T), with S = T, lets tokens see only those with the same number. `mask`, broadcast against (B, H,
    T, S), is boolean (true: may see) or added to the scores. `scale` is 1 / sqrt(E) unless given. A query that may see
    nothing gets zeros.

    Source: arXiv 1706.03762. Raises ValueError for shapes that do not fit.
    """
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.ndim != 4
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"attention takes q (B, H, T, E) and k, v (B, K, S, E) with H a multiple of K, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    length, sources = q.shape[2], k.shape[2]
    if documents is not None and length != sources:
        raise ValueError(f"`documents` needs as many queries as keys, got {length} and {sources}")
    allowed = bias = None
    if mask is not None:
        shape = (q.shape[0], q.shape[1], length, sources)
        if mask.ndim > 4 or any(a not in (1, b) for a, b in zip(mask.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"`mask` of shape {tuple(mask.shape)} does not broadcast against (B, H, T, S) = {shape}")
        view = mask.view((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.dtype == torch.bool:
            allowed = view
        else:
            allowed, bias = view != -math.inf, view
    made = make_mask(length, sources, like=q, causal=causal, documents_BT=documents, allowed=allowed)
    if bias is not None and made.bias is not None:
        made = Mask(causal, made.bias + bias.masked_fill(bias == -math.inf, 0).to(q.dtype), made.dead)
    return attend(q, k, v, made, scale)


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask, scale: float | None = None, p: float = 0.0,
           keys_B: Tensor | None = None) -> Tensor:
    """`attention` with a mask that is already made; with `keys_B` probabilities are dropped with probability `p`."""
    (batch, heads, length, width), (_, shared, sources, _) = q_BHTE.shape, k_BKSE.shape
    scale = width ** -0.5 if scale is None else scale
    learning = torch.is_grad_enabled() and (q_BHTE.requires_grad or k_BKSE.requires_grad or v_BKSE.requires_grad
                                            or mask.learned)
    if q_BHTE.device.type != "cpu" or torch.compiler.is_compiling():
        fused = True
    elif learning:
        fused = batch * heads * length * sources > KEPT_LIMIT
    else:  # torch's kernel gains at long contexts in wide dtypes alone, and is up to eight times slower for single tokens in bfloat16
        fused = length >= 1024 and mask.bias is None and q_BHTE.dtype.itemsize >= 4
    dropping = p > 0 and keys_B is not None
    if dropping and (fused or not learning):
        return _composed(q_BHTE, k_BKSE, v_BKSE, mask, scale, p, keys_B)[0]
    if fused:
        return _fused(q_BHTE, k_BKSE, v_BKSE, mask, scale)
    q_NGTE = q_BHTE.reshape(batch * shared, heads // shared, length, width)
    k_NSE, v_NSE = k_BKSE.reshape(batch * shared, sources, width), v_BKSE.reshape(batch * shared, sources, width)
    bias = grouped(mask.bias, shared, length, sources)
    if learning:
        drop = None
        if dropping:
            assert keys_B is not None
            drop = kept((batch, heads, length, sources), q_BHTE.dtype, p, keys_B).view(*q_NGTE.shape[:3], sources)
        out: Tensor = _Explicit.apply(  # type: ignore[no-untyped-call]
            q_NGTE, k_NSE, v_NSE, bias, drop, (batch, shared), mask.causal, scale)
    else:
        out = blocks(q_NGTE, k_NSE, v_NSE, bias, (batch, shared), mask.causal, scale, keep=False)[0]
    out = out.view(q_BHTE.shape)
    return out if mask.dead is None else out.masked_fill(mask.dead, 0)


KEPT_LIMIT = 2**28  # scores that a layer may keep for its backward pass; beyond, torch's kernel, which computes them twice


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    length, sources = q.shape[2], k.shape[2]
    bias = mask.bias
    if bias is None and mask.causal and 1 < length < sources:  # torch's own triangle begins at the first key
        bias = triangle(length, sources, q.dtype, q.device)
    causal = bias is None and mask.causal and length > 1
    if q.device.type != "cpu" and (bias is not None or q.dtype.itemsize > 2):
        k, v = expanded(k, q.shape[1]), expanded(v, q.shape[1])  # no kernel of a GPU takes shared heads with these but one that keeps all scores
    out = F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out if mask.dead is None else out.masked_fill(mask.dead, 0)


def expanded(shared_BKSE: Tensor, heads: int) -> Tensor:
    """Keys or values (B, H, S, E) for each head of those that groups share."""
    return shared_BKSE if shared_BKSE.shape[1] == heads else shared_BKSE.repeat_interleave(heads // shared_BKSE.shape[1], 1)


class _Explicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, drop: Tensor | None, rows: tuple[int, int],
                causal: bool, scale: float) -> Tensor:
        out, probabilities = blocks(q, k, v, bias, rows, causal, scale, drop=drop)
        ctx.save_for_backward(q, k, v, drop, *probabilities)
        ctx.rows, ctx.causal, ctx.scale = rows, causal, scale
        ctx.bias_shape = None if bias is None else bias.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, drop, *probabilities = ctx.saved_tensors
        dbias = q.new_zeros(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        dq, dk, dv = blocks_back(dout, q, k, v, probabilities, ctx.causal, ctx.scale, dbias, ctx.rows, drop)
        return dq, dk, dv, dbias, None, None, None, None


class _Mix(torch.autograd.Function):
    """From the joint projection (B, T, (H + 2 K) E) to the attention's output (B, T, H E): norms of queries and keys,
    rotation, attention.

    One function, so that no intermediate is copied twice: heads are brought to the front while they are normed, and
    the backward pass writes all gradients into one buffer.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BTW: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
                cos: Tensor | None, sin: Tensor | None, bias: Tensor | None, heads: int, shared: int, causal: bool,
                scale: float) -> Tensor:
        batch, length, _ = qkv_BTW.shape
        split = qkv_BTW.view(batch, length, heads + 2 * shared, -1).permute(
            2, 0, 1, 3
        )  # heads first: (H + 2 K, B, T, E)
        width = split.shape[-1]
        turned, hats, inverses = [], [], []
        for part, weight in ((split[:heads], q_weight), (split[heads:heads + shared], k_weight)):
            if weight is not None:
                r = inverse_rms(part, eps).contiguous()
                hat = torch.mul(part, r, out=part.new_empty(part.shape))
                hats.append(hat)
                inverses.append(r)
                part = hat * weight.to(hat.dtype)
            else:
                part = part.contiguous()
            turned.append(part if cos is None or sin is None else rotate(part, cos, sin))
        q = (
            turned[0]
            .view(shared, heads // shared, batch, length, width)
            .transpose(1, 2)
            .reshape(shared * batch, -1, length, width)
        )
        k, v = turned[1].view(-1, length, width), split[heads + shared:].reshape(-1, length, width)
        out, probabilities = blocks(q, k, v, bias, (shared, batch), causal, scale)
        ctx.save_for_backward(q_weight, k_weight, cos, sin, q, k, v, *hats, *inverses, *probabilities)
        ctx.normed, ctx.shape, ctx.causal, ctx.scale = bool(hats), (batch, length, heads, shared), causal, scale
        return out.view(shared, batch, -1, length, width).permute(1, 3, 0, 2, 4).reshape(batch, length, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_BTW: Tensor) -> tuple[Any, ...]:
        q_weight, k_weight, cos, sin, q, k, v, *rest = ctx.saved_tensors
        batch, length, heads, shared = ctx.shape
        width = q.shape[-1]
        hats, inverses, probabilities = (rest[:2], rest[2:4], rest[4:]) if ctx.normed else ([], [], rest)
        dout = dout_BTW.view(batch, length, shared, -1, width).permute(2, 0, 3, 1, 4).reshape(q.shape)
        dq, dk, dv = blocks_back(dout, q, k, v, probabilities, ctx.causal, ctx.scale)
        dq = dq.view(shared, batch, -1, length, width).transpose(1, 2).reshape(heads, batch, length, width)
        dqkv = dout_BTW.new_empty(batch, length, heads + 2 * shared, width)
        split = dqkv.permute(2, 0, 1, 3)
        dweights: list[Tensor | None] = [None, None]
        for i, (part, target, weight) in enumerate(
            (
                (dq, split[:heads], q_weight),
                (dk.view(shared, batch, length, width), split[heads : heads + shared], k_weight),
            )
        ):
            if cos is not None:
                part = rotate_back(part, cos, sin)
            if weight is None:
                target.copy_(part)
            else:
                dweights[i] = norm_back(part, hats[i], inverses[i], weight, out=target)
        split[heads + shared:] = dv.view(shared, batch, length, width)
        return dqkv.view(batch, length, -1), *dweights, None, None, None, None, None, None, None, None


def _composed(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, p: float = 0.0, keys_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in torch's own operations; returns the output (B, H, T, E) and the probabilities (B, H, T, S)."""
    (batch, heads, length, width), (_, shared, sources, _) = q.shape, k.shape
    rows = q.reshape(batch, shared, heads // shared * length, width)
    scores = (rows @ k.mT * scale).view(batch, heads, length, sources)
    bias = mask.bias
    if bias is None and mask.causal and length > 1:
        bias = triangle(length, sources, q.dtype, q.device)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(-1)
    if mask.dead is not None:
        probabilities = probabilities.masked_fill(mask.dead, 0)
    probabilities = dropout(probabilities, p, keys_B)
    return (probabilities.view(batch, shared, -1, sources) @ v).view(q.shape), probabilities


class Attention(nn.Module):
    """Projections, rotation, attention, and the projection back. Queries, keys and values are rows of one weight, in
    that order. `scale` is that of the scores, `window` what the layer's mask is made for: tokens that it looks back."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layer: int,
        bias: bool,
        out_bias: bool,
        scale: float,
        window: int,
        qk_norm_eps: float | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer, self.dropout = heads, kv_heads, head_dim, layer, dropout
        self.scale, self.window = scale, window
        rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.qkv = Linear(width, sum(rows), bias=bias, parts=rows)
        self.out = Linear(heads * head_dim, width, bias=out_bias, ends=True)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        tables: Tables | None,
        mask: Mask,
        *,
        cache: Cache | None = None,
        keys_B: Tensor | None = None,
        with_probabilities: bool = False,
        layout: Layout | None = None,
        only_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), or (1, N, D) -> (1, N, D) in a `layout`, and where asked for the probabilities (B, H, T, S); with
        `only_B` of that one query of each row, T = 1."""
        qkv_BTW = self.qkv(x_BTD) if layout is None else layout.apart(self.qkv(x_BTD))
        batch, length, _ = qkv_BTW.shape
        dropping = self.dropout > 0 and keys_B is not None
        if (
            torch.is_grad_enabled()
            and cache is None
            and not dropping
            and not with_probabilities
            and only_B is None
            and not mask.learned  # the joint function has no gradient for it
            and self._explicit(qkv_BTW)
        ):
            mixed = self._mix(qkv_BTW, tables, mask)
            return self.out(mixed if layout is None else layout.flat(mixed)), None
        q, k, v = qkv_BTW.view(batch, length, -1, self.head_dim).split([self.heads, self.kv_heads, self.kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BKTE, v_BKTE = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if tables is not None:
            cos, sin = tables[0][:, None], tables[1][:, None]
            q_BHTE, k_BKTE = rotate(q_BHTE, cos, sin), rotate(k_BKTE, cos, sin)
        if cache is not None:
            k_BKTE, v_BKTE = cache.append(self.layer, k_BKTE, v_BKTE)
        if only_B is not None:
            q_BHTE, mask = q_BHTE[torch.arange(batch, device=q_BHTE.device), :, only_B][:, :, None], mask.of(only_B, k_BKTE)
        out_BHTE, probabilities = _attended(
            q_BHTE, k_BKTE, v_BKTE, mask, self.scale, self.dropout, keys_B, with_probabilities
        )
        out_BTW = out_BHTE.transpose(1, 2).reshape(batch, q_BHTE.shape[2], -1)
        return self.out(out_BTW if layout is None or only_B is not None else layout.flat(out_BTW)), probabilities

    def _explicit(self, x_BTD: Tensor) -> bool:
        batch, length, _ = x_BTD.shape
        return (
            x_BTD.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and batch * self.heads * length**2 <= KEPT_LIMIT
        )

    def _mix(self, qkv_BTW: Tensor, tables: Tables | None, mask: Mask) -> Tensor:
        q_weight, k_weight, eps = (None, None, 0.0) if self.q_norm is None or self.k_norm is None else (
            self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        cos, sin = (None, None) if tables is None else tables
        bias = grouped(mask.bias, self.kv_heads, qkv_BTW.shape[1], qkv_BTW.shape[1])
        bias = None if bias is None else bias.transpose(0, 1)  # rows are (K, B) here
        out: Tensor = _Mix.apply(  # type: ignore[no-untyped-call]
            qkv_BTW, q_weight, k_weight, eps, cos, sin, bias, self.heads, self.kv_heads, mask.causal, self.scale)
        return out if mask.dead is None else out.masked_fill(mask.dead[:, 0], 0)


class CrossAttention(nn.Module):
    """Attention from a decoder to what an encoder has read. Keys and values are computed once a text."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layer: int,
        bias: bool,
        out_bias: bool,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer, self.dropout = heads, kv_heads, head_dim, layer, dropout
        self.scale = scale
        rows = (kv_heads * head_dim, kv_heads * head_dim)
        self.q = Linear(width, heads * head_dim, bias=bias)
        self.kv = Linear(width, sum(rows), bias=bias, parts=rows)
        self.out = Linear(heads * head_dim, width, bias=out_bias, ends=True)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor,
        mask: Mask,
        *,
        cache: Cache | None = None,
        keys_B: Tensor | None = None,
        with_probabilities: bool = False,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D), or (1, N, D) in a `layout`, and the encoder's (B, S, D) -> the same and, where asked for, the probabilities
        (B, H, T, S)."""
        q_BTW = self.q(x_BTD) if layout is None else layout.apart(self.q(x_BTD))
        batch, length, _ = q_BTW.shape
        q_BHTE = q_BTW.view(batch, length, self.heads, self.head_dim).transpose(1, 2)

        def read() -> tuple[Tensor, Tensor]:
            k, v = self.kv(memory_BSD).view(*memory_BSD.shape[:2], 2, self.kv_heads, self.head_dim).unbind(2)
            return k.transpose(1, 2), v.transpose(1, 2)

        k_BKSE, v_BKSE = read() if cache is None else cache.memory(self.layer, read)
        out_BHTE, probabilities = _attended(
            q_BHTE, k_BKSE, v_BKSE, mask, self.scale, self.dropout, keys_B, with_probabilities
        )
        out_BTW = out_BHTE.transpose(1, 2).reshape(batch, length, -1)
        return self.out(out_BTW if layout is None else layout.flat(out_BTW)), probabilities


def _attended(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask, scale: float, p: float, keys_B: Tensor | None,
              with_probabilities: bool) -> tuple[Tensor, Tensor | None]:
    """The output (B, H, T, E), and the probabilities where they are asked for."""
    if with_probabilities:
        return _composed(q_BHTE, k_BKSE, v_BKSE, mask, scale, p, keys_B)
    return attend(q_BHTE, k_BKSE, v_BKSE, mask, scale, p, keys_B), None

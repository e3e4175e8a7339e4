"""Explicit scores on a CPU: matrix product, softmax, matrix product, in blocks of queries that skip what lies in the future.

Rows N are all pairs of a text and a key head, `rows` their two counts in order. G queries share a key, and are laid side
by side as rows of one matrix, so that keys are never copied for each query head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from threefold.model.mask import triangle


def grouped(bias: Tensor | None, shared: int, length: int, sources: int) -> Tensor | None:
    """A bias that broadcasts against (B, H, T, S) as (B or 1, K or 1, G or 1, T, S), without a copy."""
    if bias is None:
        return None
    wide = bias.expand(-1, -1, length, sources)
    return wide[:, :, None] if wide.shape[1] == 1 else wide.view(len(wide), shared, -1, length, sources)


def _seen(stop: int, length: int, sources: int, causal: bool) -> int:
    """The keys that a block of queries up to `stop` sees; one at least, so that rows before every key have a softmax."""
    return max(1, sources - length + stop) if causal else sources


def _cuts(length: int, causal: bool) -> list[tuple[int, int]]:
    """Blocks of queries. A block of 64 rows still fills the processor's units; smaller ones skip more of the future
    but cost more calls."""
    if length <= 64 or (not causal and length <= 256):
        return [(0, length)]
    step = 64 if length <= 256 else 128
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def blocks(q_NGTE: Tensor, k_NSE: Tensor, v_NSE: Tensor, bias: Tensor | None, rows: tuple[int, int], causal: bool,
            scale: float, *, keep: bool = True, drop: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The output (N, G, T, E) and, to `keep`, the probabilities of each block (N, G t, keys seen). `bias` broadcasts
    against (*rows, G, T, S), and `drop` (N, G, T, S) is what the probabilities are multiplied by."""
    count, group, length, width = q_NGTE.shape
    sources = k_NSE.shape[1]
    out, kept = torch.empty_like(q_NGTE), []
    for start, stop in _cuts(length, causal):
        seen = _seen(stop, length, sources, causal)
        queries = q_NGTE[:, :, start:stop].reshape(count, -1, width)
        scores = (
            torch.bmm(queries, k_NSE[:, :seen].mT) if scale == 1 else _scaled_product(queries, k_NSE[:, :seen], scale)
        )
        if bias is not None:
            scores.view(*rows, group, stop - start, seen).add_(bias[..., start:stop, :seen])
        elif causal and stop - start > 1:
            scores.view(count, group, stop - start, seen)[..., seen - (stop - start):].add_(
                triangle(stop - start, stop - start, scores.dtype, scores.device))
        probabilities = scores.softmax(-1)
        read = probabilities if drop is None else probabilities * drop[:, :, start:stop, :seen].reshape(probabilities.shape)
        out[:, :, start:stop] = torch.bmm(read, v_NSE[:, :seen]).view(count, group, -1, width)
        if keep:
            kept.append(probabilities)
    return out, kept


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """a b^T scale, the scale inside the matrix product."""
    return torch.baddbmm(a.new_empty(1, 1, 1).expand(len(a), a.shape[1], b.shape[1]), a, b.mT, beta=0, alpha=scale)


def blocks_back(dout_NGTE: Tensor, q_NGTE: Tensor, k_NSE: Tensor, v_NSE: Tensor, kept: list[Tensor], causal: bool,
                 scale: float, dbias: Tensor | None = None, rows: tuple[int, int] = (1, 1),
                 drop: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `blocks`; that of the bias goes into `dbias`, zeros of (B or 1, K or 1, G or 1, T, S). The last
    block, which sees all keys, goes first: it makes the sums to which the others are added."""
    count, _, length, width = q_NGTE.shape
    dq, dk, dv = torch.empty_like(q_NGTE), None, None
    for (start, stop), probabilities in reversed(list(zip(_cuts(length, causal), kept, strict=True))):
        seen = probabilities.shape[-1]
        queries, dout = (
            q_NGTE[:, :, start:stop].reshape(count, -1, width),
            dout_NGTE[:, :, start:stop].reshape(count, -1, width),
        )
        dprobabilities, read = torch.bmm(dout, v_NSE[:, :seen].mT), probabilities
        if drop is not None:
            dropped = drop[:, :, start:stop, :seen].reshape(probabilities.shape)
            dprobabilities, read = dprobabilities.mul_(dropped), probabilities * dropped
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
        if dbias is not None:
            part = dbias[..., start:stop, :seen]
            part.copy_(dscores.view(*rows, -1, stop - start, seen).sum_to_size(part.shape))
        dq[:, :, start:stop] = torch.baddbmm(dout, dscores, k_NSE[:, :seen], beta=0, alpha=scale).view(
            count, -1, stop - start, width
        )
        if dk is None or dv is None:
            dk = torch.baddbmm(k_NSE, dscores.mT, queries, beta=0, alpha=scale)
            dv = torch.bmm(read.mT, dout)
        else:
            dk[:, :seen].baddbmm_(dscores.mT, queries, alpha=scale)
            dv[:, :seen].baddbmm_(read.mT, dout)
    assert dk is not None and dv is not None
    return dq, dk, dv

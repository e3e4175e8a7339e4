"""Where a token stands: vectors added to the embedding (learned, or waves), a rotation of queries and keys, or a bias
on the scores.

Decisions:
- Angles are computed as transformers computes them, in float32, so that far positions agree with what published models
  were trained with; a float64 model computes them in float64.
- The tables for positions 0..T-1 are kept, for they are the same in every step of a training run; other positions are
  computed anew.
- The frequencies are a function of the configuration and no buffer: nothing to store, nothing to forget when moving
  between devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tables = tuple[Tensor, Tensor]  # cosines and signed sines (1 or B, T, E): [cos, cos] and [-sin, sin]


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, context: int, dtype: torch.dtype, length: int = 0
) -> tuple[Tensor, float]:
    """Radians per position (E / 2,) and the factor on cosines and sines. `context` is the longest one that the model
    is meant for, `length` the longest text at hand.

    Sources: arXiv 2104.09864; `linear` arXiv 2306.15595; `yarn` arXiv 2309.00071; `llama3` arXiv 2407.21783; `longrope`
    arXiv 2402.13753.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=dtype) / head_dim
    plain = 1.0 / theta ** exponents
    if not scaling:
        return plain, 1.0
    if scaling["rope_type"] == "longrope":
        return _longrope(theta ** exponents, scaling, context, length)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return plain / factor, 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(theta ** exponents, head_dim, theta, scaling, context)


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Short waves stay, long ones are stretched by the factor, those between are blended."""
    low, high, old = (
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    factor = scaling["factor"]
    waves = 2 * math.pi / plain
    stretched = torch.where(waves > old / low, plain / factor, plain)
    blend = (old / waves - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    between = ~(waves < old / high) & ~(waves > old / low)
    return torch.where(between, blended, stretched)


def _longrope(
    powers: Tensor, scaling: Mapping[str, Any], context: int, length: int
) -> tuple[Tensor, float]:
    """A factor for each wave, of two sets: one for texts of the old context, one for longer texts."""
    old = scaling["original_max_position_embeddings"]
    each = torch.tensor(scaling["long_factor" if length > old else "short_factor"], dtype=powers.dtype)
    factor = scaling.get("factor") or context / old
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
    return 1.0 / (each * powers), float(attention_factor)


def _yarn(
    powers: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any], context: int
) -> tuple[Tensor, float]:
    """A ramp over the axes from waves that stay to waves that are stretched, and a temperature on the scores."""
    factor = scaling["factor"]
    old = scaling.get("original_max_position_embeddings") or context

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        both = scaling.get("mscale") and scaling.get("mscale_all_dim")
        attention_factor = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"]) if both else magnitude(1)

    def axis(turns: float) -> float:
        """The axis whose wave makes that many turns over the old context."""
        return head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = axis(scaling.get("beta_fast") or 32), axis(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = last - first or 0.001
    stay = 1 - ((torch.arange(head_dim // 2, dtype=powers.dtype) - first) / span).clamp(0, 1)
    return 1.0 / (factor * powers) * (1 - stay) + 1.0 / powers * stay, float(attention_factor)


class Rotary(nn.Module):
    """Cosines and sines for the rotation of queries and keys; holds no parameters. `turn` is the length beyond which a text is
    rotated by other waves, all of it, where there is one."""

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None, context: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling, self.context = head_dim, theta, dict(scaling or {}), context
        longrope = self.scaling.get("rope_type") == "longrope"
        self.turn: int | None = self.scaling["original_max_position_embeddings"] if longrope else None
        self._kept: dict[tuple[int, torch.dtype, torch.device], Tables] = {}

    def forward(self, positions_BT: Tensor | None, length: int, like: Tensor) -> Tables:
        """Tables for the positions, or for 0..length-1 where there are none, in the dtype and on the device of
        `like`."""
        key = (length, like.dtype, like.device)
        if positions_BT is None and key in self._kept:
            return self._kept[key]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        places = torch.arange(length, device=like.device)[None] if positions_BT is None else positions_BT

        def waves(length: int) -> tuple[Tensor, float]:
            return frequencies(self.head_dim, self.theta, self.scaling, self.context, wide, length)

        if positions_BT is None or self.turn is None:
            inverse, factor = waves(length)
        else:  # each row by its own length, in any company
            (short_E2, factor), (long_E2, _) = waves(self.turn), waves(self.turn + 1)
            inverse = torch.where((places >= self.turn).any(-1)[:, None, None], long_E2.to(like.device), short_E2.to(like.device))
        angles = places[..., None].to(wide) * inverse.to(like.device)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        tables = torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)
        if positions_BT is None and not torch.is_inference_mode_enabled():
            self._kept = {**dict(list(self._kept.items())[-7:]), key: tables}
        return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., E), first half against second half, by tables (..., E) that broadcast against it.

    Whole rows are multiplied, with a copy whose halves have changed places: on a CPU a copy costs a quarter of a
    product, and products of half rows cost as much as those of whole ones.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `rotate`: its gradient."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin.roll(half, -1))


class Learned(nn.Module):
    """A vector for each position; the first `offset` rows of the table stand before position 0 and are not used."""

    def __init__(self, count: int, width: int, offset: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count + offset, width))
        self.offset, self.count = offset, count

    def forward(self, positions_BT: Tensor | None, length: int, like: Tensor) -> Tensor:
        """(1 or B, T, D) for the positions, or for 0..length-1 where there are none, in the dtype of `like`."""
        if positions_BT is None:
            return self.weight[self.offset:self.offset + length].to(like.dtype)[None]
        return F.embedding(positions_BT + self.offset, self.weight).to(like.dtype)


class Sinusoidal(nn.Module):
    """Sines and cosines of geometric waves (arXiv 1706.03762), all sines before all cosines; holds no parameters.

    The values are rounded to float32, as in the tables that published models come with.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.count = width, None

    def forward(self, positions_BT: Tensor | None, length: int, like: Tensor) -> Tensor:
        """(1 or B, T, D) for the positions, or for 0..length-1 where there are none, in the dtype of `like`."""
        where = torch.device("cpu") if like.device.type == "mps" else like.device  # which has no float64
        places = torch.arange(length, device=where)[None] if positions_BT is None else positions_BT.to(where)
        channels = torch.arange(0, self.width, 2, dtype=torch.float64, device=where)
        angles = places[..., None].double() / 10000 ** (channels / self.width)
        waves = torch.cat([angles.sin(), angles.cos()[..., :self.width // 2]], -1)
        return waves.float().to(like.device, like.dtype)


class RelativeBias(nn.Module):
    """A bias on the scores for each head and each distance, of which far ones share buckets (arXiv 1910.10683)."""

    def __init__(self, buckets: int, max_distance: int, heads: int, *, both_ways: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.buckets, self.max_distance, self.both_ways = buckets, max_distance, both_ways

    def forward(self, length: int, sources: int, like: Tensor) -> Tensor:
        """(1, H, T, S) for T queries at the end of S keys, in the dtype of `like`."""
        places = torch.arange(sources, device=like.device)
        ahead = places[None] - places[sources - length:, None]
        found = F.embedding(self.bucket(ahead), self.weight)
        return found.permute(2, 0, 1)[None].to(like.dtype)

    def bucket(self, ahead: Tensor) -> Tensor:
        """The row of the table for a key that stands so many places ahead of its query (behind it where negative)."""
        count, first = self.buckets, torch.zeros_like(ahead)
        if self.both_ways:
            count //= 2
            first = (ahead > 0) * count
            distance = ahead.abs()
        else:
            distance = (-ahead).clamp(min=0)
        exact = count // 2  # near distances have a bucket each, the others grow geometrically
        share = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = exact + (share * (count - exact)).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=count - 1))

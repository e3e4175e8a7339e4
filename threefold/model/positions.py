"""Where a token stands: learned vectors added to the embedding, or a rotation of queries and keys.

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
from torch import Tensor, nn

Tables = tuple[Tensor, Tensor]  # cosines and signed sines (1 or B, T, E): [cos, cos] and [-sin, sin]


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, context: int, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Radians per position (E / 2,) and the factor on cosines and sines. `context` is the longest one that the model
    is meant for.

    Sources: arXiv 2104.09864; `linear` arXiv 2306.15595; `yarn` arXiv 2309.00071; `llama3` arXiv 2407.21783.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=dtype) / head_dim
    plain = 1.0 / theta ** exponents
    if not scaling:
        return plain, 1.0
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
    """Cosines and sines for the rotation of queries and keys; holds no parameters."""

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None, context: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling, self.context = head_dim, theta, dict(scaling or {}), context
        self._kept: dict[tuple[int, torch.dtype, torch.device], Tables] = {}

    def forward(self, positions_BT: Tensor | None, length: int, like: Tensor) -> Tables:
        """Tables for the positions, or for 0..length-1 where there are none, in the dtype and on the device of
        `like`."""
        key = (length, like.dtype, like.device)
        if positions_BT is None and key in self._kept:
            return self._kept[key]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        inverse_E2, factor = frequencies(self.head_dim, self.theta, self.scaling, self.context, wide)
        places = torch.arange(length, device=like.device)[None] if positions_BT is None else positions_BT
        angles = places[..., None].to(wide) * inverse_E2.to(like.device)
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

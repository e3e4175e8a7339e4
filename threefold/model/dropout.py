"""Dropout whose mask is a function of (key of the row, place), not of a random state.

Decisions:
- The mask of a row depends on the row's own key, on the layer and on the place inside the row: splitting a batch into
  other micro-batches or resuming in the middle of a run gives the same masks, and nothing has to be stored. That of a token
  in a row does not depend on what the row is filled up with.
- Bits come from the finaliser of SplitMix64 over a counter, in wrapping int64 arithmetic: the same on every device. A word
  of 64 bits serves four places, 16 bits each: making the bits was a third of a step of fine-tuning (docs/log.md). So the
  probability is a multiple of 2^-16, and what is kept is scaled by that one.
- Without keys (somebody else's training loop) the keys are drawn from torch's own generator, as torch's dropout would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed number
_SITE = 0x9E3779B97F4A7C1
_LANE = 1 << 16  # values of the bits of one place
_M1, _M2 = -4658895280553007687, -7723592293110705685


def _mix_(x: Tensor) -> Tensor:
    """The finaliser, in place: temporaries of a batch's size cost more than the arithmetic."""
    x ^= (x >> 30).bitwise_and_((1 << 34) - 1)
    x *= _M1
    x ^= (x >> 27).bitwise_and_((1 << 37) - 1)
    x *= _M2
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


def site_keys(keys_B: Tensor, site: int) -> Tensor:
    """Where the bits (B,) of one place in the model begin: every layer and every kind of dropout has its own `site`."""
    step = (site + 1) * _SITE  # wrapped here to signed 64 bits: torch takes no Python number of 2^64 or more
    return _mix_(keys_B + ((step + 2**63) % 2**64 - 2**63))


def fresh_keys(batch: int, device: torch.device) -> Tensor:
    """Keys (B,) from torch's own generator."""
    return torch.randint(-2**63, 2**63 - 1, (batch,), dtype=torch.int64, device=device)


def further(starts: Tensor, places: Tensor, width: int) -> Tensor:
    """Where the bits of the vectors of `width` numbers at some places of rows begin."""
    return starts + places * -(-width // 4) * _GOLDEN


def dropout(x: Tensor, p: float, starts_B: Tensor | None) -> Tensor:
    """x with each element zero with probability p and scaled by 1 / (1 - p) otherwise; x itself where p is 0 or there are no bits.
    `starts_B`: where the bits begin of each of the B pieces that x consists of, in order (`site_keys`, `further`).

    Source: arXiv 1207.0580; the hash is that of Steele, Lea and Flood (OOPSLA 2014).
    """
    return x if p == 0 or starts_B is None else x * kept(x.shape, x.dtype, p, starts_B)


def kept(shape: Sequence[int], dtype: torch.dtype, p: float, starts_B: Tensor) -> Tensor:
    """What `dropout` multiplies by: 0, or 1 / (1 - p)."""
    width, dropped = shape[-1], min(max(1, round(p * _LANE)), _LANE - 1)
    vectors, words = math.prod(shape) // (len(starts_B) * width), -(-width // 4)
    counter = torch.arange(vectors * words, dtype=torch.int64, device=starts_B.device)
    bits = _mix_(starts_B[:, None] + counter * _GOLDEN).view(-1, words).view(torch.int16)[:, :width]
    found = bits.ge_(dropped - _LANE // 2).to(dtype).div_(1 - dropped / _LANE)  # not as booleans: torch reads those one by one
    return found.view(*shape)

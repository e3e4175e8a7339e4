"""Dropout whose mask is a function of (key of the row, place), not of a random state.

Decisions:
- The mask of a row depends on the row's own key, on the layer and on the place inside the row: splitting a batch into
  other micro-batches or resuming in the middle of a run gives the same masks, and nothing has to be stored.
- Bits come from the finaliser of SplitMix64 over a counter, in wrapping int64 arithmetic: the same on every device.
- Without keys (somebody else's training loop) the keys are drawn from torch's own generator, as torch's dropout would.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed number
_SITE = 0x9E3779B97F4A7C1
_M1, _M2 = -4658895280553007687, -7723592293110705685


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _M1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _M2
    return x ^ (x >> 31 & (1 << 33) - 1)


def site_keys(keys_B: Tensor, site: int) -> Tensor:
    """The keys (B,) of one place in the model: every layer and every kind of dropout has its own `site`."""
    step = (site + 1) * _SITE  # wrapped here to signed 64 bits: torch takes no Python number of 2^64 or more
    return _mix(keys_B + ((step + 2**63) % 2**64 - 2**63))


def fresh_keys(batch: int, device: torch.device) -> Tensor:
    """Keys (B,) from torch's own generator."""
    return torch.randint(-2**63, 2**63 - 1, (batch,), dtype=torch.int64, device=device)


def dropout(x: Tensor, p: float, keys_B: Tensor | None) -> Tensor:
    """x (B, ...) with each element zero with probability p and scaled by 1 / (1 - p) otherwise; x itself where p is 0
    or keys are None.

    Source: arXiv 1207.0580; the hash is that of Steele, Lea and Flood (OOPSLA 2014).
    """
    if p == 0 or keys_B is None:
        return x
    places = torch.arange(x[0].numel(), dtype=torch.int64, device=x.device)
    bits = _mix(_mix(keys_B)[:, None] + places * _GOLDEN)
    keep = (bits >> 11 & (1 << 53) - 1) >= int(p * 2**53)
    return x * (keep.view(x.shape).to(x.dtype) / (1 - p))

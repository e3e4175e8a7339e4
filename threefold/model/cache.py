"""Keys and values already computed, so that a new token costs one row and not the whole text again.

Decisions:
- Room is made in advance and doubled when it is full; a step writes in place and copies nothing.
- All rows of a cache have the same length. Rows of different lengths are padded on the left and told apart by
  `attention_mask`.
- A fork copies (rows may then go different ways); a trim only moves the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Cache:
    """Keys and values (B, K, length, E) of every layer. `len(cache)` is the number of positions held."""

    def __init__(self, capacity: int = 256) -> None:
        """`capacity` is the number of positions to make room for at first; it grows."""
        self.capacity = max(1, capacity)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # of the encoder's text, by layer

    def __len__(self) -> int:
        return self._lengths[0] if self._lengths else 0

    def get_seq_length(self) -> int:
        """`len(cache)`, under transformers' name."""
        return len(self)

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind those of a layer; returns all of that layer (B, K, S, E). Layers come in
        order."""
        batch, heads, new, width = k_BKTE.shape
        if layer == len(self._keys):
            room = (batch, heads, max(self.capacity, new), width)
            self._keys.append(k_BKTE.new_empty(room))
            self._values.append(v_BKTE.new_empty(room))
            self._lengths.append(0)
        start = self._lengths[layer]
        end = start + new
        if end > self._keys[layer].shape[2]:
            self._grow(layer, end)
        self._keys[layer][:, :, start:end] = k_BKTE
        self._values[layer][:, :, start:end] = v_BKTE
        self._lengths[layer] = end
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def memory(self, layer: int, read: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, E) of an encoder's text in a layer: those of the first call, `read` then."""
        if layer not in self._memory:
            self._memory[layer] = read()
        return self._memory[layer]

    def fork(self, rows: Sequence[int] | Tensor) -> Cache:
        """A new cache whose rows are copies of the named rows of this one, in that order and as often as named."""
        other = Cache(self.capacity)
        for k, v, length in zip(self._keys, self._values, self._lengths, strict=True):
            index = torch.as_tensor(rows, dtype=torch.int64, device=k.device)
            other._keys.append(k.index_select(0, index))
            other._values.append(v.index_select(0, index))
            other._lengths.append(length)
        for layer, (k, v) in self._memory.items():
            index = torch.as_tensor(rows, dtype=torch.int64, device=k.device)
            other._memory[layer] = k.index_select(0, index), v.index_select(0, index)
        return other

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot trim a cache of {len(self)} positions to {length}")
        self._lengths = [length] * len(self._lengths)

    def _grow(self, layer: int, needed: int) -> None:
        for store in (self._keys, self._values):
            old = store[layer]
            grown = old.new_empty(*old.shape[:2], max(needed, 2 * old.shape[2]), old.shape[3])
            grown[:, :, : self._lengths[layer]] = old[:, :, : self._lengths[layer]]
            store[layer] = grown

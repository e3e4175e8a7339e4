"""A keyed permutation of `range(n)`, computed for each index by itself.

Decisions:
- The order of an epoch is a function, not a list: no shuffle buffer, no memory that grows with the data, and the
  millionth sample of the hundredth epoch costs the same as the first. Resuming needs nothing but the index.
- A Feistel network over two unequal halves: an index is written as `left * b + right` with `left` in Z_a and `right` in
  Z_b, and each round adds a hash of one half to the other, modulo its size. That is invertible for every a and b, so
  a = ceil(sqrt(n)) and b = ceil(n / a) hold the domain within one row of n, where the usual power of two would be up
  to four times too large. (M. Luby, C. Rackoff, "How to construct pseudorandom permutations", 1988.)
- What falls outside of n is permuted again until it falls inside ("cycle walking": J. Black, P. Rogaway, "Ciphers with
  arbitrary finite domains", 2002). Less than one index in sqrt(n) walks at all.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

ROUNDS = 8

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2 = np.uint64(30), np.uint64(27)


def permute(n: int, key: int, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where each of `index` goes under the permutation of `range(n)` that `key` names.

    `index` is an integer array of any shape with values in [0, n); the result has its shape. For a fixed `n` and `key`
    the map is a bijection of `range(n)`. Raises `ValueError` where `n` is below 1 or an index is outside.
    """
    if n < 1:
        raise ValueError(f"cannot permute {n} items")
    index = np.asarray(index, dtype=np.int64)
    if index.size and (int(index.min()) < 0 or int(index.max()) >= n):
        raise ValueError(f"an index is outside of [0, {n}): the indices reach from {index.min()} to {index.max()}")
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = _round_keys(key)
    value = _network(index.ravel().astype(np.uint64), rows, columns, keys)
    while (outside := np.flatnonzero(value >= n)).size:
        value[outside] = _network(value[outside], rows, columns, keys)
    return value.astype(np.int64).reshape(index.shape)


def _network(value: npt.NDArray[np.uint64], rows: int, columns: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    """One pass of the network over Z_rows x Z_columns; indices are rows * columns of them, some beyond n."""
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = np.divmod(value, b)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _hash(right, key) % a) % a
        else:
            right = (right + _hash(left, key) % b) % b
    return left * b + right


def _hash(value: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (G. L. Steele et al., "Fast splittable pseudorandom number generators", 2014)."""
    mixed = value + np.uint64(key)
    mixed = (mixed ^ (mixed >> _SHIFT_1)) * _MIX_1
    mixed = (mixed ^ (mixed >> _SHIFT_2)) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def _round_keys(key: int) -> list[int]:
    """`ROUNDS` keys of 64 bits from one, by splitmix64 in plain integers."""
    keys, state = [], key & _WORD
    for _ in range(ROUNDS):
        state = (state + _GOLDEN) & _WORD
        mixed = ((state ^ (state >> 30)) * int(_MIX_1)) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * int(_MIX_2)) & _WORD
        keys.append(mixed ^ (mixed >> 31))
    return keys

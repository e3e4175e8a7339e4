"""The keyed permutation: a bijection for every n, the same index by index, and without visible pattern."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.data.order import permute


@given(n=st.integers(1, 5000), key=st.integers(0, 2**63 - 1))
@settings(max_examples=150, deadline=None)
def test_it_is_a_bijection(n: int, key: int) -> None:
    assert (np.sort(permute(n, key, np.arange(n))) == np.arange(n)).all()


@pytest.mark.parametrize("n", list(range(1, 70)))
def test_every_small_n_is_a_bijection(n: int) -> None:
    for key in range(20):
        assert (np.sort(permute(n, key, np.arange(n))) == np.arange(n)).all()


@given(n=st.integers(1, 2**48), key=st.integers(0, 2**63 - 1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_an_index_does_not_depend_on_its_neighbours(n: int, key: int, data: st.DataObject) -> None:
    index = np.asarray(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(n, key, index)
    assert together.tolist() == [int(permute(n, key, i)) for i in index]
    assert (together >= 0).all() and (together < n).all()
    assert len(set(together.tolist())) == len(set(index.tolist()))


def test_the_values_are_fixed_for_ever() -> None:
    assert permute(10, 7, np.arange(10)).tolist() == [3, 4, 5, 8, 2, 6, 1, 7, 0, 9]
    assert permute(2**40, 2**63 - 1, [0, 1, 2**40 - 1]).tolist() == [603330663531, 797658711167, 244804776605]


def test_all_orders_of_four_are_about_equally_likely() -> None:
    orders = Counter(tuple(permute(4, key, np.arange(4))) for key in range(4800))
    assert len(orders) == 24 and min(orders.values()) > 140 and max(orders.values()) < 270   # 200 +- 5 sigma


def test_places_and_neighbours_look_random() -> None:
    n = 10_007
    order = permute(n, 3, np.arange(n))
    correlation = np.corrcoef(np.arange(n), order)[0, 1]
    assert abs(correlation) < 0.05                                   # 5 / sqrt(n)
    steps = np.diff(order)
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05    # differences of independent numbers: -1/2
    assert (steps == 1).sum() < 10


def test_shapes_and_errors() -> None:
    assert permute(9, 0, np.zeros((2, 3), dtype=np.int64)).shape == (2, 3)
    assert permute(9, 0, []).shape == (0,)
    assert permute(9, 0, 4).shape == ()
    for n, index in ((0, []), (5, [5]), (5, [-1])):
        with pytest.raises(ValueError):
            permute(n, 0, index)

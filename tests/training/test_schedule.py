"""Learning-rate schedules: pure functions of progress."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threefold.training import schedule

kinds = st.sampled_from(schedule.KINDS)
totals = st.integers(1, 5000)


@given(kinds, totals, st.integers(0, 500), st.floats(0, 1), st.data())
def test_between_nothing_and_the_peak(kind: str, total: int, warmup: int, cooldown: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * total))
    assert 0 <= schedule.factor(kind, step, total, warmup=warmup, cooldown=cooldown) <= 1 + 1e-12


@given(kinds, totals, st.integers(0, 100))
def test_it_falls_once_it_is_warm(kind: str, total: int, warmup: int) -> None:
    values = [schedule.factor(kind, step, total, warmup=warmup, cooldown=0.3) for step in range(warmup, total + 5)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


@given(st.sampled_from([kind for kind in schedule.KINDS if kind != "inverse_sqrt"]), totals, totals, st.integers(1, 50))
def test_the_warm_up_knows_nothing_of_the_end(kind: str, total: int, step: int, warmup: int) -> None:
    rise = min(1.0, (step + 1) / warmup)
    assert schedule.factor(kind, step, None, warmup=warmup) == rise
    assert schedule.factor(kind, 0, total, warmup=warmup) == pytest.approx(1 / warmup)


@given(st.sampled_from(["linear", "cosine", "wsd"]), st.integers(1, 400), st.integers(2, 9), st.floats(0.1, 1))
def test_a_longer_run_has_the_same_shape(kind: str, total: int, times: int, cooldown: float) -> None:
    for step in (0, total // 3, total // 2, total):
        a = schedule.factor(kind, step, total, warmup=0, cooldown=cooldown)
        b = schedule.factor(kind, step * times, total * times, warmup=0, cooldown=cooldown)
        assert a == pytest.approx(b)


def test_values() -> None:
    assert schedule.factor("linear", 50, 100, warmup=10) == 0.5
    assert schedule.factor("cosine", 50, 100, warmup=10) == pytest.approx(0.5)
    assert schedule.factor("cosine", 25, 100, warmup=10) == pytest.approx(0.853553390593)
    assert schedule.factor("wsd", 79, 100, warmup=10, cooldown=0.2) == 1.0
    assert schedule.factor("wsd", 90, 100, warmup=10, cooldown=0.2) == pytest.approx(0.5)
    assert schedule.factor("constant", 99, 100, warmup=10) == 1.0
    assert schedule.factor("linear", 100, 100, warmup=10) == 0.0
    assert schedule.factor("linear", 4, 100, warmup=10) == pytest.approx(0.5 * 0.96)
    assert schedule.factor("wsd", 99, 100, warmup=10, cooldown=0) == 1.0


def test_the_schedule_of_2017_is_that_of_its_formula() -> None:
    warmup, width = 40, 512
    def paper(number: int) -> float:
        return width**-0.5 * min(number**-0.5, number * warmup**-1.5)
    for step in (0, 7, 38, 39, 40, 159, 5000):
        expected = paper(step + 1) / paper(warmup)
        for total in (None, 100):
            assert schedule.factor("inverse_sqrt", step, total, warmup=warmup) == pytest.approx(expected)

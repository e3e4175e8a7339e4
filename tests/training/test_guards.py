"""Guards, signals and what a checkpoint is made of, one by one; whole runs are in tests/faults."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.kit import tiny_trainer
from threefold.training.guards import WINDOW, SpikeGuard, dump_batch, is_finite
from threefold.training.signals import HANDLED, Signals


@given(
    st.integers(0, 2**32), st.integers(WINDOW, WINDOW + 40), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 5.9)
)
@settings(max_examples=50)
def test_a_spike_is_six_deviations_above_the_mean(
    seed: int, count: int, centre: float, spread: float, share: float
) -> None:
    values = np.random.default_rng(seed).normal(centre, spread, count).tolist()
    guard = SpikeGuard()
    for value in values:
        guard.add(value, 1.0)
    past = values[-WINDOW:]
    mean = math.fsum(past) / WINDOW
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in past) / WINDOW)
    assert not guard.is_spike(mean + share * deviation, 1.0)
    if deviation > 1e-3 * abs(mean):
        assert guard.is_spike(mean + 6.01 * deviation, 1.0)
    assert not guard.is_spike(mean - 100 * deviation - 1, 0.0), "a fall is no spike"


def test_either_number_may_stand_out() -> None:
    guard = SpikeGuard()
    for n in range(WINDOW):
        guard.add(1.0 + n % 2, 1.0 + n % 2)
    assert guard.is_spike(9.0, 1.5) and guard.is_spike(1.5, 9.0) and not guard.is_spike(2.0, 2.0)


def test_finite() -> None:
    assert is_finite(1.0, -1e308) and not is_finite(1.0, math.nan) and not is_finite(math.inf) and is_finite()


def test_a_dump_replaces_an_older_one(tmp_path: Path) -> None:
    batch = tiny_trainer(tmp_path).loader.batch(0)
    path = tmp_path / "dumps" / "step-000001.safetensors"
    assert dump_batch(path, batch) == dump_batch(path, batch) == f"the batch is in `{path}`"


def test_signals_are_handed_back() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with Signals() as signals:
        assert signals.received == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == signal.SIGTERM and signals.name == "SIGTERM", "the first one counts"
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen = []

    def work() -> None:
        with Signals() as signals:
            seen.append(signals.received)

    before = [signal.getsignal(number) for number in HANDLED]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0] and [signal.getsignal(number) for number in HANDLED] == before


@pytest.mark.parametrize("seconds", [0.0, 1e-12])
def test_F19_a_clock_that_stands_still(tmp_path: Path, seconds: float) -> None:
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer._after(0, trainer._step(0, trainer.loader.batch(0)), seconds)
    assert trainer.log.lines()[0]["tokens_per_second"] > 0

"""How long a run is: arithmetic on decisions, with a clock that is handed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.kit import FakeClock
from threefold.training.decisions import Decisions
from threefold.training.length import Length, Limits
from threefold.training.log import RunLog


def length(run: Path, clock: FakeClock | None = None, *, warmup: int = 4, **settings: Any) -> Length:
    run.mkdir(parents=True, exist_ok=True)
    limits = {k: settings.pop(k) for k in ("steps", "budget", "converged", "patience") if k in settings}
    return Length(
        Limits(**limits),
        Decisions(RunLog(run / "log.jsonl")),
        warmup=warmup,
        clock=clock or FakeClock(),
        **{"closing_seconds": 0.0, "tokens_per_step": 100, **settings},
    )


def bought(it: Length) -> list[tuple[int, int]]:
    return [(step, value["steps"]) for step, value in it.decisions.known("steps")]


def go(it: Length, clock: FakeClock, first: int, last: int, seconds: float = 0.1) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        it.measured(step, seconds)


def test_a_budget_is_looked_at_however_long_the_warm_up(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path / "many", clock, budget=10.0, steps=10**6, warmup=20_000)
    go(it, clock, 1, 79)
    assert not bought(it)
    go(it, clock, 80, 81)
    assert bought(it)[0][0] in (80, 81) and it.end(81) < 110
    clock = FakeClock()
    it = length(tmp_path / "long", clock, budget=60.0, warmup=12)
    go(it, clock, 1, 2, 40.0)
    assert bought(it) == [(2, 3)], "two steps were longer than all of it"


def test_evaluations_are_spread_over_the_steps_that_are_made(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path, clock, budget=1000.0, steps=50, evaluations=4)
    go(it, clock, 1, 4)
    assert it.end(4) == 50 and [step for step in range(50) if it.is_evaluation(step)] == [9, 18, 27, 36, 45]


def test_steps_alone(tmp_path: Path) -> None:
    it = length(tmp_path, steps=10, eval_every=4)
    assert [it.is_over(step) for step in (0, 9, 10, 11)] == [False, False, True, True] and it.end(0) == 10
    assert [step for step in range(12) if it.is_evaluation(step)] == [4, 8]
    assert it.cooling(9) is None and not it.keeps_best and it.decisions.known("steps") == []


def test_a_budget_is_measured_after_the_warm_up(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path, clock, budget=10.0, evaluations=4)
    go(it, clock, 1, 3)
    assert it.end(3) is None and not it.is_over(10**9) and not it.is_evaluation(2)
    go(it, clock, 4, 4)
    steps = 4 + int((9.9 - 0.4) * 0.97 / 0.1)
    assert bought(it) == [(4, steps)] and it.end(4) == steps and it.end(3) is None
    every = (steps - 4) // 5
    assert [step for step in range(100) if it.is_evaluation(step)] == [n * every for n in range(1, 99 // every + 1)]
    go(it, clock, 5, 20)
    assert bought(it) == [(4, steps)], "between evaluations nothing is revised"
    go(it, clock, 21, 40, 0.2)
    assert it.after_evaluation(40, waited=0, best=lambda: 0) is None
    assert bought(it)[1][0] == 40 and bought(it)[1][1] == 40 + int((9.9 - 6.0) / 0.2)
    assert it.planned_end(39) == steps and it.planned_end(40) == bought(it)[1][1]


def test_the_clock_started_with_the_process(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path, clock, budget=10.0, started=clock.now - 7)
    assert it.elapsed() == 7
    it.carried = 2.5
    assert it.elapsed() == 9.5
    go(it, clock, 1, 4)
    assert bought(it) == [(3, 4)], "nothing is left: one more step, not none and not minus forty"


def test_the_last_evaluation_is_set_aside(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path, clock, budget=10.0, validation_tokens=1000, closing_seconds=1.0)
    go(it, clock, 1, 4)
    assert bought(it)[0][1] == 4 + int((9.9 - 0.4 - 1.0 - 0.5 * 0.1 / 100 * 1000) * 0.97 / 0.1), "guessed"
    it.evaluated(0.2, 100)
    it.evaluated(0.0, 0)
    it.after_evaluation(5, waited=0, best=lambda: 0)
    assert abs(bought(it)[1][1] - 5 - (9.9 - 0.4 - 1.0 - 2.0) / 0.1) <= 1, "measured"


def test_an_evaluation_that_would_eat_the_budget_is_cut(tmp_path: Path) -> None:
    """Half of the budget at most; what fits in then is measured again with each evaluation."""
    clock = FakeClock()
    it = length(tmp_path, clock, budget=100.0, validation_tokens=1_000_000)
    assert it.closing_tokens(10) is None
    go(it, clock, 1, 4)
    assert it.closing_tokens(3) is None and it.closing_tokens(4) == int(50 / (0.5 * 0.1 / 100))
    assert bought(it)[0][1] == 4 + int((99 - 0.4 - 50) * 0.97 / 0.1)
    it.evaluated(1.0, 1000)
    it.after_evaluation(5, waited=0, best=lambda: 0)
    assert it.closing_tokens(5) == 50_000
    it.evaluated(0.01, 1000)
    it.after_evaluation(6, waited=0, best=lambda: 0)
    assert it.closing_tokens(6) is None and it.closing_tokens(5) == 50_000


def test_whichever_comes_first(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path, clock, budget=10.0, steps=30)
    go(it, clock, 1, 4)
    assert it.end(3) == it.end(4) == 30
    slow = length(tmp_path / "slow", clock, budget=1.0, steps=30)
    go(slow, clock, 1, 4)
    assert slow.end(4) == bought(slow)[0][1] < 30


def test_median_of_the_steps_without_the_first(tmp_path: Path) -> None:
    clock = FakeClock()
    it = length(tmp_path, clock, budget=100.0, warmup=5)
    for step, seconds in enumerate((9.0, 0.1, 0.1, 3.0, 0.1), 1):
        it.measured(step, seconds)
    assert it.decisions.known("steps")[0][1]["seconds_per_step"] == 0.1


def test_a_resumed_session_measures_before_it_buys(tmp_path: Path) -> None:
    """Taken up behind the warm-up, with a budget that bought nothing yet."""
    clock = FakeClock()
    it = length(tmp_path, clock, budget=10.0)
    go(it, clock, 50, 51)
    assert bought(it) == []
    go(it, clock, 52, 52)
    assert bought(it)[0][0] == 52 and it.is_evaluation(10 * it.decisions.known("steps")[0][1]["eval_every"])


def test_one_slow_step_after_a_resume_says_nothing(tmp_path: Path) -> None:
    clock = FakeClock()
    go(length(tmp_path, clock, budget=10.0), clock, 1, 4)
    resumed = length(tmp_path, clock, budget=10.0)
    resumed.carried = 2.0
    go(resumed, clock, 30, 30, 5.0)
    resumed.after_evaluation(30, waited=0, best=lambda: 0)
    assert abs(bought(resumed)[1][1] - 30 - (9.9 - 2.0 - 5.0) / 0.1) <= 1, "its time is paid for, and no more than that"


def test_another_budget_buys_anew(tmp_path: Path) -> None:
    clock = FakeClock()
    go(length(tmp_path, clock, budget=1.0), clock, 1, 4)
    more = length(tmp_path, clock, budget=50.0)
    assert more.end(4) is None
    go(more, clock, 5, 8)
    assert len(bought(more)) == 2 and more.end(8) == bought(more)[1][1] > 100
    assert length(tmp_path, clock, budget=1.0).end(8) == bought(more)[0][1], "and the first one still holds for itself"
    assert length(tmp_path, clock, steps=20).end(8) == 20


def test_patience(tmp_path: Path) -> None:
    it = length(tmp_path, converged=True, patience=3, eval_every=10)
    assert it.end(0) is None and it.keeps_best
    assert it.after_evaluation(30, waited=2, best=lambda: pytest.fail("not yet")) is None
    assert it.after_evaluation(40, waited=3, best=lambda: 10) == 10
    assert (
        it.cooling(9) is None
        and it.cooling(10) == (10, 20) == it.cooling(15)
        and it.end(10) == 20
        and it.end(9) is None
    )
    assert it.after_evaluation(20, waited=9, best=lambda: pytest.fail("once")) is None
    again = length(tmp_path, converged=True, patience=3)
    assert again.cooling(10) == (10, 20) and not again.is_over(19) and again.is_over(20)


def test_the_cool_down_is_a_fifth_and_ends_with_the_run(tmp_path: Path) -> None:
    it = length(tmp_path, converged=True, patience=1, steps=1100, eval_every=10)
    assert it.after_evaluation(1010, waited=1, best=lambda: 1000) == 1000
    assert it.cooling(1000) == (1000, 1200) and it.end(1000) == 1100 and it.planned_end(1000) == 1100


def test_what_is_evaluated_before_the_last_evaluation_is_reserved_too(tmp_path: Path) -> None:
    steps = {}
    for name, before in (("once", 0), ("twice", 500)):
        clock = FakeClock()
        it = length(tmp_path / name, clock, budget=10.0, validation_tokens=500, before_last=before)
        it.evaluated(1.0, 500)
        go(it, clock, 1, 4)
        steps[name] = 4 + int(((9.9 - 0.4 - (2.0 if before else 1.0)) * 0.97) / 0.1)
        assert it.end(4) == steps[name]
    assert steps["twice"] < steps["once"]

"""Decisions: on disk before they are returned, and never taken twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.kit import FaultyFiles
from threefold.errors import DiskError
from threefold.training.decisions import Decisions
from threefold.training.log import Line, RunLog


def fresh(path: Path, replay: list[Line] | None = None) -> Decisions:
    return Decisions(RunLog(path), replay or [])


def never() -> dict[str, Any]:
    pytest.fail("it was known")


def test_taken_once_and_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = fresh(path)
    assert first.make("steps", 4, lambda: {"steps": 10}) == {"steps": 10}
    assert first.make("steps", 8, lambda: None) is None
    for again in (first, fresh(path)):
        assert again.make("steps", 4, never) == {"steps": 10}
        assert again.known("steps") == [(4, {"steps": 10})] and again.known("plan") == [] and not again.replaying
    assert RunLog(path).lines() == [{"event": "decision", "step": 4, "decision": "steps", "steps": 10}]
    assert fresh(path).make("steps", 8, lambda: {"steps": 9}) == {"steps": 9}


def test_durable_before_it_is_returned(tmp_path: Path) -> None:
    decisions = fresh(tmp_path / "log.jsonl")
    with FaultyFiles() as disk:
        decisions.make("plan", 0, lambda: {"x": 1})
    kinds = [kind for kind, _ in disk.seen]
    assert kinds == ["open", "write", "fsync", "fsync_dir"]
    for kind in ("open", "write", "fsync"):
        with FaultyFiles(1, kind=kind), pytest.raises(DiskError):
            decisions.make(f"other-{kind}", 1, lambda: {"x": 2})
        assert decisions.known(f"other-{kind}") == []


def test_order_of_steps_and_order_of_taking(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    decisions = fresh(path)
    for at, to in ((20, 15), (17, 10), (30, 25)):
        decisions.make("rollback", at, lambda to=to: {"to": to})  # type: ignore[misc]
    for again in (decisions, fresh(path)):
        assert [at for at, _ in again.known("rollback")] == [17, 20, 30]
        assert [at for at, _ in again.taken("rollback", "converged")] == [20, 17, 30]


def test_the_last_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    decisions = fresh(path)
    for rows in (4, 2, 1):
        decisions.revise("micro_batch", 3, {"rows": rows})
    for again in (decisions, fresh(path), fresh(tmp_path / "other.jsonl", RunLog(path).lines())):
        assert again.make("micro_batch", 3, never) == {"rows": 1}


def replayed(tmp_path: Path, *, ended: bool) -> Decisions:
    log = RunLog(tmp_path / "replayed.jsonl")
    earlier = Decisions(log)
    earlier.make("plan", 0, lambda: {"width": 64})
    earlier.make("spike", 7, lambda: {"action": "skip"})
    log.append({"step": 10, "loss": 1.0})
    if ended:
        log.append({"event": "finished", "step": 10})
    return fresh(tmp_path / "own.jsonl", log.lines())


def test_replay_makes_no_decision_of_its_own(tmp_path: Path) -> None:
    decisions = replayed(tmp_path, ended=True)
    assert decisions.replaying and decisions.coming("spike") == [(7, {"action": "skip"})]
    assert decisions.make("plan", 0, never) == {"width": 64}
    assert decisions.make("spike", 5, never) is None and decisions.make("spike", 7, never) == {"action": "skip"}
    assert decisions.make("spike", 99, never) is None and decisions.coming("spike") == []
    assert [line["decision"] for line in RunLog(tmp_path / "own.jsonl").lines()] == ["plan", "spike"]


def test_what_is_suffered_is_recorded_also_in_a_replay(tmp_path: Path) -> None:
    decisions = replayed(tmp_path, ended=True)
    assert decisions.make("skip", 5, lambda: {"why": "nan"}, forced=True) == {"why": "nan"}
    assert fresh(tmp_path / "own.jsonl").known("skip") == [(5, {"why": "nan"})]


def test_behind_the_end_of_a_log_that_broke_off(tmp_path: Path) -> None:
    decisions = replayed(tmp_path, ended=False)
    assert decisions.make("steps", 9, never) is None
    assert decisions.make("steps", 10, lambda: {"steps": 50}) == {"steps": 50}


def test_its_own_log_comes_first(tmp_path: Path) -> None:
    fresh(tmp_path / "own.jsonl").make("plan", 0, lambda: {"width": 32})
    assert replayed(tmp_path, ended=True).make("plan", 0, never) == {"width": 32}

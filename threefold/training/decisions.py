"""Decisions: what is not a function of (data, seed, step), written down before it takes effect, replayed on resume.

Decisions taken here:
- There is one door. A size chosen from a time budget, the steps a budget buys, a halved micro-batch, a skipped spike, a
  rollback, "converged": each is asked for by (kind, step). If the log knows the answer, that is the answer; else it is
  made, appended to the log and synced, and only then returned.
- `--replay LOG` hands the decisions of another run to a new one, which then takes the same path bit for bit, up to
  where that log ends.
- A rollback leaves a path. The steps are counted anew from where it went back to; the batches go on behind the one that
  caused it, so that every batch is trained on at most once on the path that is left in the end. What was decided about
  a batch does not hold for the batch that has its step on the next path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from threefold.training.log import Line, RunLog

Value = dict[str, Any]
Key = tuple[str, int, int]  # kind, step, path

LEAVING = ("rollback", "converged")  # they go back to an earlier checkpoint, and another path begins there
PER_PATH = ("spike", "skip", "converged")  # a step that is come to again on another path is decided anew


class Decisions:
    """The decisions of one run: those in its own log first, then those of a log to replay."""

    def __init__(self, log: RunLog, replay: Iterable[Line] = ()) -> None:
        self._log = log
        self._own = _index(log.lines())
        lines = list(replay)
        self._replay = _index(lines)
        self._replayed_until = max((int(line.get("step", 0)) for line in lines), default=0)
        self._replay_ended = any(line.get("event") == "finished" for line in lines)

    def make(self, kind: str, step: int, choose: Callable[[], Value | None], *, forced: bool = False) -> Value | None:
        """The decision `kind` at `step`: replayed if known, else chosen now. `choose` returns None where nothing is
        decided.

        With a replayed log, a decision that the log does not hold was not taken, and is not taken now, unless the log
        ends before this step or the decision is `forced`: not chosen, but suffered (a number that is none).
        """
        path = len(self.taken(*LEAVING)) if kind in PER_PATH else 0
        key = (kind, step, path)
        if key in self._own:
            return self._own[key]
        value = self._replay.get(key)
        if value is None and (forced or not self._follows(step)):
            value = choose()
        if value is not None:
            self._record(key, value)
        return value

    def revise(self, kind: str, step: int, value: Value) -> None:
        """Decide again what has just turned out not to hold (memory ran out once more): the last word counts."""
        self._record((kind, step, 0), value)

    def _record(self, key: Key, value: Value) -> None:
        kind, step, path = key
        line = {"event": "decision", "step": step, "decision": kind, **({"path": path} if path else {}), **value}
        self._log.append(line, sync=True)
        self._own[key] = value

    def known(self, kind: str) -> list[tuple[int, Value]]:
        """All decisions of one kind that are in force, by step."""
        return sorted(self.taken(kind), key=lambda pair: pair[0])

    def taken(self, *kinds: str) -> list[tuple[int, Value]]:
        """All decisions of some kinds, in the order in which they were taken: a rollback makes the two differ."""
        return [(step, value) for (name, step, _), value in self._own.items() if name in kinds]

    def coming(self, *kinds: str) -> list[tuple[int, Value]]:
        """Decisions of the replayed log that this run has not reached yet."""
        return [(key[1], value) for key, value in self._replay.items() if key[0] in kinds and key not in self._own]

    def batch_of(self, step: int) -> int:
        """The number of the batch that `step` trains on: the step, moved on by what rollbacks left behind."""
        paths: list[tuple[int, int]] = []  # from this step on, so many batches further
        for at, value in self.taken("rollback"):
            to = int(value["to"])
            paths = [*[path for path in paths if path[0] < to], (to, at + _shift(paths, at) + 1 - to)]
        return step + _shift(paths, step)

    @property
    def replaying(self) -> bool:
        """Whether another run's log is being followed."""
        return bool(self._replay)

    def _follows(self, step: int) -> bool:
        return bool(self._replay) and (self._replay_ended or step < self._replayed_until)


def _shift(paths: list[tuple[int, int]], step: int) -> int:
    return next((shift for start, shift in reversed(paths) if start <= step), 0)


def _index(lines: Iterable[Line]) -> dict[Key, Value]:
    found: dict[Key, Value] = {}
    for line in lines:
        if line.get("event") == "decision":
            value = {k: v for k, v in line.items() if k not in ("event", "step", "decision", "path")}
            found[str(line["decision"]), int(line["step"]), int(line.get("path", 0))] = value
    return found

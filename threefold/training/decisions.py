"""Decisions: whatever is not a function of (data, seed, step), written down before it takes effect and replayed on
resume.

Decisions taken here:
- There is one door. A size chosen from a time budget, the steps a budget buys, a halved micro-batch, a skipped spike, a
  rollback, "converged": each is asked for by (kind, step). If the log knows the answer, that is the answer; else it is
  made, appended to the log and synced, and only then returned.
- `--replay LOG` hands the decisions of another run to a new one, which then takes the same path bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from threefold.training.log import Line, RunLog

Value = dict[str, Any]


class Decisions:
    """The decisions of one run: those in its own log first, then those of a log to replay."""

    def __init__(self, log: RunLog, replay: Iterable[Line] = ()) -> None:
        self._log = log
        self._own = _index(log.lines())
        self._replay = _index(replay)

    def make(self, kind: str, step: int, choose: Callable[[], Value | None]) -> Value | None:
        """The decision `kind` at `step`: replayed if known, else chosen now. `choose` returns None where nothing is
        decided.

        With a replayed log, a decision that the log does not hold was not taken, and is not taken now.
        """
        key = (kind, step)
        if key in self._own:
            return self._own[key]
        value = self._replay.get(key) if self._replay else choose()
        if value is not None:
            self._log.append({"event": "decision", "step": step, "decision": kind, **value}, sync=True)
            self._own[key] = value
        return value

    def known(self, kind: str) -> list[tuple[int, Value]]:
        """All decisions of one kind that are in force, by step."""
        return sorted(
            ((step, value) for (name, step), value in self._own.items() if name == kind), key=lambda pair: pair[0]
        )

    @property
    def replaying(self) -> bool:
        """Whether another run's log is being followed."""
        return bool(self._replay)


def _index(lines: Iterable[Line]) -> dict[tuple[str, int], Value]:
    found = {}
    for line in lines:
        if line.get("event") == "decision":
            value = {k: v for k, v in line.items() if k not in ("event", "step", "decision")}
            found[str(line["decision"]), int(line["step"])] = value
    return found

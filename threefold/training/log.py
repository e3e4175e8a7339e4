"""The run's log: one JSON object a line, appended in one write; the only history there is.

Decisions:
- A step line has `step` and `loss`; everything else has `event` (evaluation, decision, saved, ...) and never `loss`.
- A torn last line (power cut) is cut off before anything is appended. On resume at step k the lines before stay byte
  for byte; step lines after k go, because the steps are done again, and so does the last evaluation at k, which comes
  after the checkpoint of k; decisions stay wherever they are, because they are replayed.
- A line that cannot be read is passed over: what stands after it, decisions above all, still holds.
- Not-a-number is written as a JSON string: a log that strict parsers refuse is no log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threefold import files

Line = dict[str, Any]


class RunLog:
    """Append to and read from `log.jsonl`. Reading never writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends_well = False

    def append(self, line: Line, *, sync: bool = False) -> None:
        """Add one line, whole or not at all; with `sync` it and all before it are on disk when the call returns."""
        if not self._ends_well:
            self._drop_torn_end()
        files.append_line(self.path, encode(line), sync=sync)

    def sync(self) -> None:
        """Make all lines so far durable."""
        if self.path.exists():
            files.sync_file(self.path)

    def lines(self) -> list[Line]:
        """All whole lines, in order."""
        return [line for line, _ in self._raw() if line is not None]

    def resume_at(self, step: int) -> None:
        """Forget what is done again from `step` on: step lines and events, but no decisions."""
        raw = list(self._raw())
        cut = next((i for i, (line, _) in enumerate(raw) if line is not None and _is_undone(line, step)), len(raw))
        while cut and raw[cut - 1][0] is None:
            cut -= 1
        kept = [data for line, data in raw[cut:] if line is not None and line.get("event") == "decision"]
        size = sum(len(data) for _, data in raw[:cut])
        if not self.path.exists() or size == self.path.stat().st_size:
            return
        if not kept:
            files.truncate_file(self.path, size)  # the prefix is never rewritten
        else:
            prefix = self.path.read_bytes()[:size]
            files.write_atomic(self.path, prefix + b"".join(kept))

    def _drop_torn_end(self) -> None:
        whole = sum(len(data) for _, data in self._raw() if data.endswith(b"\n"))
        if self.path.exists() and whole < self.path.stat().st_size:
            files.truncate_file(self.path, whole)
        self._ends_well = True

    def _raw(self) -> Iterator[tuple[Line | None, bytes]]:
        """Every line with its bytes; None where it is not a whole JSON object."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for data in file:
                try:
                    line = json.loads(data) if data.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    line = None
                yield line if isinstance(line, dict) else None, data


def is_last_evaluation(line: Line) -> bool:
    """Whether a line is the evaluation that closes a run; older logs know it by its being whole."""
    return line.get("event") == "evaluation" and bool(line.get("last", line.get("whole")))


def _is_undone(line: Line, step: int) -> bool:
    event, at = line.get("event"), int(line.get("step", -1))
    if event == "decision":
        return False
    return at > step or (at == step and (event == "finished" or is_last_evaluation(line)))


def encode(line: Line) -> str:
    """One line of strict JSON that is valid UTF-8, whatever text it holds."""
    plain = {key: _plain(value) for key, value in line.items()}
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from a model's output
        text = json.dumps(plain, allow_nan=False)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value

"""The run's log: one JSON object a line, appended in one write; the only history there is.

Decisions:
- A step line has `step` and `loss`; everything else has `event` (evaluation, decision, sample, ...) and never `loss`.
- A torn last line (power cut) is dropped on opening. On resume at step k the lines before stay byte for byte; step
  lines after k go, because the steps are done again; decisions stay wherever they are, because they are replayed.
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
    """Append to and read from `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Line, *, sync: bool = False) -> None:
        """Add one line; with `sync` it is on disk when the call returns."""
        files.append_line(self.path, encode(line), sync=sync)

    def lines(self) -> list[Line]:
        """All whole lines, in order."""
        return [line for line, _ in self._raw()]

    def resume_at(self, step: int) -> None:
        """Forget what is done again: step lines and events (but decisions) after `step`, and a torn last line."""
        raw = list(self._raw())
        cut = next((i for i, (line, _) in enumerate(raw) if _is_undone(line, step)), len(raw))
        kept = [data for line, data in raw[cut:] if line.get("event") == "decision"]
        size = sum(len(data) for _, data in raw[:cut])
        if not self.path.exists() or size == self.path.stat().st_size:
            return
        if not kept:
            files.truncate_file(self.path, size)  # the prefix is never rewritten
        else:
            prefix = self.path.read_bytes()[:size]
            files.write_atomic(self.path, prefix + b"".join(kept))

    def _raw(self) -> Iterator[tuple[Line, bytes]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for data in file:
                try:
                    line = json.loads(data)
                except ValueError:
                    return  # torn by a power cut: nothing after it can be trusted
                if not data.endswith(b"\n") or not isinstance(line, dict):
                    return
                yield line, data


def _is_undone(line: Line, step: int) -> bool:
    return line.get("event") != "decision" and int(line.get("step", -1)) > step


def encode(line: Line) -> str:
    """One line of strict JSON."""
    return json.dumps({key: _plain(value) for key, value in line.items()}, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value

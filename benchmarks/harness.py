"""What all measures share: processes with a clock around them, medians with their spread, results as JSON, the flags.

Decisions:
- A process is timed from outside, from before it is started until it has ended: whatever it does to get ready counts.
- The two sides take turns, and every other round goes backwards, so that a machine that warms up or slows down favours
  nobody.
- A result holds every single measurement. Medians and the table are computed from it whenever they are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import machine
from benchmarks.texts import Absent

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
THREEFOLD = (sys.executable, "-m", "threefold")
# No measure may depend on a network, and no tool should stop to look for one.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

Measurement = dict[str, Any]
Item = TypeVar("Item")


class BenchmarkError(Exception):
    """A process failed, or did not leave what was to be measured."""


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and how far they lie apart."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found), len(found))

    def words(self, unit: str = "", digits: int = 2) -> str:
        """`12.30 s (11.90 to 12.80)`."""
        shown = f"{self.median:,.{digits}f}{' ' * bool(unit)}{unit}"
        return shown if self.count == 1 else f"{shown} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def mean_words(values: Iterable[float], digits: int = 3) -> str:
    """`0.912 (0.910 to 0.915)`: the mean over seeds with the smallest and the largest; of one seed its value."""
    found = list(values)
    shown = f"{statistics.fmean(found):,.{digits}f}"
    return shown if len(found) == 1 else f"{shown} ({min(found):,.{digits}f} to {max(found):,.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. `value` is what `must` and `aim` bound from above; None where nothing was reached."""

    measure: str
    peer: str = "-"
    threefold: str
    compared: str = "-"
    value: float | None = None
    must: float | None = None
    aim: float | None = None
    limits: tuple[str, str] = ("-", "-")  # must and aim, in words

    @property
    def verdict(self) -> str:
        """Which of the two bounds holds."""
        if self.must is None:
            return "stated"
        if self.value is None or math.isnan(self.value) or self.value > self.must:
            return "falls short"
        return "aim reached" if self.aim is not None and self.value <= self.aim else "holds"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run of a measure found, as it is stored."""

    name: str
    measure: str
    made: str
    quick: bool
    machine: dict[str, Any]
    controls: dict[str, Any]
    versions: dict[str, Any]
    settings: dict[str, Any]
    measurements: list[Measurement]

    def values(self, key: str, **where: Any) -> list[float]:
        """The numbers under `key` in all measurements that agree with `where`."""
        return [float(m[key]) for m in self.measurements if key in m and all(m.get(k) == v for k, v in where.items())]

    def spread(self, key: str, **where: Any) -> Spread:
        """Their median and spread."""
        return Spread.of(self.values(key, **where))

    def save(self, folder: Path) -> Path:
        """Write `folder/<name>.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        beside = path.with_suffix(".json.part")
        beside.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a measure hands back: the name of its result, how it was set, and everything it measured."""

    name: str
    settings: dict[str, Any]
    measurements: list[Measurement]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure: `run` measures, `rows` shows a result, `details` adds tables of its own (Markdown)."""

    name: str
    summary: str
    repeats: int
    run: Callable[[argparse.Namespace], Findings]
    rows: Callable[[Result], list[Row]]
    details: Callable[[Result], str] = lambda result: ""
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


# -- taking turns ------------------------------------------------------------------------------------------------------


def rounds(repeats: int, sides: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """`(repetition, side)` for every side in every repetition; every other repetition goes backwards."""
    for repetition in range(repeats):
        for side in sides if repetition % 2 == 0 else reversed(sides):
            yield repetition, side


def timed(command: Sequence[str | Path]) -> tuple[float, str]:
    """Run a process to its end; wall seconds around it, and what it printed. Raises BenchmarkError if it failed."""
    start = time.monotonic()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.monotonic() - start
    if done.returncode:
        raise BenchmarkError(f"`{' '.join(map(str, command))}` ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return seconds, done.stdout


def json_of(command: Sequence[str | Path]) -> tuple[float, dict[str, Any]]:
    """`timed`, for a process whose last line is a JSON object."""
    seconds, output = timed(command)
    lines = output.strip().splitlines()
    if not lines:
        raise BenchmarkError(f"`{' '.join(map(str, command))}` printed nothing")
    found = json.loads(lines[-1])
    assert isinstance(found, dict)
    return seconds, found


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """An empty folder for the runs of a measure, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="threefold-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def say(text: str) -> None:
    """Talk, on stderr."""
    print(text, file=sys.stderr, flush=True)


def as_fraction(ratio: float) -> str:
    """`1/5.9` for what is smaller than one, `1.25` for the rest."""
    return f"1/{1 / ratio:.1f}" if 0 < ratio < 1 else f"{ratio:.2f}"


# -- running a measure -------------------------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every measure takes."""
    parser.add_argument("--repeats", type=int, metavar="N", help="measurements of each side (5 or more for a figure to quote)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; the figures mean nothing")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help=f"where the JSON goes (default {RESULTS.relative_to(ROOT)}; a temporary folder for --quick)",
    )


def perform(measure: Measure, options: argparse.Namespace) -> Result:
    """Measure, store, and print the head and the rows. Raises Absent or BenchmarkError."""
    from benchmarks.table import details, head, markdown

    values = argparse.Namespace(**vars(options))
    if values.repeats is None:
        values.repeats = 1 if values.quick else measure.repeats
    if values.repeats < 1:
        raise BenchmarkError(f"--repeats {values.repeats}: expected 1 or more")
    say(f"{measure.name}: {measure.summary}")
    facts, controls, versions = machine.facts(), machine.controls(quick=values.quick), machine.versions()
    say(head(facts, controls, versions))
    found = measure.run(values)
    result = Result(
        name=found.name,
        measure=measure.name,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quick=values.quick,
        machine=facts,
        controls=controls,
        versions=versions,
        settings=found.settings,
        measurements=found.measurements,
    )
    folder = values.results or (Path(tempfile.mkdtemp(prefix="threefold-quick-")) if values.quick else RESULTS)
    path = result.save(folder)
    print(markdown([result], [measure]))
    if more := details([result], [measure]):
        print("\n" + more)
    say(f"written to {path}\n")
    return result


def main(measure: Measure, arguments: Sequence[str] | None = None) -> int:
    """The command line of one measure; 2 where its data is not there."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{measure.name}", description=measure.summary)
    add_common_arguments(parser)
    measure.arguments(parser)
    return guarded(lambda: perform(measure, parser.parse_args(arguments)))


def guarded(run: Callable[[], object]) -> int:
    """Run, and turn what may go wrong into a message and an exit code."""
    try:
        run()
    except Absent as absent:
        say(f"error: {absent}")
        return 2
    except BenchmarkError as error:
        say(f"error: {error}")
        return 1
    return 0

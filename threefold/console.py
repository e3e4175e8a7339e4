"""What the program says: data on stdout, talk on stderr.

Decisions:
- One state for the process, set once by the command line (`configure`); nothing else is global.
- Everything but tables and moving bars is written plainly: `rich` is imported only where it draws.
- On a terminal a bar moves; elsewhere a line appears every few seconds. --quiet keeps warnings and errors.
- Colour only on a terminal that wants it (NO_COLOR, TERM=dumb), and never the only carrier of a meaning.
- Text from models, files and the network cannot steer the terminal: control characters are shown, not sent.
- A reader that goes away (`| head`) ends a command that was printing data for it, quietly, with success; talk and the
  lines of a training run are dropped, and the training goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from threefold.errors import DiskError, ThreefoldError

LINE_SECONDS = 5.0  # between lines of progress where stderr is no terminal
_COLOURS = {"red": "31", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2", "green": "32"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(kw_only=True)
class _State:
    quiet: bool = False
    json: bool = False
    debug: bool = False
    closed: bool = False  # stdout's reader went away


_state = _State()


def configure(*, quiet: bool = False, json: bool = False, debug: bool = False) -> None:
    """Set how the program talks; called once, by the command line."""
    _state.quiet, _state.json, _state.debug = quiet, json, debug
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a Latin-1 terminal is no reason to fail


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _state.quiet


def is_json() -> bool:
    """Whether --json was given: stdout carries one JSON object a line."""
    return _state.json


def is_debug() -> bool:
    """Whether --debug was given: errors show their traceback."""
    return _state.debug


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether a stream (stderr) is a terminal that can move its cursor."""
    stream = sys.stderr if stream is None else stream
    with contextlib.suppress(ValueError, AttributeError):
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def has_colour(stream: TextIO | None = None) -> bool:
    """Whether colour may be used: a terminal, and no NO_COLOR."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in a colour or in bold where the stream takes it."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if has_colour(stream) else text


def plain(text: str) -> str:
    """`text` without the power to steer a terminal: control characters but tab and newline become visible escapes."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


# ---------------------------------------------------------------------------------------------- talk: stderr

def say(message: str) -> None:
    """A line of talk; --quiet drops it."""
    if not _state.quiet:
        _talk(plain(message))


def note(message: str) -> None:
    """A line that begins with `note:`; --quiet drops it."""
    if not _state.quiet:
        _talk(f"{paint('note:', 'cyan')} {plain(message)}")


def notes(messages: Iterable[str]) -> None:
    """A note for each message."""
    for message in messages:
        note(message)


def warn(message: str, *, hint: str = "") -> None:
    """A line that begins with `warning:`, and one with `hint:`; --quiet keeps them."""
    _talk(f"{paint('warning:', 'yellow')} {plain(message)}")
    if hint:
        _talk(f"{paint('hint:', 'cyan')} {plain(hint)}")


def error(problem: BaseException) -> None:
    """An exception in the voice of the tool: `error:`, and `hint:` where there is one; its traceback with --debug."""
    if _state.debug:
        import traceback

        _talk(plain("".join(traceback.format_exception(problem)).rstrip()))
    message = str(problem) if isinstance(problem, ThreefoldError) else f"{type(problem).__name__}: {problem}"
    _talk(f"{paint('error:', 'red')} {plain(message)}")
    hint = problem.hint if isinstance(problem, ThreefoldError) else ""
    if not isinstance(problem, ThreefoldError) and not _state.debug:
        hint = "this is a fault of threefold: run again with --debug and report what it shows"
    if hint:
        _talk(f"{paint('hint:', 'cyan')} {plain(hint)}")


def _talk(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        _silence(sys.stderr)  # nobody listens: no reason to stop
    except (OSError, ValueError):
        pass


# ---------------------------------------------------------------------------------------------- data: stdout

def out(text: str, *, end: str = "\n", required: bool = True) -> None:
    """Data on stdout, at once. When its reader has gone, ends the program with success if the data was all it was for
    (`required`), and does nothing otherwise. Raises `DiskError` where stdout is a file on a full disk."""
    _emit((plain(text) if is_terminal(sys.stdout) else text) + end, required)


def _emit(text: str, required: bool = True) -> None:
    if not _state.closed:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            _state.closed = True
            _silence(sys.stdout)
        except OSError as problem:
            _silence(sys.stdout)
            words = (problem.strerror or str(problem)).lower()
            raise DiskError(f"cannot write to standard output: {words}") from problem
    if _state.closed and required:
        raise SystemExit(0)


def print_json(value: Any, *, required: bool = True) -> None:
    """One JSON object on one line of stdout. Numbers that are not finite become null, since JSON has none."""
    out(to_json(value), required=required)


def to_json(value: Any) -> str:
    """One line of strict JSON: paths as text, arrays and scalars of NumPy as lists and numbers, NaN as null."""
    return json.dumps(_jsonable(value), ensure_ascii=False, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return str(Path(value))
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    return [_jsonable(item) for item in value]


def _silence(stream: TextIO) -> None:
    """Point a stream to nowhere, so that the interpreter's own flush at exit finds nothing to complain about."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, *, title: str = "") -> None:
    """Rows as a table on stdout; with --json, as one object a line. Numbers stand right."""
    if _state.json:
        for row in rows:
            print_json(row)
        return
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    text = [[_cell(row.get(column)) for column in columns] for row in rows]
    if is_terminal(sys.stdout):
        _rich_table(columns, rows, text, title)
        return
    widths = [max([_width(column), *(_width(line[i]) for line in text)]) for i, column in enumerate(columns)]
    right = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    for line in ([[title]] if title else []) + [list(columns), *text]:
        padding = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=False)]
        cells = [pad + cell if r else cell + pad for cell, pad, r in zip(line, padding, right, strict=False)]
        out("  ".join(cells).rstrip() if line != [title] else title)


def _rich_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], text: list[list[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for line in text:
        drawn.add_row(*(Text(plain(cell)) for cell in line))
    console = Console(file=sys.stdout, no_color=not has_colour(sys.stdout), highlight=False, markup=False)
    with console.capture() as capture:
        console.print(drawn)
    _emit(capture.get())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


# ---------------------------------------------------------------------------------------------- progress

class Progress:
    """How far something is: `with progress(2000, "training") as bar: bar.update(step, loss=3.2)`."""

    def __init__(self, total: float | None, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.name, self.done = total, name, 0.0
        self._clock = clock
        self._said = clock()
        self._first: tuple[float, float] | None = None  # (time, done) of the first update
        self._facts: dict[str, Any] = {}
        self._draw: Callable[[], None] | None = None

    def update(self, done: float, **facts: Any) -> None:
        """Now at `done` of `total`; `facts` stand beside it (`loss=3.2`)."""
        self.done = done
        if self._first is None:
            self._first = self._clock(), done
        self._facts.update(facts)
        if self._draw is not None:
            self._draw()
        elif not _state.quiet and self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
            _talk(plain(self.line()))

    def advance(self, amount: float = 1, **facts: Any) -> None:
        """`amount` further."""
        self.update(self.done + amount, **facts)

    def facts(self) -> str:
        """`loss 3.21, 12,300 tokens/s`."""
        return ", ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in self._facts.items())

    def left(self) -> float | None:
        """Seconds left at the speed since the first update, if it can be known: what a resumed run did before, and what
        it prepared, says nothing about its speed."""
        if not self.total or self._first is None or self.done <= self._first[1]:
            return None
        began, before = self._first
        return (self._clock() - began) * max(0.0, self.total - self.done) / (self.done - before)

    def line(self) -> str:
        """The state as one line of text."""
        of = f"/{self.total:,.0f}" if self.total else ""
        parts = [f"{self.name} {self.done:,.0f}{of}", self.facts()]
        left = self.left()
        if left is not None:
            parts.append(f"{clock_words(left)} left")
        return ", ".join(filter(None, parts))


@contextlib.contextmanager
def progress(total: float | None, name: str) -> Iterator[Progress]:
    """A bar on a terminal, a line every few seconds elsewhere, nothing with --quiet."""
    state = Progress(total, name)
    if _state.quiet or not is_terminal():
        yield state
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
              TextColumn("{task.fields[words]}", markup=False),
              console=Console(file=sys.stderr, no_color=not has_colour()), transient=True, redirect_stdout=False)
    task = bar.add_task(name, total=total, words="")

    def draw() -> None:
        bar.update(task, completed=state.done, words=plain(state.line().removeprefix(name).strip()))

    state._draw = draw
    with bar:
        yield state


def clock_words(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size_words(count: float) -> str:
    """Bytes in words: `512 B`, `1.2 MB`, `3.4 GB` (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

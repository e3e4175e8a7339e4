"""What a user names -> documents: files, folders, globs, the running Python's own text, data sets of the hub.

Decisions:
- A file of running text is one document; a row of a table is one document, its column `text`.
- A file that is named is read or refused. In a folder or a glob, files of formats that hold no text are passed over,
  and files that turn out empty too; what was passed over is counted if the caller asks (`on_problem`, a `Skips` for
  example).
- Files are read in the order of their paths, so that the same folder gives the same documents on every machine.
- `python` is the standard library of the running interpreter without tests, idlelib and site-packages, and each topic
  of its built-in help. It is the corpus that every machine has.
- Nothing is mended here: cleaning is clean.py's.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threefold.errors import DataError, HubError, MissingExtra
from threefold.text.lines import DECODING_ERRORS, SNIFFED, decoded, open_bytes, refuse_binary, unreadable
from threefold.text.paths import Source, expand, parse_columns, parse_source
from threefold.text.rows import Columns, OnProblem, Row, format_of, map_rows, read_file_rows, text_field

__all__ = [
    "Document",
    "Row",
    "Skips",
    "Source",
    "expand",
    "parse_columns",
    "parse_source",
    "read_documents",
    "read_rows",
]

MAX_TEXT = 2**31  # bytes of one document of running text


@dataclass(frozen=True)
class Document:
    """One text, where it came from (`path` or `path:line`) and what to call it."""

    text: str
    source: str
    name: str


@dataclass
class Skips:
    """What was passed over and why: counts by reason with the first few places. Serves as `on_problem`."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, reason: str, where: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < 3:
            places.append(where)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `{reason: {"count": n, "examples": [...]}}`, most frequent first."""
        return {
            reason: {"count": self.counts[reason], "examples": self.examples[reason]}
            for reason in sorted(self.counts, key=lambda r: (-self.counts[r], r))
        }


def read_documents(
    spec: str | os.PathLike[str],
    columns: Columns | None = None,
    on_problem: OnProblem | None = None,
    *,
    on_empty: OnProblem | None = None,
) -> Iterator[Document]:
    """The documents of a source, one at a time.

    columns      `{"text": "review"}` or `{"text": "question+answer"}`; a source without the column keeps its own `text`
    on_problem   called with (reason, place) for what does not fit, which is then left out; without it that is an error
    on_empty     called so for what holds no text, which is never an error beside other text; `on_problem` unless given

    Raises `DataError` with file and line for what cannot be read, and if there is no document at all.
    """
    text, columns = os.fspath(spec), dict(columns or {})
    tell: OnProblem = on_empty or on_problem or (lambda reason, where: None)
    count = 0
    if text.startswith("hub:"):
        found = _hub_documents(text, columns, on_problem)
    else:
        found = _file_documents(expand(text), text, columns, on_problem, tell)
    for document in found:
        if document.text.strip():
            count += 1
            yield document
        else:
            tell("empty text", document.source)
    if not count:
        raise DataError(
            f"`{text}` holds no text",
            hint="check that it is what you meant; rows need a column `text`, or name one with --columns",
        )


def _file_documents(
    paths: Sequence[Path], spec: str, columns: Columns, on_problem: OnProblem | None, tell: OnProblem
) -> Iterator[Document]:
    python = spec == "python" and not Path(spec).exists()
    root = Path(sysconfig.get_path("stdlib")) if python else Path(spec)
    alone = len(paths) == 1 and paths[0] == Path(spec).expanduser()
    for path in paths:
        name = str(path.relative_to(root)) if path.is_relative_to(root) and path != root else path.name
        try:
            kind = format_of(path)
            if kind == "text" and columns and _is_table(path, columns):
                kind = "tsv"
            if kind == "text":
                yield Document(_whole(path), str(path), name)
                continue
            for row in read_file_rows(path, ("text",), columns, kind=kind, fallback=True, on_problem=on_problem):
                yield from _row_document(row, name, on_problem)
        except _Empty as error:
            if alone:
                raise DataError(*error.args, hint=error.hint) from None
            tell("empty file", str(path))
        except DataError as error:
            if on_problem is None and not python:
                raise
            tell(_reason(error), str(path))
    if python:
        yield from _python_topics()


def _row_document(row: Row, name: str, on_problem: OnProblem | None) -> Iterator[Document]:
    try:
        yield Document(text_field(row), row.source, f"{name}:{row.source.rpartition(':')[2]}")
    except DataError:
        if on_problem is None:
            raise
        on_problem("`text` is no string", row.source)


def _reason(error: DataError) -> str:
    words = str(error)
    return "not UTF-8" if "not UTF-8" in words else "binary or in another encoding" if "expected" in words else words


class _Empty(DataError):
    """A file without a byte in it."""


def _whole(path: Path) -> str:
    with open_bytes(path) as file:
        try:
            start = file.read(SNIFFED)
            if not start:
                raise _Empty(f"`{path}` is empty", hint="give a file that holds text")
            refuse_binary(path, start)
            data = start + file.read(MAX_TEXT + 1 - len(start))
        except DECODING_ERRORS as error:
            raise unreadable(path, error) from error
    if len(data) > MAX_TEXT:
        raise DataError(
            f"`{path}` holds more than {MAX_TEXT:,} bytes, too many for one document",
            hint="split it into files, or into the lines of a .jsonl file, one document each",
        )
    return decoded(data.removeprefix(b"\xef\xbb\xbf"), str(path), 1)


def _is_table(path: Path, columns: Mapping[str, str]) -> bool:
    """Whether a file that is not called so is a table with tabs: its first line names a column that was asked for."""
    with open_bytes(path) as file:
        try:
            header = (
                file.readline(SNIFFED)
                .removeprefix(b"\xef\xbb\xbf")
                .decode("utf-8", errors="replace")
                .rstrip("\r\n")
                .split("\t")
            )
        except DECODING_ERRORS as error:
            raise unreadable(path, error) from error
    names = {part for theirs in columns.values() for part in (theirs, *theirs.split("+"))}
    return len(header) > 1 and bool(names & set(header))


def _python_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave the built-in help out
        return
    for name in sorted(topics):
        yield Document(topics[name], f"pydoc:{name}", f"pydoc:{name}")


def _hub_rows(spec: str) -> Iterator[tuple[int, dict[str, Any]]]:
    name = spec.removeprefix("hub:")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"reading `{spec}`", "datasets", "data") from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        yield from enumerate((dict(row) for row in rows), 1)
    except Exception as error:
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"cannot read `{spec}`: {words}",
            hint="check the name and the connection; HF_TOKEN opens what needs a login",
        ) from error


def _hub_documents(spec: str, columns: Columns, on_problem: OnProblem | None) -> Iterator[Document]:
    for row in _hub_read(spec, ("text",), columns, fallback=True, on_problem=on_problem):
        yield from _row_document(row, spec, on_problem)


def _hub_read(
    spec: str, required: Sequence[str], columns: Columns | None, *, fallback: bool, on_problem: OnProblem | None
) -> Iterator[Row]:
    return map_rows(_hub_rows(spec), spec, required, columns or {}, fallback=fallback, on_problem=on_problem)


def read_rows(
    spec: str | os.PathLike[str],
    required: Sequence[str],
    columns: Columns | None = None,
    *,
    fallback: bool = False,
    on_problem: OnProblem | None = None,
) -> Iterator[Row]:
    """The rows of a file, folder, glob or `hub:NAME`, each with the fields `required`; other columns are kept beside
    them.

    Raises `DataError` with file, line, the columns seen and those expected; `on_problem` and `columns` as in
    `read_documents`, but a column that is mapped must exist unless `fallback`.
    """
    text = os.fspath(spec)
    if text.startswith("hub:"):
        yield from _hub_read(text, required, columns, fallback=fallback, on_problem=on_problem)
        return
    found = expand(text)
    beside = os.path.isdir(text) and any(format_of(path) != "text" for path in found)  # there are rows in the folder
    for path in found:
        kind = format_of(path)
        if kind == "text" and _is_table(path, columns or {name: name for name in required}):
            kind = "tsv"
        if kind == "text" and beside:
            continue  # a card
        yield from read_file_rows(
            path, required, columns, kind=None if kind == "text" else kind, fallback=fallback, on_problem=on_problem
        )

"""Files -> lines -> rows: jsonl, json, csv, tsv and parquet, plain or compressed.

Decisions:
- A file is never held as a whole but where its format leaves no choice: a json array.
- tsv is what its definition says, fields between tabs and no quoting: a review that holds a single `"` is a review.
- A row that does not fit raises a `DataError` with file and line, the columns seen and the columns expected. Given
  `on_problem(reason, where)` it is called instead and the row is left out.
- A mapped column that is a number (`text=1`) means a file without a header line, its columns counted from 0.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from threefold.errors import DamagedData, DataError, MissingExtra
from threefold.text.lines import (
    COMPRESSED,
    DECODING_ERRORS,
    MAX_LINE,
    SNIFFED,
    decoded,
    lines,
    open_bytes,
    refuse_binary,
    unreadable,
)

MAX_ARRAY = 2**30  # bytes in one json array, which is read as a whole
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
}

OnProblem = Callable[[str, str], None]
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """The fields of one row under our names, and where it stands: `path:line`."""

    fields: dict[str, Any]
    source: str


def format_of(path: Path) -> str:
    """`jsonl`, `json`, `csv`, `tsv`, `parquet`, or `text` for everything else, by the name of the file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def read_file_rows(
    path: Path,
    required: Sequence[str],
    columns: Columns | None = None,
    *,
    kind: str | None = None,
    fallback: bool = False,
    on_problem: OnProblem | None = None,
) -> Iterator[Row]:
    """The rows of one file, with `columns` (ours -> theirs, or `a+b` to join with a newline) applied.

    With `fallback`, a row without the mapped column keeps its own column of our name. `kind` overrides the file name.
    Raises `DataError` (`DamagedData` for a broken compression) that names file and line.
    """
    kind = kind or format_of(path)
    if kind == "text":
        raise DataError(
            f"`{path}` holds no rows that can be read",
            hint=f"rows are read from {', '.join(f'`{suffix}`' for suffix in FORMATS)}",
        )
    columns = columns or {}
    names = [name for theirs in columns.values() for name in [theirs, *theirs.split("+")]]
    headless = any(name.isdigit() for name in names)
    readers = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _tsv, "parquet": _parquet}
    yield from map_rows(
        readers[kind](path, headless, on_problem),
        str(path),
        required,
        columns,
        fallback=fallback,
        on_problem=on_problem,
    )


def map_rows(
    found: Iterator[tuple[int, dict[str, Any]]],
    name: str,
    required: Sequence[str],
    columns: Columns,
    *,
    fallback: bool = False,
    on_problem: OnProblem | None = None,
) -> Iterator[Row]:
    """Numbered rows as `Row`s, with the columns mapped and the required ones checked."""
    for number, fields in found:
        where = f"{name}:{number}"
        try:
            row = Row(_mapped(fields, required, columns, fallback, where), where)
        except DataError as error:
            if on_problem is None:
                raise
            on_problem(str(error).removeprefix(f"{where}: ").partition(";")[0], where)
        else:
            yield row


def _mapped(
    fields: dict[str, Any], required: Sequence[str], columns: Columns, fallback: bool, where: str
) -> dict[str, Any]:
    result = dict(fields)
    for ours, theirs in columns.items():
        parts = [theirs] if theirs in fields else theirs.split("+")
        if all(part in fields for part in parts):
            values = [fields[part] for part in parts]
            result[ours] = (
                values[0]
                if len(values) == 1
                else "\n".join(_text(value, name, where) for value, name in zip(values, parts, strict=True))
            )
        elif not (fallback and ours in fields):
            _does_not_fit(fields, [part for part in parts if part not in fields], where)
    missing = [name for name in required if name not in result]
    if missing:
        _does_not_fit(fields, missing, where)
    return result


def _does_not_fit(fields: Mapping[str, Any], missing: Sequence[str], where: str) -> NoReturn:
    seen = ", ".join(f"`{name}`" for name in list(fields)[:20]) or "none"
    raise DataError(
        f"{where}: the row has no {' and no '.join(f'`{name}`' for name in missing)}; its columns are {seen}",
        hint=f"name the column that holds it: `--columns {missing[0]}=THEIRS` (`{missing[0]}=a+b` joins two)",
    )


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: `{name}` should be a string and is {_named(value)}",
            hint="leave such rows out, or name another column with --columns",
        )
    return value


def _named(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def text_field(row: Row, name: str = "text") -> str:
    """The string in a field of a row; raises `DataError` for anything that is no string."""
    return _text(row.fields[name], name, row.source)


# ------------------------------------------------------------------------------------------ formats

_Found = Iterator[tuple[int, dict[str, Any]]]


def _lines_of_text(path: Path, on_problem: OnProblem | None) -> Iterator[tuple[int, str]]:
    for number, line in lines(path):
        where = f"{path}:{number}"
        try:
            text = decoded(line, where)
            if "\0" in text:
                raise DataError(f"{where}: NUL bytes in a row", hint="the file is damaged, or no text: make it again")
        except DataError as error:
            if on_problem is None:
                raise
            on_problem(str(error).removeprefix(f"{where}: ").partition(":")[0], where)
        else:
            yield number, text


def _jsonl(path: Path, headless: bool, on_problem: OnProblem | None) -> _Found:
    for number, line in _lines_of_text(path, on_problem):
        if not line.strip():
            if on_problem is not None:
                on_problem("blank line", f"{path}:{number}")
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a row is an object, and this is {_named(value)}")
        except (ValueError, RecursionError) as error:
            words = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
            if on_problem is None:
                raise DataError(
                    f"{path}:{number}: not a row in JSON: {words.lower()}; the line begins `{line[:60].strip()}`",
                    hint='each line is one object, such as {"text": "..."}',
                ) from error
            on_problem("not a row in JSON", f"{path}:{number}")
        else:
            yield number, value


def _json(path: Path, headless: bool, on_problem: OnProblem | None) -> _Found:
    with open_bytes(path) as file:
        try:
            data = file.read(MAX_ARRAY + 1)
        except DECODING_ERRORS as error:
            raise unreadable(path, error) from error
    if len(data) > MAX_ARRAY:
        raise DataError(
            f"`{path}` is larger than {MAX_ARRAY:,} bytes, too large for one array",
            hint="make it a `.jsonl`, one object a line",
        )
    refuse_binary(path, data[:SNIFFED])
    if not data.strip():
        raise DataError(f"`{path}` is empty", hint="give a file that holds rows")
    try:
        value = json.loads(decoded(data.removeprefix(b"\xef\xbb\xbf"), str(path), 1))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"`{path}` is not valid JSON: {str(error).lower()}", hint="one object a line is `.jsonl`"
        ) from error
    if not isinstance(value, list):
        raise DataError(
            f"`{path}` holds {_named(value)}, expected an array of objects", hint="one object a line is `.jsonl`"
        )
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            yield number, row
        elif on_problem is None:
            raise DataError(f"{path}:{number}: a row is an object, and this is {_named(row)}")
        else:
            on_problem("not an object", f"{path}:{number}")


def _csv(path: Path, headless: bool, on_problem: OnProblem | None) -> _Found:
    if csv.field_size_limit() < MAX_LINE:
        csv.field_size_limit(MAX_LINE)
    reader = csv.reader((line for _, line in _lines_of_text(path, on_problem)), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        start = 1
        try:
            for record in reader:
                yield start, record
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: not a row in csv: {error}", hint='a `"` inside a quoted field is written twice'
            ) from error

    return _table(path, records(), headless, on_problem)


def _tsv(path: Path, headless: bool, on_problem: OnProblem | None) -> _Found:
    records = ((number, line.rstrip("\r\n").split("\t")) for number, line in _lines_of_text(path, on_problem))
    return _table(path, records, headless, on_problem)


def _table(
    path: Path, records: Iterator[tuple[int, list[str]]], headless: bool, on_problem: OnProblem | None
) -> _Found:
    header: list[str] | None = None
    for number, record in records:
        if not record or record == [""]:
            if on_problem is not None:
                on_problem("blank line", f"{path}:{number}")
            continue
        if header is None:
            header = [str(i) for i in range(len(record))] if headless else [name.strip() for name in record]
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(
                    f"{path}:{number}: the header names `{twice[:60]}` twice",
                    hint="name the columns apart; a file without a header is read by number, as in `--columns text=1`",
                )
            if not headless:
                continue
        if len(record) == len(header):
            yield number, dict(zip(header, record, strict=True))
        elif on_problem is None:
            raise DataError(
                f"{path}:{number}: {len(record)} fields, expected {len(header)} ({', '.join(header[:12])})",
                hint="each row has as many fields as the header",
            )
        else:
            on_problem("another number of fields than the header", f"{path}:{number}")


def _parquet(path: Path, headless: bool, on_problem: OnProblem | None) -> _Found:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(f"reading `{path}`", "pyarrow", "data") from error
    if path.suffix.lower() in COMPRESSED:
        raise DataError(
            f"`{path}` is parquet inside another compression", hint="decompress it; parquet is compressed in itself"
        )
    open_bytes(path).close()
    if not path.stat().st_size:
        raise DataError(f"`{path}` is empty", hint="give a file that holds rows")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedData(
            f"{path}:{number + 1}: not readable as parquet: {str(error).splitlines()[0].lower()}",
            hint="the file is damaged or not parquet: fetch it again",
        ) from error

"""Whether two queries say the same of a database: both are run on it, and their rows compared.

Decisions:
- A query comes from a model and is not trusted: the database is opened read-only, nothing but reading is allowed
  (https://www.sqlite.org/c3ref/set_authorizer.html), and a query that takes too long or gives too much is stopped.
- Rows are compared without their order, unless the query that is right asks for one.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from threefold.errors import ConfigError, DataError

SECONDS = 2.0        # of a query
MOST_ROWS = 100_000  # of its answer
MOST_BYTES = 10**6   # of a value, which SQLite keeps to
MOST_COLUMNS = 200   # of a row, the same
MOST_SAID = 10**8    # bytes of an answer
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

Rows = list[tuple[Any, ...]]


class Database:
    """A SQLite file to ask. Raises ConfigError for what is none."""

    def __init__(self, path: Path) -> None:
        self.path, self.deadline = path, 0.0
        try:
            self.connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
            self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise ConfigError(f"`{path}` cannot be read as a database: {error}", hint="it is a SQLite file") from error
        self.connection.set_authorizer(self._allowed)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MOST_COLUMNS)
        self.connection.set_progress_handler(lambda: time.monotonic() > self.deadline, 1000)

    @staticmethod
    def _allowed(action: int, first: str | None, second: str | None, *_: Any) -> int:
        forbidden = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN
        return sqlite3.SQLITE_OK if action in ALLOWED and not forbidden else sqlite3.SQLITE_DENY

    def rows(self, query: str) -> Rows | None:
        """What a query gives; None where it fails, is not allowed or does not end in time."""
        self.deadline = time.monotonic() + SECONDS
        with contextlib.suppress(sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
            answer, found, size = self.connection.execute(query), Rows(), 0
            for row in answer:
                found.append(row)
                size += sum(len(value) for value in row if isinstance(value, str | bytes))
                if len(found) > MOST_ROWS or size > MOST_SAID or time.monotonic() > self.deadline:
                    return None
            return found
        return None

    def agreement(self, said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
        """`execution`: the share of queries that give the rows of the right one, and `execution_left_out`: right ones that cannot be
        run, which are not counted, where there are some. Raises DataError where all are such."""
        equal = failed = 0
        for query, right in zip(said, truth, strict=True):
            expected = self.rows(right)
            if expected is None:
                failed += 1
                continue
            found = self.rows(query)
            ordered = re.search(r"\border\s+by\b", right, re.IGNORECASE) is not None
            equal += found is not None and (found == expected if ordered else Counter(found) == Counter(expected))
        if failed and failed == len(truth):
            raise DataError(f"none of {failed:,} right queries can be run on `{self.path}`, not even {truth[0][:120]!r}",
                            hint="are rows and database of one kind?")
        return {"execution": equal / max(1, len(truth) - failed), **({"execution_left_out": float(failed)} if failed else {})}

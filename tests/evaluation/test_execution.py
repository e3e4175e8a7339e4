"""Queries that are run: what gives the same rows, what is refused, what is stopped."""

from __future__ import annotations

import sqlite3
import time
import tracemalloc
from pathlib import Path

import pytest

from threefold.errors import ConfigError, DataError
from threefold.evaluation import execution
from threefold.evaluation.execution import Database


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "a shop?.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE goods (name TEXT, price REAL)")
        database.executemany("INSERT INTO goods VALUES (?, ?)", [("tea", 2.5), ("milk", 1.0), ("milk", 1.5)])
    return path


@pytest.mark.parametrize("said, right, equal", [
    ("select name from goods where price > 2", "SELECT name FROM goods WHERE price >= 2.5", True),
    ("SELECT name FROM goods ORDER BY price", "SELECT name FROM goods", True),
    ("SELECT name FROM goods ORDER BY price DESC", "SELECT name FROM goods ORDER BY price", False),
    ("SELECT DISTINCT name FROM goods", "SELECT name FROM goods", False),
    ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT count(*) FROM n", "SELECT count(*) FROM goods", True),
    ("SELECT nme FROM goods", "SELECT name FROM goods", False),
    ("", "SELECT name FROM goods", False),
])
def test_a_query_is_right_if_it_gives_the_same_rows(said: str, right: str, equal: bool, shop: Path) -> None:
    assert Database(shop).agreement([said, right], [right, right]) == {"execution": 1.0 if equal else 0.5}


@pytest.mark.parametrize("query", [
    "DELETE FROM goods", "DROP TABLE goods", "INSERT INTO goods VALUES ('x', 1)", "ATTACH DATABASE '{other}' AS other", "PRAGMA writable_schema = 1",
    "VACUUM INTO '{other}'", "CREATE TABLE t (x)", "SELECT load_extension('x')", "SELECT 1; DROP TABLE goods", "BEGIN",
])
def test_S10_a_query_cannot_do_anything_but_read(query: str, shop: Path, tmp_path: Path) -> None:
    before = shop.read_bytes()
    assert Database(shop).rows(query.format(other=tmp_path / "other.sqlite")) is None
    assert shop.read_bytes() == before and not (tmp_path / "other.sqlite").exists()


def test_S10_an_answer_is_not_larger_than_memory(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 100000) SELECT {} FROM c"
    database = Database(shop)
    tracemalloc.start()
    assert database.rows(endless.format("zeroblob(900000000)")) is None
    assert database.rows(endless.format("hex(zeroblob(400000))")) is None
    assert database.rows(endless.format(", ".join(["zeroblob(1000000)"] * 40))) is None
    assert tracemalloc.get_traced_memory()[1] < 3 * execution.MOST_SAID
    tracemalloc.stop()
    assert database.rows("SELECT length(zeroblob(900000))") == [(900000,)]


def test_a_query_that_does_not_end_is_stopped(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SECONDS", 0.1)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
    database, start = Database(shop), time.monotonic()
    assert database.rows(endless.format("max(i)")) is None and database.rows(endless.format("i")) is None
    assert time.monotonic() - start < 5
    monkeypatch.setattr(execution, "SECONDS", 5.0)
    monkeypatch.setattr(execution, "MOST_ROWS", 2)
    assert database.rows("SELECT name FROM goods") is None and database.rows("SELECT name FROM goods LIMIT 2") == [("tea",), ("milk",)]


def test_what_is_no_database_and_a_right_query_that_fails_are_errors(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("no database, but a text that is long enough to be read as one " * 40)
    for path in (tmp_path / "text.sqlite", tmp_path / "nowhere.sqlite"):
        with pytest.raises(ConfigError, match="cannot be read as a database"):
            Database(path)
    assert not (tmp_path / "nowhere.sqlite").exists()
    wrong, right = "SELECT nothing FROM nowhere", "SELECT name FROM goods"
    with pytest.raises(DataError, match="none of 1 right queries can be run"):
        Database(shop).agreement(["SELECT 1"], [wrong])
    assert Database(shop).agreement([right, "SELECT 1", right], [right, wrong, right]) == {"execution": 1.0, "execution_left_out": 1.0}

"""The tour: what its models are taught, and the whole of it on a small budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from threefold import tour_tasks
from threefold.tour import tour
from threefold.tour_tasks import LESSONS, Entry, entries, write_rows

SOURCE = '''
"""A module."""
import os

def join(a, b):
    """Join two paths
    in a portable way.

    The second part may
    be absolute.
    """

class Reader(object):
    """Reads rows from a file.

    Iterate over it."""

    def close(self):
        """Close the file that is read."""

    def _hidden(self):
        """Nobody should see this one."""

    def bare(self): ...

async def later():
    "Do it at another time."
'''


def test_entries_are_what_documents_itself() -> None:
    found = list(entries(iter([("tools/paths.py", SOURCE), ("broken.py", "def ("), ("tools/__init__.py", 'def f():\n    "Says what it does."')])))
    assert found == [
        Entry("tools.paths", "join", "function", "Join two paths in a portable way.", "The second part may be absolute."),
        Entry("tools.paths", "Reader", "class", "Reads rows from a file.", "Iterate over it."),
        Entry("tools.paths", "Reader.close", "method", "Close the file that is read.", ""),
        Entry("tools.paths", "later", "function", "Do it at another time.", ""),
        Entry("tools", "f", "function", "Says what it does.", ""),
    ]


def test_rows_are_divided_by_module_and_none_is_on_both_sides(tmp_path: Path) -> None:
    paths = write_rows(tmp_path / "rows")
    assert set(paths) == set(LESSONS)
    for name, (learnt, held) in paths.items():
        sides = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (learnt, held)]
        assert len(sides[0]) > 500 and 100 < len(sides[1]) <= tour_tasks.HELD, name
        assert not {next(iter(row.values())) for row in sides[0]} & {next(iter(row.values())) for row in sides[1]}
        assert not {json.dumps(row) for row in sides[0]} & {json.dumps(row) for row in sides[1]}
        assert all(all(value.strip() for value in row.values()) for side in sides for row in side)
    again = write_rows(tmp_path / "again")
    assert all(a.read_bytes() == b.read_bytes() for name in paths for a, b in zip(paths[name], again[name], strict=True))


@pytest.mark.slow
def test_the_whole_tour_on_a_small_budget_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tour(tmp_path / "tour", 60.0)
    assert set(found["taught"]) == set(LESSONS) and Path(found["report"]).is_file()
    report = (tmp_path / "tour" / "report.html").read_text(encoding="utf-8")
    for lesson in LESSONS.values():
        assert lesson.title in report
    assert found["bits_per_byte"] < found["yardsticks"]["byte unigram"] and found["seconds"] < 120
    again = tour(tmp_path / "tour", 60.0)  # finished: only what is asked and shown is done anew
    assert again["bits_per_byte"] == found["bits_per_byte"] and again["seconds"] < found["seconds"]

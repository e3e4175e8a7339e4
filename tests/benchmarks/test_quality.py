"""The table of quality in its short form: every cell pretrains, learns and is judged, with a few updates and a part of the rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import foundations, quality, quality_tasks
from benchmarks.texts import Absent

MEASURES = {"classify": "accuracy", "embed": "spearman", "instruct": "loss", "reward": "accuracy", "dpo": "accuracy", "seq2seq": "chrf"}


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells share their foundations."""
    return tmp_path_factory.mktemp("foundations")


@pytest.mark.parametrize("row", [*quality.ROWS, *quality_tasks.CELLS])
def test_a_quick_cell_trains_and_is_judged(row: str, kept: Path) -> None:
    try:
        cell = quality.run_cell(row, 0, "quick", kept=kept)
    except Absent as absent:
        pytest.skip(f"needs shared data: {absent}")
    assert cell["row"] == row and cell["seconds"] > 0
    if row in quality.ROWS:
        assert math.isfinite(cell["loss"]) and cell["context"] > 0
        assert "auc" in cell or "pairs_right" in cell or cell["blimp"]["paradigms"] == 67
        assert row in quality.ROWS and not any(math.isnan(value) for value in cell.values() if isinstance(value, float))
        return
    task = quality_tasks.CELLS[row]
    assert math.isfinite(cell[MEASURES[task.task]]) and (cell["learnt"], cell["judged"]) == (400, 40)
    assert ("control" in cell) == (task.control or row == "scitldr") and ("pretraining_seconds" in cell) == (not task.base)
    assert any(kept.iterdir()) or task.base, "a foundation is kept for the next cell"
    assert str(foundations.KEPT) not in str(kept)

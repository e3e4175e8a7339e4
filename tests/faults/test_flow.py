"""P1 for the whole of `pretrain`, from raw text to report: killed at any disk operation, the same call ends the same."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults import kit
from tests.test_pretrain import LINES, recipe
from threefold import files
from threefold.pretrain import Request, pretrain

RESULT = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "recipe.toml")
CLOSING = 30  # the last operations: result, log, report


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # children are forked
    path = tmp_path / "bottles.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


def flow(text: Path, run: Path) -> None:
    pretrain(recipe(text, **{"train.steps": 4, "train.save_every": 2, "train.eval_every": 3, "train.workers": 0}), Request(out=run))


def operations(text: Path, run: Path) -> int:
    seen: list[str] = []
    with files.observed(lambda kind, path, *details: seen.append(kind)):
        flow(text, run)
    return len(seen)


def ends_the_same(n: int, text: Path, tmp_path: Path) -> None:
    run = tmp_path / str(n)
    assert kit.in_child(lambda: flow(text, run), crash_at=n) == 137
    assert kit.in_child(lambda: flow(text, run)) == 0
    for name in RESULT:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"killed at operation {n}: {name}"
    assert (run / "report.html").is_file(), f"killed at operation {n}"
    assert not [path.name for path in run.rglob(".t*")]


def test_F01_pretrain_killed_at_some_disk_operations(text: Path, tmp_path: Path) -> None:
    count = operations(text, tmp_path / "whole")
    early = random.Random(3).sample(range(1, count - CLOSING), 8)
    for n in [*sorted(early), *range(count - 9, count + 1, 2)]:
        ends_the_same(n, text, tmp_path)


@pytest.mark.slow
def test_F01_pretrain_killed_at_every_disk_operation(text: Path, tmp_path: Path) -> None:
    for n in range(1, operations(text, tmp_path / "whole") + 1):
        ends_the_same(n, text, tmp_path)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_F01_a_fresh_start_killed_before_it_is_settled_gives_the_old_run_back(text: Path, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", []

    def again(run: Path) -> None:
        pretrain(recipe(text, **{"train.steps": 5, "train.workers": 0}), Request(out=run, fresh=True))

    flow(text, run)
    with files.observed(lambda kind, path, *details: seen.append((kind, Path(path).name))):
        again(Path(shutil.copytree(run, tmp_path / "copy")))
    settled = max(n for n, (kind, name) in enumerate(seen, 1) if kind == "rename" and "recipe.toml" in name)
    before = contents(run)
    for n in [*random.Random(5).sample(range(1, settled), 6), settled]:
        assert kit.in_child(lambda: again(run), crash_at=n) == 137
        assert kit.in_child(lambda: flow(text, run)) == 0
        assert contents(run) == before, f"killed at operation {n}"

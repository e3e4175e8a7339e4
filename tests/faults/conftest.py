"""Runs that nothing happened to, made once: what every run that something happened to must end as."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults import kit
from threefold.training import checkpoint

REFERENCE: dict[str, Any] = {"steps": 20, "eval_every": 5, "save_every": 5}


class Untroubled:
    """A finished run: its settings, folder, final state, log and disk operations."""

    def __init__(self, run: Path, settings: dict[str, Any] = REFERENCE) -> None:
        with kit.FaultyFiles() as disk:
            trainer = kit.train(run, **settings)
        self.run, self.settings, self.operations = run, settings, disk.seen
        self.state, self.history = kit.state_of(trainer), kit.history(run)

    def published(self, before: int) -> int:
        """The newest step whose checkpoint was durable before operation number `before` (from 1), or 0."""
        newest = named = 0
        for kind, path in self.operations[: before - 1]:
            if kind == "rename" and ".tmp-step-" in path:
                named = int(path.split(".tmp-step-")[1][:6])
            elif kind == "fsync_dir" and path.endswith("/checkpoints") and named:
                newest = max(newest, named)
        return newest


@pytest.fixture(scope="session")
def untroubled(tmp_path_factory: pytest.TempPathFactory) -> Untroubled:
    """Twenty steps, an evaluation and a checkpoint every five, and nothing happens."""
    return Untroubled(tmp_path_factory.mktemp("untroubled") / "run")


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory, untroubled: Untroubled) -> Path:
    """The reference run, ended after step 11, with checkpoints 5 and 10; not to be touched."""
    run = tmp_path_factory.mktemp("halted") / "run"
    kit.halt(run, 11, **untroubled.settings)
    assert checkpoint.steps(run) == [10, 5] and kit.step_lines(run)[-1] == 11
    return run


@pytest.fixture
def saved(tmp_path: Path, halted: Path) -> Path:
    """A copy of `halted`."""
    return Path(shutil.copytree(halted, tmp_path / "saved", symlinks=True))


def ends_well(run: Path, untroubled: Untroubled) -> None:
    """The same command again gives what would have come without trouble, and leaves nothing lying about."""
    trainer = kit.train(run, **untroubled.settings)
    assert kit.same_state(kit.state_of(trainer), untroubled.state)
    assert kit.same_state(kit.saved_state(run), untroubled.state)
    assert kit.history(run) == untroubled.history
    assert [path.name for path in run.rglob(".t*-*")] == []

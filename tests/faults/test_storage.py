"""P1: once the first save has succeeded, the run directory holds a complete checkpoint at every instant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import kit
from tests.faults.conftest import Untroubled
from threefold.training import checkpoint
from threefold.training.trainer import Trainer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def saved(tmp_path: Path, untroubled: Untroubled) -> Path:
    """A run that stopped after ten of its twenty steps, with checkpoints 5 and 10."""
    run = tmp_path / "saved"
    shutil.copytree(untroubled.run, run)
    kit.train(run, **{**untroubled.settings, "steps": 20})  # nothing to do: it is whole
    trainer = kit.tiny_trainer(run, **untroubled.settings)
    for step in (20, 15):
        checkpoint.remove(checkpoint.folder(run, step))
    shutil.rmtree(run)
    halted(run, 10, untroubled)
    assert checkpoint.steps(run) == [10, 5] and trainer.progress.step == 0
    return run


def halted(run: Path, at: int, untroubled: Untroubled) -> Trainer:
    """A run with the reference's settings that was stopped at a step, saved."""
    trainer = kit.tiny_trainer(run, **untroubled.settings)
    trainer.length.is_over = lambda step: step >= at  # type: ignore[method-assign]
    trainer.resume()
    trainer.evaluate = lambda whole: pytest.fail("whole") if whole else kit_measure(trainer)  # type: ignore[assignment]
    return trainer


def kit_measure(trainer: Trainer) -> dict[str, float]:
    loss = kit.held_out(trainer)
    return {"loss": loss, "bits_per_byte": loss, "tokens": 64.0}

"""P2 under every objective and family: a run that was cut off ends bitwise as the one that was not, with all that is dropped,
hidden, drawn and shared. A new family adds nothing here, a new objective its row in WAYS (conftest.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import kit
from tests.objectives.conftest import PAIRS, learner, loader_of, text_shards
from threefold.objectives.heldout import evaluate_objective
from threefold.training.trainer import Trainer

DROPS = {"attention_dropout": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}


def settings(pair: str) -> dict[str, Any]:
    """A run over the end of an epoch, in uneven micro-batches, with an evaluation on the way; all objects new."""
    model, objective = learner(PAIRS[pair], **DROPS)
    loader = loader_of(objective, rows=3, shards=text_shards(documents=3, length=30))
    assert loader.epoch_steps < 5

    def evaluate(trainer: Trainer) -> float:
        return float(evaluate_objective(model, objective, loader, rows=2)["loss"])

    return {"steps": 5, "save_every": 2, "eval_every": 3, "micro_batch": 2, "lr": 0.002, "adamw_lr": 0.001, "model": model,
            "objective": objective, "loader": loader, "evaluate": evaluate}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_that_was_cut_off_ends_the_same(pair: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = kit.train(tmp_path / "whole", **settings(pair))
    torch.manual_seed(2)  # what comes of torch's own numbers would differ
    kit.halt(tmp_path / "cut", 3, **settings(pair))
    assert kit.step_lines(tmp_path / "cut") == [1, 2, 3]
    again = kit.train(tmp_path / "cut", **settings(pair))
    assert kit.same_state(kit.state_of(again), kit.state_of(whole)) and kit.same_state(kit.saved_state(tmp_path / "cut"), kit.state_of(whole))
    assert kit.history(tmp_path / "cut") == kit.history(tmp_path / "whole") and kit.step_lines(tmp_path / "cut") == [1, 2, 3, 4, 5]
    assert not kit.same_state(kit.state_of(whole), kit.state_of(kit.tiny_trainer(tmp_path / "new", **settings(pair))))

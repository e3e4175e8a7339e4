"""Checkpoints by themselves: what is written comes back bit for bit, and how many are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.faults import kit
from threefold.errors import CheckpointError
from threefold.training import checkpoint
from threefold.training.keeper import Progress, best_steps

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.arange(5),
    "c": torch.tensor(2.5, dtype=torch.float64),
    "e": torch.empty(0, 3),
    "t": torch.randn(4, 6).mT,
    "h": torch.randn(3).bfloat16(),
}


def save(run: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.save(
        run,
        step,
        model=TENSORS,
        optimizer={"m": torch.ones(2)},
        state={"progress": {"step": step}},
        identity={"torch": "x", "threads": 1, "format": 99},
    )


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    made = save(tmp_path, 500)
    found = checkpoint.verify(made.path)
    assert made.path == tmp_path / "checkpoints" / "step-000500" == checkpoint.folder(tmp_path, 500)
    assert found == made and found.step == 500 and found.state() == {"progress": {"step": 500}}
    assert all(
        torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
        for name, tensor in found.model().items()
    )
    assert found.manifest["torch"] == "x" and found.manifest["format"] == checkpoint.FORMAT, "what is ours is ours"
    assert sorted(path.name for path in made.path.iterdir()) == sorted((*checkpoint.FILES, "manifest.json"))


def test_steps_of_any_length(tmp_path: Path) -> None:
    for step in (0, 5, 999_999, 1_000_000, 12_345_678):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [12_345_678, 1_000_000, 999_999, 5, 0]
    found = checkpoint.latest(tmp_path, up_to=1_000_000)
    assert found is not None and found.step == 1_000_000
    assert checkpoint.latest(tmp_path / "none") is None and checkpoint.latest(tmp_path, up_to=-1) is None


def test_saved_again_in_place_of_a_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 7)
    kit.corrupt(checkpoint.folder(tmp_path, 7) / "model.safetensors", "truncate", 10)
    save(tmp_path, 7)
    assert checkpoint.at(tmp_path, 7) and checkpoint.steps(tmp_path) == [7] and list(tmp_path.rglob(".t*")) == []


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [60, 50]), (2, [60, 50]), (3, [60, 50, 40]), (9, [60, 50, 40, 30, 20, 10])]
)
def test_never_fewer_than_two(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(10, 70, 10):
        save(tmp_path, step)
    removed = checkpoint.prune(tmp_path, keep)
    assert checkpoint.steps(tmp_path) == left and sorted([*removed, *left]) == [10, 20, 30, 40, 50, 60]


def test_the_best_step_of_a_run_is_known_from_its_newest_checkpoint(tmp_path: Path) -> None:
    assert best_steps(tmp_path) == set()
    save(tmp_path, 10)
    assert best_steps(tmp_path) == set(), "a state that knows of no evaluation"
    kit.train(tmp_path / "run", steps=60, eval_every=5, save_every=5, keep=99, converged=True,
              evaluate=lambda trainer: abs(trainer.progress.step - 20) + 1.0, patience=99)
    assert best_steps(tmp_path / "run") == {20}
    checkpoint.prune(tmp_path / "run", 2, spare=best_steps(tmp_path / "run"))
    assert checkpoint.steps(tmp_path / "run") == [60, 55, 20]


def test_only_those_that_verify_count(tmp_path: Path) -> None:
    """Every byte of those that this process did not write is read before an older one is given up for them."""
    for step in range(10, 70, 10):
        save(tmp_path, step)
    for step in (60, 40):
        kit.corrupt(checkpoint.folder(tmp_path, step) / "model.safetensors", "bit", 2000)
    trusted = {50}
    assert checkpoint.prune(tmp_path, 2, spare={10}, trusted=trusted) == [20]
    assert checkpoint.steps(tmp_path) == [60, 50, 40, 30, 10] and trusted == {50, 30}


def test_identity_and_state_are_json(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = json.loads((checkpoint.folder(tmp_path, 1) / "manifest.json").read_text())
    assert set(manifest["files"]) == set(checkpoint.FILES) and len(manifest["sha256"]) == 64
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, 2, model={}, optimizer={}, state={"x": float("nan")}, identity={})
    assert checkpoint.steps(tmp_path) == [1] and list(tmp_path.rglob(".tmp*")) == []


def test_progress_as_json() -> None:
    for progress in (Progress(), Progress(step=5, best_loss=1.25, best_step=3, spikes=[[1.0], [2.0]])):
        assert Progress.of(json.loads(json.dumps(progress.plain(), allow_nan=False))) == progress
    for wrong in ({}, {**Progress().plain(), "more": 1}):
        with pytest.raises(TypeError):
            Progress.of(wrong)


def test_a_state_that_does_not_say_where_the_run_stood(tmp_path: Path) -> None:
    trainer = kit.tiny_trainer(tmp_path)
    named = dict(trainer.model.named_parameters())
    checkpoint.save(tmp_path, 3, model=named, optimizer=trainer.optimizer.state(), state={"branches": 0}, identity={})
    with pytest.raises(CheckpointError, match=r"state.json` does not say where the run stood"):
        trainer.resume()

"""What is kept of a run, and how it is taken up again: progress, and the checkpoints that lie on its path.

Decisions:
- A rollback and "converged" leave a path: what was saved on it after the step they go back to is removed, at once, or
  at the next start where a kill came between. A checkpoint knows how many such decisions it has seen, which tells the
  two paths apart.
- The state on disk of a step is the state in memory, or it is written (again): a folder that is there but does not
  verify is replaced.
- Weights that are not finite are not saved: a checkpoint is something to go back to.
- Names, shapes and dtypes are compared before the first tensor is copied: a checkpoint is taken up whole or not at all.
- What is not trained is not saved: an adapter's checkpoint holds the adapter, and the hash of the base that it stands on.
- Another torch or another number of threads is told and not refused: the numbers may differ in their last bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from threefold.device import is_out_of_memory
from threefold.errors import CheckpointError, MemoryLimitError, NumericError
from threefold.training import checkpoint
from threefold.training.checkpoint import Checkpoint
from threefold.training.decisions import LEAVING, Decisions
from threefold.training.log import RunLog
from threefold.training.optim import Optimizer

SHOWN = ("torch", "threads", "compile", "device")  # what changes the order of sums


@dataclass
class Progress:
    """Where a run stands. Everything in it goes into `state.json`."""

    step: int = 0
    tokens: int = 0
    skips: int = 0
    best_loss: float = math.inf
    best_step: int = -1
    waited: int = 0
    spikes: list[list[float]] = field(default_factory=lambda: [[], []])

    def plain(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinity."""
        return {**vars(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @staticmethod
    def of(values: Mapping[str, Any]) -> Progress:
        """Take back what `plain` gave; raises TypeError for names that are not known or missing."""
        if set(values) != {f.name for f in dataclasses.fields(Progress)}:
            raise TypeError(f"progress has the fields {sorted(values)}")
        return Progress(**{**values, "best_loss": math.inf if values["best_loss"] is None else values["best_loss"]})


class Keeper:
    """Saves a run and takes it up again. `saved` is the step whose checkpoint holds the present state, or -1."""

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: Optimizer,
        decisions: Decisions,
        log: RunLog,
        *,
        keep: int,
        identity: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.run, self.model, self.optimizer, self.decisions, self.log = run, model, optimizer, decisions, log
        self.keep, self.identity, self.warn = keep, identity, warn
        self.saved = -1
        self._trusted: set[int] = set()

    def save(self, progress: Progress, more: Mapping[str, Any], *, spare: Container[int] = ()) -> None:
        """Write the checkpoint of this step, unless it is there, and remove old ones but those in `spare`.

        Raises DiskError and MemoryLimitError, with every earlier checkpoint as it was, and NumericError for weights that
        are not finite.
        """
        try:
            if self.saved != progress.step:
                self._write(progress, more)
            checkpoint.prune(self.run, self.keep, spare=spare, trusted=self._trusted, warn=self.warn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(f"step {progress.step}: not enough memory to save ({error})",
                                   hint="the last checkpoint is as it was; free some memory and start again") from error

    def _write(self, progress: Progress, more: Mapping[str, Any]) -> None:
        tensors = {name: parameter.detach() for name, parameter in self.trained().items()}
        largest = torch.stack(torch._foreach_norm(list(tensors.values()), math.inf))
        if not bool(largest.isfinite().all()):
            broken = [name for name, value in zip(tensors, largest.tolist(), strict=True) if not math.isfinite(value)]
            raise NumericError(
                f"step {progress.step}: {len(broken)} of {len(tensors)} weights are not finite after the update, "
                f"`{broken[0]}` among them; they were not saved, and the last checkpoint is as it was",
                hint="lower the learning rate (train.learning_rate)",
            )
        self.log.sync()  # the history up to a checkpoint is as durable as the checkpoint
        state = {"progress": progress.plain(), **more, "branches": len(self.decisions.taken(*LEAVING))}
        checkpoint.save(
            self.run,
            progress.step,
            model=tensors,
            optimizer=self.optimizer.state(),
            state=state,
            identity=self.identity,
        )
        self._trusted.add(progress.step)
        self.saved = progress.step

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def find(self, step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies and lies on the path, or exactly that of `step`; None if there is none.

        Raises CheckpointError for a `step` that is damaged, and where there are checkpoints and none of them verifies: to begin again would
        throw away what may merely be out of reach.
        """
        if step is not None:
            found = checkpoint.at(self.run, step)
            if not self._is_on_path(found):
                raise CheckpointError(f"step {step} of `{self.run}` lies on a path that a later decision left",
                                      hint="take an earlier step, or leave the choice to the run")
            return found
        while (newest := checkpoint.latest(self.run, skipped=self.warn)) is not None and not self._is_on_path(newest):
            self.warn(f"step {newest.step} lies on a path that a later decision left; it is removed")
            checkpoint.remove(newest.path)
        if newest is None and (there := checkpoint.steps(self.run)):
            raise CheckpointError(f"none of the {len(there):,} checkpoints of `{self.run}` can be taken up (steps {', '.join(map(str, there[:5]))})",
                                  hint="bring their files back, as the warnings above name them, or start over with --fresh")
        return newest

    def reachable(self, step: int) -> Checkpoint | None:
        """The newest checkpoint at or before `step` that verifies."""
        return checkpoint.latest(self.run, up_to=step, skipped=self.warn)

    def check_data(self, found: Checkpoint, *, accept_new: bool) -> None:
        """Raise where a checkpoint was trained on other data (CheckpointError, unless `accept_new`) or with another
        tokenizer, whose ids mean other texts."""
        def differs(key: str) -> bool:
            return None not in (then := found.manifest.get(key), here := self.identity.get(key)) and then != here

        if differs("tokenizer_fingerprint"):
            raise CheckpointError(f"`{found.path}` was trained with another tokenizer than that of the data now: the same "
                                  "ids mean other texts", hint="bring the tokenizer back, or start over with --fresh")
        if differs("base_sha256"):
            raise CheckpointError(f"`{found.path}` stands on another base than the model that is started from now",
                                  hint="bring the base back, or start over with --fresh")
        if differs("data_fingerprint") and not accept_new:
            raise CheckpointError(f"`{found.path}` was trained on other data than what is prepared now",
                                  hint="bring the data back, or go on with the new data with --accept-new-data")

    def take_up(self, found: Checkpoint, *, for_good: bool = False) -> tuple[Progress, dict[str, Any]]:
        """Copy a checkpoint into model and optimizer; returns the progress and what else was saved. `for_good`: what came after it
        lies on a path that is left, and its checkpoints are removed.

        Raises CheckpointError, with nothing changed, where it is of another model or optimizer.
        """
        tensors, moments, state = found.model(), found.optimizer(), found.state()
        parameters = self.trained()
        _compare(found.path / "model.safetensors", tensors, parameters)
        _compare(found.path / "optimizer.safetensors", moments, self.optimizer.state())
        for key, here in self.identity.items():
            if key in SHOWN and (then := found.manifest.get(key, here)) != here:
                self.warn(
                    f"`{key}` was {then} when step {found.step} was saved and is {here} now: from here on the numbers "
                    "may differ from those of an unbroken run in their last bits"
                )
        try:
            progress = Progress.of(state["progress"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"`{found.path / 'state.json'}` does not say where the run stood: {error}") from error
        if for_good:
            self._remove_after(found.step)
        self.put_back(found)
        self.optimizer.load(moments)
        self.log.resume_at(found.step)
        self.saved = found.step
        self._trusted.add(found.step)
        return progress, state

    @torch.no_grad()
    def put_back(self, found: Checkpoint) -> None:
        """Copy the weights of a checkpoint into the model, and nothing else."""
        tensors = found.model()
        for name, parameter in self.trained().items():
            parameter.copy_(tensors[name])

    def after(self, step: int) -> list[int]:
        """The steps of later checkpoints."""
        return [later for later in checkpoint.steps(self.run) if later > step]

    def _remove_after(self, step: int) -> None:
        for later in self.after(step):
            checkpoint.remove(checkpoint.folder(self.run, later))
            self._trusted.discard(later)

    def _is_on_path(self, found: Checkpoint) -> bool:
        seen = found.state().get("branches", 0)
        return all(found.step <= int(value["to"]) for _, value in self.decisions.taken(*LEAVING)[seen:])


def best_steps(run: Path) -> set[int]:
    """The step of the best evaluation so far, as the newest checkpoint knows it: "converged" goes back to it."""
    newest = checkpoint.latest(run)
    progress = newest.state().get("progress", {}) if newest is not None else {}
    best = progress.get("best_step", -1) if isinstance(progress, dict) else -1
    return {best} if isinstance(best, int) and best >= 0 else set()


def _compare(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names, shapes and dtypes are the same."""
    differing = [name for name in {**wanted, **found} if name not in found or name not in wanted
                 or found[name].shape != wanted[name].shape or found[name].dtype != wanted[name].dtype]
    if differing:
        one = differing[0]
        here, there = ("none" if one not in t else f"{str(t[one].dtype).removeprefix('torch.')} {tuple(t[one].shape)}"
                       for t in (wanted, found))
        raise CheckpointError(
            f"`{path}` does not fit: {len(differing)} of {len(wanted)} tensors differ, `{one}` is {there} there and "
            f"{here} here",
            hint="it is of another model or optimizer: take the recipe it was made with, or start over with --fresh",
        )

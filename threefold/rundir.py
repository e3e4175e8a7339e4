"""The run directory: whose it is, what it was begun with, and whether it is finished.

Decisions:
- Nothing in a folder is replaced or removed unless a run of ours made it: a folder that holds one of our names without
  a sign of a run is somebody else's. A run that is started over is set aside until the new one has its data and its
  plan: what is refused on the way costs nothing.
- What the recipe settles before the first step (tokenizer, model, batch, dtype) is fixed in the data and in the plan. A
  run that goes on with other words for it would not do what its recipe says, so that needs `fresh`; everything else
  that is not plainly safe needs `force`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from threefold import console, files
from threefold.config import Change, Recipe, difference, dump, load_recipe
from threefold.errors import ConfigError, UsageError
from threefold.hub import DESCRIBED
from threefold.training.log import Line, RunLog, is_last_evaluation

CONTENTS = ("model", "generator", "checkpoints", "data", "dumps", "log.jsonl", "recipe.toml", "report.html")
ASIDE = ".before-fresh"  # what a run that starts over has not replaced yet
SIGNS = ("log.jsonl", "data/manifest.json")  # the first things that a run of ours leaves
SETTLED = ("tokenizer.", "model.", "objective.", "train.batch_tokens", "train.dtype", "train.objective", "finetune.rows", "finetune.rates")


def claim(run: Path, uses: Iterable[Path] = ()) -> None:
    """Raise UsageError where `run` holds things of these names that no run of ours has made, or where what the run
    `uses` (model, data, log) lies among what it would write."""
    for used in uses:
        inside = used.absolute().resolve()
        if any(inside.is_relative_to((run / name).absolute().resolve()) for name in CONTENTS) or inside == run.absolute().resolve():
            raise UsageError(f"`{used}` lies in `{run}`, where the result is to go: it would be written over",
                             hint="choose another --out")
    if run.exists() and not run.is_dir():
        raise UsageError(f"`{run}` is a file, and a run needs a folder", hint="choose another --out")
    if any((run / name).is_file() for name in SIGNS) or (run / ASIDE).is_dir():
        return
    if foreign := [name for name in CONTENTS if name != "recipe.toml" and os.path.lexists(run / name)]:
        raise UsageError(f"`{run}` is not a run directory, and it holds {', '.join(f'`{name}`' for name in foreign)}, "
                         "which a run would write over", hint="choose a new folder with --out")


class SetAside:
    """What a run has written, out of the way until it is known that a new run takes its place.

    It waits in a folder within the run, so that a new run that was killed before that moment can still be undone: a
    start that finds the folder (`SetAside.left_behind`) gives everything its name back.
    """

    def __init__(self, run: Path) -> None:
        self.folder = files.make_dirs(run / ASIDE)
        for name in CONTENTS:
            if os.path.lexists(run / name):
                files.move(run / name, self.folder / name)

    @staticmethod
    def left_behind(run: Path) -> bool:
        """Undo a `fresh` that did not come to its end; returns whether there was one."""
        if not (run / ASIDE).is_dir():
            return False
        for aside in sorted((run / ASIDE).iterdir()):
            if os.path.lexists(run / aside.name):
                files.remove_tree(run / aside.name)
            files.move(aside, run / aside.name)
        files.remove_tree(run / ASIDE)
        return True

    def drop(self) -> None:
        """Remove it for good."""
        if self.folder.is_dir():
            files.remove_tree(files.move_to_trash(self.folder))


def compare(recipe: Recipe, run: Path, *, force: bool) -> None:
    """Raise ConfigError, with the difference, where the run was begun with a recipe that `recipe` may not replace."""
    if not (run / "recipe.toml").exists():
        return
    changes = [change for change in difference(load_recipe(run / "recipe.toml", warn=console.warn), recipe) if not change.safe]
    settled = [change for change in changes if change.key.startswith(SETTLED)
               or (change.key == "train.learning_rate" and recipe.finetune.rates > 1)]  # the rates that were tried went out from it
    if settled:
        raise ConfigError(f"`{run}` was begun with another recipe, and this was settled before its first step:"
                          f"{_listed(settled)}", hint="start over with --fresh, or choose another --out")
    if changes and not force:
        raise ConfigError(f"`{run}` was begun with another recipe:{_listed(changes)}",
                          hint="go on with the new one with --force, start over with --fresh, or choose another --out")


def finished(recipe: Recipe, run: Path) -> Line | None:
    """The last evaluation of a run that ended with exactly this recipe, or None."""
    whole = any((run / "model" / name).exists() for name in DESCRIBED)
    lines = RunLog(run / "log.jsonl").lines() if whole else []
    ended = [line for line in lines if line.get("event") in ("start", "finished")]
    if not ended or ended[-1].get("recipe_sha256") != recipe_hash(recipe):
        return None
    return last_evaluation(lines)


def last_evaluation(lines: list[Line]) -> Line:
    """The evaluation that closes a run."""
    return next(line for line in reversed(lines) if is_last_evaluation(line))


def recipe_hash(recipe: Recipe) -> str:
    """The SHA-256 of a recipe as it is written."""
    return hashlib.sha256(dump(recipe).encode()).hexdigest()


def _listed(changes: list[Change]) -> str:
    return "".join(f"\n  {change}" for change in changes)

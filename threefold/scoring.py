"""How good a model of a task is on rows: what `threefold evaluate MODEL --data ROWS` says of classifiers, taggers, writers
and embedders.

Decision: the model says which task it has (its head, and the names that its directory keeps); the rows are those that it
would be trained on, and the figures those that training shows of held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from threefold import auto, console, hub
from threefold.config import Recipe, load_recipe
from threefold.data.examples import Examples
from threefold.device import pick_device
from threefold.errors import DataError, UsageError
from threefold.evaluation import metrics
from threefold.evaluation.execution import Database
from threefold.model import adapters
from threefold.model.base import Model
from threefold.model.grow import resized
from threefold.model.pooling import Pooling
from threefold.model.weights import load_model, saved_task
from threefold.objectives.classify import KINDS, OUTSIDE, Classify
from threefold.objectives.heldout_rows import HeldOutRows
from threefold.objectives.preference import Dpo
from threefold.objectives.rows import Fit, RowObjective, filler
from threefold.objectives.tasks import TASKS
from threefold.objectives.translate import Translate
from threefold.text.rows import format_of
from threefold.text.sources import expand, parse_source, read_rows

OF_HEADS = {"classify": "classify", "tag": "tag", "seq2seq": "seq2seq", "body": "embed", "encoder": "embed", "causal": "instruct"}


def task_of(name: str, data: Sequence[str]) -> str:
    """What a model is judged as on some sources where nobody says it: the task that its run was taught, else that of its head (empty);
    one that writes on without a task, or is given running text, by the loss of that `text`."""
    folder = hub.resolve(name)
    recipe = _recipe_of(folder)
    taught = "" if recipe is None else recipe.finetune.task
    if adapters.is_adapter(folder):
        base, head, _ = adapters.described(folder)
        head = head or saved_task(hub.resolve(base))
    else:
        head = saved_task(folder)
    if head != "causal":
        return taught
    text = all(_is_text(parse_source(spec).path) for spec in data)
    if taught and text:
        console.note(f"{', '.join(data)} is judged as running text; rows of what `{name}` was taught are judged with --task {taught}")
    return "text" if text else taught or "text"


def _recipe_of(folder: Path) -> Recipe | None:
    """The recipe of the run that a model's folder lies in."""
    path = folder.parent / "recipe.toml"
    return load_recipe(path) if path.is_file() else None


def _is_text(path: str) -> bool:
    """Whether a source is running text and not rows, by the names of its files."""
    return path == "python" or (not path.startswith("hub:") and all(format_of(one) == "text" for one in expand(path)))


def score(name: str, data: Sequence[str], columns: Mapping[str, str] | None = None, *, task: str = "", truncate: bool = True,
          database: str = "") -> dict[str, Any]:
    """Loss and figures of a model on all rows of some sources; texts longer than its context are cut and counted.

    task        one of `objectives.tasks.TASKS`; empty: that of the model's head
    database    a SQLite file in which queries that a model writes are run

    Raises UsageError for a model that has no such task, DataError for rows that do not fit.
    """
    model, words = auto.load(name)
    model.to(pick_device())
    task = task or ("reward" if model.labels == ("reward",) else OF_HEADS.get(model.task, ""))
    if task == "embed" and model.task not in TASKS["embed"].heads:  # whatever its head is for, its states make vectors
        model = auto.AutoModelForTextEncoding.from_pretrained(name).to(pick_device())
    if task not in TASKS or model.task not in TASKS[task].heads:
        raise UsageError(f"`{name}` was made for `{model.task}`: rows say nothing about it" + (f" as `{task}`" if task else ""),
                         hint=f"tasks are {', '.join(TASKS)}")
    fit = Fit(model.config.max_position_embeddings, truncate)
    recipe = _recipe_of(hub.resolve(name))
    if recipe is None or recipe.finetune.task != task:  # with the options that it was taught with, where that was this task
        recipe = Recipe()
    recipe = recipe.override({"finetune.database": ""})
    learns: RowObjective = TASKS[task].make(recipe, words, fit, model.task)
    chosen = model.kept.get("threefold") or {}
    if isinstance(learns, Classify):
        learns.labels, learns.outside = model.labels, chosen.get("outside", "")
        learns.kind = model.kept.get("problem_type") or learns.kind
    elif model.labels:
        learns.labels = model.labels  # type: ignore[attr-defined]
    if database and not isinstance(learns, Translate):
        raise UsageError(f"queries are run for `seq2seq`, and the task is `{task}`", hint="leave --database out")
    if isinstance(learns, Translate) and database:
        learns.database = Database(Path(database))
    if task == "embed":
        learns.pooling = (model.pooling or Pooling("mean")).how  # type: ignore[attr-defined]
    rows = [row for path in data for row in read_rows(parse_source(path).path, learns.fields, dict(columns or {}))]
    if not rows:
        raise DataError(f"{', '.join(data)} holds no rows", hint="give rows to judge")
    examples = Examples(learns.items(rows), 32, 0, pad=filler(words), vocab_size=model.config.vocab_size)
    if isinstance(learns, Dpo) and not any(adapters.sides(model)):
        size = {"vocab_size": model.config.vocab_size, "context": model.config.max_position_embeddings}
        learns.reference = resized(_reference(name), **size).to(model.device)
    held = HeldOutRows(model, learns, examples, written=None)
    found = held(None)
    result = {"task": task, "rows": len(rows), "cut": fit.cut, "loss": found["loss"], **found.get("metrics", {})}
    if isinstance(learns, Classify) and learns.kind == KINDS["one"] and "threshold" in chosen:
        logits = np.stack([one.scores for one in held.judged]) / chosen["temperature"]
        truth = np.asarray([one.item.target for one in held.judged])
        if (truth == OUTSIDE).any():
            refused = metrics.rejection(logits, truth, chosen["threshold"])
            result |= {"accuracy_with_refusals": refused["accuracy"], "outside_recall": refused["recall"]}
    return result


def _reference(name: str) -> Model:
    """The model that a run of `dpo` began with, by which its answers are judged."""
    recipe = _recipe_of(hub.resolve(name))
    if recipe is None:
        raise UsageError(f"`{name}` does not say which model it began with, and `dpo` judges by how far a model has moved from it",
                         hint="name the run's directory: threefold evaluate RUN --task dpo --data ROWS")
    return load_model(hub.resolve(recipe.model.from_model), task="causal")

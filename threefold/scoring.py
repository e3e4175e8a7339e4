"""How good a model is: what `threefold evaluate MODEL` says. On running text by the loss of the objective that it learnt, on rows
by the figures of its task.

Decisions:
- The model says which task it has (its head, and the names that its directory keeps); the rows are those that it would be trained
  on, and the figures those that training shows of held-out rows.
- What is no decoder has no loss of text but that of its objective: the recipe of its run says which, and with which share and seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from threefold import auto, console, files, hub
from threefold.config import Recipe, load_recipe
from threefold.data.examples import Examples
from threefold.data.shards import left_out, prepare
from threefold.device import pick_device
from threefold.errors import DataError, UsageError
from threefold.evaluation import metrics
from threefold.evaluation.execution import Database
from threefold.evaluation.loss import evaluate_model, own_shards
from threefold.model import adapters
from threefold.model.base import Model
from threefold.model.grow import resized
from threefold.model.pooling import Pooling
from threefold.model.weights import load_config, load_model, saved_task
from threefold.objectives import kind_of
from threefold.objectives.classify import KINDS, OUTSIDE, Classify
from threefold.objectives.heldout import HeldOut
from threefold.objectives.heldout_rows import HeldOutRows
from threefold.objectives.preference import Dpo
from threefold.objectives.rows import Fit, RowObjective, filler
from threefold.objectives.tasks import TASKS
from threefold.objectives.translate import Translate
from threefold.text.rows import format_of
from threefold.text.sources import expand, parse_source, read_rows
from threefold.text.tokenizer import Tokenizer

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
        return taught if taught or recipe is None else "text"
    text = all(_is_text(parse_source(spec).path) for spec in data)
    if taught and text:
        console.note(f"{', '.join(data)} is judged as running text; rows of what `{name}` was taught are judged with --task {taught}")
    return "text" if text else taught or "text"


def of_text(name: str, data: Sequence[str] = (), columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Loss and perplexity of running text: of some sources, or of the held-out part of a model's own run. A decoder's also in bits per
    byte (evaluation/loss.py); of any other each term of the objective of its run.

    Raises UsageError for what is neither a decoder nor from a pretraining run.
    """
    folder = hub.resolve(name, needs=("model", "tokenizer"))
    if adapters.is_adapter(folder) or saved_task(folder) == "causal":
        return dict(evaluate_model(name, data, columns))
    recipe = _recipe_of(folder)
    if recipe is None or recipe.finetune.task:
        raise UsageError(f"`{name}` is no decoder, and nothing says by which objective text would judge it",
                         hint="text judges decoders and the runs of `threefold pretrain`; what has learnt a task is judged by rows: --data ROWS")
    tokenizer, config = Tokenizer.load(folder), load_config(folder)[1]
    objective = kind_of(recipe.train.objective).make(recipe, tokenizer, saved_task(folder))
    model = objective.load(folder, vocab_size=config.vocab_size, context=config.max_position_embeddings).to(pick_device(note=console.note))
    console.notes(model.notes)
    with contextlib.ExitStack() as until_judged:
        if data:
            place = until_judged.enter_context(files.scratch()) / "data"
            shards = prepare([parse_source(spec) for spec in data], tokenizer, place, val_fraction=0, columns=columns, near_duplicates=False)
            console.notes(left_out(shards))
        else:
            shards = own_shards(Path(name), folder)
        held = HeldOut(model, objective, shards, config.max_position_embeddings, (), "train" if data else "validation")
        found: dict[str, Any] = dict(held(None))
    smoothed = recipe.train.objective == "seq2seq" and recipe.objective.smoothing > 0  # whose loss is that of no distribution
    shown = ("loss", "tokens") if smoothed else ("loss", "perplexity", "tokens")
    return {**{name: found[name] for name in shown}, **found.get("terms", {})}


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

"""The examples of a batch in words: what a model reads, what it learns from, and who attends to whom.

Decisions:
- What is shown is the batch that training takes, from the same loader and objective: nothing is made up for the eye.
- A set in which nothing is learnt is refused, as a step of training refuses it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from threefold import hub
from threefold.config import Recipe, load_recipe
from threefold.data.loader import IGNORED, Batch, Batches, Loader
from threefold.data.shards import Shards, is_prepared
from threefold.errors import NumericError, UsageError
from threefold.model.families import family_of
from threefold.model.weights import load_config
from threefold.objectives import Objective, Vocabulary, kind_of, task_of
from threefold.objectives.rows import RowObjective
from threefold.text.tokenizer import Tokenizer
from threefold.training.log import RunLog

CONTEXT = 64  # tokens, where nothing says how long rows are
SHOWN = 40  # labels of a row


def of_run(run: Path, *, step: int = 0, rows: int = 4) -> dict[str, Any]:
    """Rows of the batch of a step of a run, as `inspected` gives them."""
    recipe = load_recipe(run / "recipe.toml")
    plan = next((line for line in RunLog(run / "log.jsonl").lines() if line.get("decision") == "plan"), None)
    if plan is None:
        raise UsageError(f"`{run}` has no plan yet", hint="start it, or look at data: threefold data show DIR --objective O")
    data = run / "data" if is_prepared(run / "data") else Path(recipe.data.paths[0])
    return of_shards(data, recipe.train.objective, recipe=recipe, family=plan["config"]["model_type"], context=int(plan["context"]),
                     batch=int(plan["rows"]), step=step, rows=rows)


def of_model(model: str, data: Path, objective: str, *, context: int | None = None, rows: int = 4) -> dict[str, Any]:
    """Rows of a first batch that a model would be trained on, from a shard folder."""
    folder = hub.resolve(model, needs=("model", "tokenizer"))
    family, config = load_config(folder)
    Shards.open(data).check_tokenizer(Tokenizer.load(folder).fingerprint)
    return of_shards(data, objective, family=family.name, context=context or min(config.max_position_embeddings, CONTEXT), rows=rows)


def of_shards(data: Path, objective: str, *, recipe: Recipe | None = None, family: str = "", context: int = CONTEXT, batch: int = 0,
              step: int = 0, rows: int = 4) -> dict[str, Any]:
    """Rows of a batch of a shard folder under an objective."""
    recipe = recipe or Recipe().override({"train.objective": objective})
    shards = Shards.open(data)
    tokenizer = Tokenizer.load(shards.tokenizer_dir)
    kind = kind_of(objective)
    task = task_of(recipe, family_of(family or kind.family))
    made = kind.make(recipe, tokenizer, task)
    loader = Loader(shards, made.span(context), max(batch, rows), recipe.train.seed, example=made.example)
    return inspected(loader.batch(step, slice(0, rows)), made, Vocabulary.of(tokenizer), loader)


def inspected(batch: Batch, objective: Objective, words: Vocabulary, loader: Batches | None = None, *, shown: int | None = None) -> dict[str, Any]:
    """`weights` of the terms, and for each row (or the first so many) `from`, `read`, `learnt` [(place, what stands there, what is
    to be said)], `attends`, of pairs `follows`, and `answer` where something is to be said of the text as a whole; texts for
    people.

    Raises NumericError where nothing in the batch is learnt.
    """
    weights = dict(objective.weights(batch))
    if empty := [name for name, weight in weights.items() if not weight]:
        raise NumericError(f"nothing is learnt from this batch in the term {', '.join(empty)}: every label is {IGNORED}",
                           hint="the answer may be cut off by the context: a longer one, or shorter examples")
    rows = [_row(batch, row, objective, words, loader) for row in range(min(len(batch), shown or len(batch)))]
    return {"objective": objective.name, "task": objective.task, "weights": weights, "rows": rows}


def _row(batch: Batch, row: int, objective: Objective, words: Vocabulary, loader: Batches | None) -> dict[str, Any]:
    ids = batch.input_ids[row].numpy()
    of_rows = objective if isinstance(objective, RowObjective) else None
    as_a_whole = objective.task == "classify" or batch.labels.ndim == 1
    labels = np.zeros(0, dtype=np.int64) if as_a_whole else batch.labels[row].numpy()
    real = len(ids) if batch.attention_mask is None else int(batch.attention_mask[row].sum())
    apart = objective.task == "seq2seq"
    places = np.flatnonzero(labels != IGNORED)
    name_of = (lambda label: of_rows.named(label) or words.text(label)) if of_rows is not None else words.text
    learnt = [(int(p), "" if apart else words.text(int(ids[p])), name_of(int(labels[p]))) for p in places]
    found: dict[str, Any] = {
        "from": None if loader is None else loader.describe(int(batch.samples[row])),
        "read": " ".join(words.text(int(i)) for i in ids[:real]),
        "learnt": learnt,
        "share": round(len(places) / max(1, len(labels) if apart else real), 4),
        "attends": _attends(batch, row, real, objective.task),
    }
    if of_rows is not None and (answer := of_rows.answer(batch, row)) is not None:
        found["answer"] = answer
    if batch.pairs is not None:
        found["follows"] = not bool(batch.pairs[row])
    return found


def _attends(batch: Batch, row: int, real: int, task: str) -> str:
    filled = batch.input_ids.shape[1] - real
    tail = f"; {filled} places are padding, which nobody sees" if filled else ""
    borders = [] if batch.documents is None else (np.flatnonzero(np.diff(batch.documents[row].numpy()[:real])) + 1).tolist()
    edges = [0, *borders, real]
    pieces = ", ".join(f"{a}-{b - 1}" for a, b in itertools.pairwise(edges))
    if task == "causal":
        return f"each token sees itself and those before it within {pieces}{tail}"
    words = f"each token sees all tokens within {pieces}{tail}"
    return words + ("; the decoder sees all of them, and what it has written" if task == "seq2seq" else "")


def render(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"objective {found['objective']}, head {found['task']}; learnt from: "
             + ", ".join(f"{weight:,.0f} {name}" for name, weight in found["weights"].items())]
    for number, row in enumerate(found["rows"]):
        lines.append(f"\nrow {number}" + (f": {row['from']}" if row["from"] else ""))
        lines.append(f"  read     {row['read']}")
        if "follows" in row:
            lines.append(f"  pair     the second text {'follows' if row['follows'] else 'does not follow'} the first")
        if "answer" in row:
            lines.append(f"  answer   {row['answer']}")
        shown = [f"{place}: {seen + ' -> ' if seen else ''}{said}" for place, seen, said in row["learnt"][:SHOWN]]
        more = len(row["learnt"]) - SHOWN
        if shown:
            lines.append(f"  learnt   {row['share']:.1%} of the places: " + ", ".join(shown) + (f" and {more} more" if more > 0 else ""))
        lines.append(f"  attends  {row['attends']}")
    return "\n".join(lines)

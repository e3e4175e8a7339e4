"""Rows of a table -> the examples of a task, divided into those that are learnt and those that are held out.

Decisions:
- Rows are held out before anything is learnt of them: of each class its share, and rows with the same text on one side.
- Who looks at a batch and who trains on it read it here, so that what is shown is what is trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from threefold import console, hub
from threefold.config import Recipe
from threefold.data import examples as sets
from threefold.data.examples import Examples, Item
from threefold.errors import ConfigError, DataError, did_you_mean
from threefold.inspection.batches import inspected
from threefold.model import adapters
from threefold.model.config import TransformerConfig
from threefold.model.pooling import is_classifier
from threefold.model.weights import load_config
from threefold.objectives import Vocabulary
from threefold.objectives.classify import OUTSIDE
from threefold.objectives.instruct import plain_template
from threefold.objectives.rows import Fit, RowObjective, filler
from threefold.objectives.tasks import TASKS, head_of
from threefold.plan.check import fits
from threefold.text.grow_tokenizer import with_special
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row
from threefold.text.sources import expand, parse_source, read_rows
from threefold.text.tokenizer import Tokenizer

ROWS = 32  # of a step, unless said; fewer where there are few


@dataclass(frozen=True)
class Checked:
    """What can be known before data is read."""

    origin: Path
    head: str
    context: int
    config: TransformerConfig


def check(recipe: Recipe) -> Checked:
    """Refuse what can be refused without reading the data."""
    if not recipe.finetune.task:
        raise ConfigError("no task: `finetune.task` is empty", hint=f"one of {', '.join(TASKS)}: --task classify")
    if not recipe.data.paths:
        raise ConfigError("no data: `data.paths` is empty", hint="name a file with rows: --data rows.jsonl")
    for path in (*recipe.data.paths, *([recipe.finetune.val] if recipe.finetune.val else [])):
        expand(parse_source(path).path)
    if recipe.finetune.template and not Path(recipe.finetune.template).is_file():
        raise ConfigError(f"there is no file `{recipe.finetune.template}`, which `finetune.template` names", hint="a file with a Jinja template")
    origin = hub.resolve(recipe.model.from_model, needs=("model", "tokenizer"))
    if adapters.is_adapter(origin):
        raise ConfigError(f"`{recipe.model.from_model}` holds an adapter, and learning begins from a whole model",
                          hint=f"merge it first: threefold export {recipe.model.from_model} --out DIR, then --from DIR")
    family, config = load_config(origin)
    fits(recipe, config)
    head = head_of(recipe.finetune.task, family)
    if recipe.lora.rank and head == "classify" and is_classifier(origin):
        raise ConfigError(f"`{recipe.model.from_model}` judges pooled states, and an adapter (`lora.rank`) knows no such head",
                          hint="train it without --lora, or start from the model that it was made of")
    return Checked(origin, head, recipe.model.context or config.max_position_embeddings, config)


@dataclass(frozen=True)
class TaskRows:
    """`learns` has looked at all rows; `words` has the chat template that they were written with; `cut` texts were too long."""

    words: PretrainedTokenizer
    learns: RowObjective
    train: list[Item]
    held: list[Item]
    cut: int


def task_rows(recipe: Recipe, source: Path, head: str, context: int, tell: Callable[[int], None] = lambda count: None) -> TaskRows:
    """Read, divide and encode the rows of a recipe for the model in `source`.

    Raises DataError with file and line for rows that do not fit, and where too few are left to learn from or to hold out.
    """
    f, words = recipe.finetune, PretrainedTokenizer.load(source)
    if f.add_tokens:
        words = _with_tokens(words, f.add_tokens)
    if head in ("classify", "tag", "body", "encoder") and words.pad_token is None:
        _padding(words)
    if TASKS[f.task].chats and head != "seq2seq":
        _template(words, f.template)
    fit = Fit(context, f.truncate)
    learns = TASKS[f.task].make(recipe, words, fit, head)

    def read(paths: Sequence[str]) -> list[Row]:
        return [row for path in paths for row in read_rows(parse_source(path).path, learns.fields, recipe.data.columns)]

    rows = read(recipe.data.paths)
    tell(len(rows))
    learns.learn(rows)
    if f.val:
        train, held = rows, read([f.val])
        seen = {_key(row, learns) for row in train}
        if both := sum(_key(row, learns) in seen for row in held):
            console.warn(f"{both:,} of {len(held):,} held-out rows stand among those that are learnt too: figures will be too good")
    else:
        side = _held_out(rows, learns, recipe.data.val_fraction, recipe.train.seed)
        train, held = list(itertools.compress(rows, ~side)), list(itertools.compress(rows, side))
    if len(train) < learns.fewest or not held:
        learns.items(rows)  # where something is wrong with the rows, that comes first
        raise DataError(f"{len(rows):,} rows cannot be divided into some to learn from and some to hold out",
                        hint="give more rows, or rows to hold out with --val")
    learnt, judged = learns.items(train), learns.items(held)
    if f.outside:  # not learnt, so they may help to choose a threshold
        judged += [item for item in learnt if item.target == OUTSIDE]
        learnt = [item for item in learnt if item.target != OUTSIDE]
        if not any(item.target == OUTSIDE for item in judged):
            raise DataError(f"no row has the label `{f.outside}` that `finetune.outside` names",
                            hint=did_you_mean(f.outside, getattr(learns, "labels", ())))
    tell(len(learnt) + len(judged))
    if fit.cut:
        console.warn(f"{fit.cut:,} texts were longer than {fit.context:,} tokens and were cut")
    for note in learns.notes:
        console.note(note)
    if unused := [token for token in f.add_tokens if TASKS[f.task].chats and token not in (words.chat_template or "")]:
        console.warn(f"the chat template does not write {', '.join(unused)}: nothing will be learnt about it, since no message can spell a special "
                     "token")
    return TaskRows(words, learns, learnt, judged, fit.cut)


def batch_rows(recipe: Recipe, found: TaskRows) -> int:
    """Rows of a step."""
    fewest = found.learns.fewest
    if 0 < recipe.finetune.rows < fewest:
        raise ConfigError(f"`finetune.rows` is {recipe.finetune.rows}, and `{recipe.finetune.task}` compares the rows of a step: {fewest} at least",
                          hint=f"more are better: --finetune.rows {ROWS}")
    return recipe.finetune.rows or max(fewest, min(ROWS, len(found.train) // 8))


def train_batches(recipe: Recipe, found: TaskRows, context: int, rows: int, vocab_size: int) -> Examples:
    """The batches that are learnt from."""
    return Examples(found.train, rows, recipe.train.seed, pad=filler(found.words), vocab_size=vocab_size,
                    room=context if found.learns.packs else 0, name=", ".join(recipe.data.paths))


def batch_in_words(recipe: Recipe, *, step: int = 0, rows: int | None = None, shown: int = 4) -> dict[str, Any]:
    """Rows of the batch of a step of a recipe with a task, as `inspection.batches` gives them."""
    checked = check(recipe)
    found = task_rows(recipe, checked.origin, checked.head, checked.context)
    loader = train_batches(recipe, found, checked.context, rows or batch_rows(recipe, found), checked.config.vocab_size)
    return inspected(loader.batch(step), found.learns, Vocabulary.of(found.words.core), loader, shown=shown)


def _with_tokens(words: PretrainedTokenizer, tokens: Sequence[str]) -> PretrainedTokenizer:
    if words.target is not None:
        raise ConfigError("`finetune.add_tokens` with a model that has one vocabulary for what it reads and one for what it writes",
                          hint="add tokens to a model with one vocabulary")
    core = Tokenizer(with_special(words.core.spec, tokens), words.core.roles, config=words.core.config)
    return PretrainedTokenizer(core, words.config, words.chat_template)


def _padding(words: PretrainedTokenizer) -> None:
    """Name a token that fills rows up, for others cannot judge several texts at once without one: the unknown one, else the end."""
    token = next((token for token in (words.unk_token, words.eos_token) if token is not None), None)
    if token is not None:
        words.pad_token = words.core.config["pad_token"] = token
        console.note(f"the tokenizer has no token that fills rows up: {token} is named for it, and saved so")


def _template(words: PretrainedTokenizer, path: str) -> None:
    if path:
        try:
            words.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise ConfigError(f"`finetune.template` is `{path}`, which cannot be read: {problem}",
                              hint="a file with a Jinja template, in UTF-8") from problem
    elif words.chat_template is None:
        words.chat_template = plain_template(words)
        console.note("the model has no chat template: turns are written as `### Question:` and `### Answer:`, and answers end with "
                     f"{words.eos_token or words.sep_token}; the template is saved with the tokenizer")
    words.core.config["chat_template"] = words.chat_template


def _held_out(rows: Sequence[Row], learns: RowObjective, share: float, seed: int) -> np.ndarray:
    """Which rows are held out: a share of each class; rows that say the same stand on one side."""
    first: dict[str, int] = {}
    same = [first.setdefault(_key(row, learns), n) for n, row in enumerate(rows)]
    chosen = [n for n, one in enumerate(same) if n == one]
    side = np.zeros(len(rows), dtype=bool)
    side[chosen] = sets.split([learns.target_of(rows[n]) for n in chosen], share, seed)
    held: np.ndarray = side[np.asarray(same)]
    return held


def _key(row: Row, learns: RowObjective) -> str:
    """What two rows have in common that must not stand on both sides."""
    names = learns.same or (*learns.fields, *learns.optional)
    return repr(sorted((name, _asked(value)) for name, value in row.fields.items() if name in names and name != "label"))


def _asked(value: Any) -> Any:
    """Of a conversation what stands before the first answer to a user."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in value] if isinstance(value, list) else []
    answered = next((place for place, role in enumerate(roles) if role == "assistant" and "user" in roles[:place]), None)
    return value if answered is None else value[:answered]

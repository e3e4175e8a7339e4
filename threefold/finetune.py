"""Stage 3: from a foundation model and rows of a table to a model of a task, in a run directory.

    rows -> examples -> a head on a model -> trainer -> RUN/model, README, report

Decisions:
- Every task starts from a run, a Hugging Face directory or a hub name, of any family that has a head for it, and ends in
  a directory that the ecosystem opens and that says the same there.
- Rows are held out before anything is learnt of them: of each class its share, and rows with the same text on one side.
- The model that is kept is that of the best evaluation; who stops improving is stopped.
- A trained model is moved gently: AdamW, at a rate that falls with the size of the model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threefold import console, files, hub, stage
from threefold import device as machine
from threefold.config import Recipe
from threefold.data import examples as sets
from threefold.data.examples import Examples, Item
from threefold.errors import ConfigError, DataError
from threefold.model import adapters
from threefold.model.base import Model
from threefold.model.grow import resized
from threefold.model.pooling import Pooling, write_pooling
from threefold.model.weights import load_config, load_model
from threefold.objectives.classify import OUTSIDE
from threefold.objectives.embed import Embed
from threefold.objectives.heldout_rows import HeldOutRows
from threefold.objectives.instruct import plain_template
from threefold.objectives.preference import Dpo
from threefold.objectives.rows import Fit, RowObjective, filler
from threefold.objectives.tasks import TASKS, head_of
from threefold.objectives.term import Objective
from threefold.plan.check import fits
from threefold.stage import Learning, Request, Stage
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row
from threefold.text.sources import expand, parse_source, read_rows
from threefold.training.card import task_card
from threefold.training.decisions import Value
from threefold.training.length import Limits
from threefold.training.log import Line
from threefold.training.optim import Optimizer

ROWS = 32              # of a step, unless said; fewer where there are few
RATE, RATE_AT = 1e-4, 22e6   # AdamW's rate for a model of so many parameters; it falls with the root of their number
PATIENCE = 4           # evaluations without improvement
EVALUATIONS = 10       # of a run whose end is known
SUBSET_TOKENS = 65536  # of held-out rows, for evaluations on the way


def finetune(recipe: Recipe, request: Request) -> dict[str, Any]:
    """Run a recipe with a task in `request.out`, from wherever that run stands; returns the last evaluation.

    Raises a ThreefoldError that says what to mend; Interrupted after a signal, with a checkpoint saved.
    """
    return stage.run(recipe, request, check(recipe, request), FineTuning)


@dataclass(frozen=True)
class Checked:
    """What can be known before data is read."""

    origin: Path
    head: str
    context: int


def check(recipe: Recipe, request: Request) -> Checked:
    """Refuse what can be refused without reading the data or writing anything."""
    if not recipe.finetune.task:
        raise ConfigError("no task: `finetune.task` is empty", hint=f"one of {', '.join(TASKS)}: --task classify")
    if not recipe.data.paths:
        raise ConfigError("no data: `data.paths` is empty", hint="name a file with rows: --data rows.jsonl")
    for path in (*recipe.data.paths, *([recipe.finetune.val] if recipe.finetune.val else [])):
        expand(parse_source(path).path)
    origin = hub.resolve(recipe.model.from_model, needs=("model", "tokenizer"))
    family, config = load_config(origin)
    fits(recipe, config)
    stage.refused(request, [origin, *(Path(p) for p in (*recipe.data.paths, recipe.finetune.val) if p and Path(p).exists())])
    return Checked(origin, head_of(recipe.finetune.task, family), recipe.model.context or config.max_position_embeddings)


class FineTuning(Stage):
    """A run that learns from rows."""

    reading = "reading and encoding rows"
    train: list[Item]
    held: list[Item]
    words: PretrainedTokenizer
    learns: RowObjective
    held_out: HeldOutRows

    def __init__(self, recipe: Recipe, request: Request, checked: Checked, started: float, **more: Any) -> None:
        super().__init__(recipe, request, checked, started, **more)
        self.source, self.head = checked.origin, checked.head
        self.fit = Fit(checked.context, recipe.finetune.truncate)

    # -- rows to examples ----------------------------------------------------------------------------------------------

    def prepare(self, bar: console.Progress) -> None:
        """Read, divide and encode the rows."""
        f = self.recipe.finetune
        self.words = PretrainedTokenizer.load(self.source)
        self.tokenizer = self.words.core
        if TASKS[f.task].chats and self.head != "seq2seq":
            self._template()
        self.learns = TASKS[f.task].make(self.recipe, self.words, self.fit, self.head)
        rows = self._read(self.recipe.data.paths)
        bar.update(len(rows))
        self.learns.learn(rows)
        if f.val:
            train, held = rows, self._read([f.val])
        else:
            side = _held_out(rows, self.learns, self.recipe.data.val_fraction, self.recipe.train.seed)
            train, held = list(itertools.compress(rows, ~side)), list(itertools.compress(rows, side))
        if not train or not held:
            self.learns.items(rows)  # where something is wrong with the rows, that comes first
            raise DataError(f"{len(rows):,} rows cannot be divided into some to learn from and some to hold out",
                            hint="give more rows, or rows to hold out with --val")
        self.train, self.held = self.learns.items(train), self.learns.items(held)
        self.held += [item for item in self.train if item.target == OUTSIDE]  # not learnt, so they may help to choose a threshold
        self.train = [item for item in self.train if item.target != OUTSIDE]
        bar.update(len(self.train) + len(self.held))
        if self.fit.cut:
            console.warn(f"{self.fit.cut:,} texts were longer than {self.fit.context:,} tokens and were cut")

    def _read(self, paths: Sequence[str]) -> list[Row]:
        return [row for path in paths for row in read_rows(parse_source(path).path, self.learns.fields, self.recipe.data.columns)]

    def _template(self) -> None:
        if path := self.recipe.finetune.template:
            self.words.chat_template = Path(path).read_text(encoding="utf-8")
        elif self.words.chat_template is None:
            self.words.chat_template = plain_template(self.words)
            console.note("the model has no chat template: turns are written as `### Question:` and `### Answer:`, and answers end with "
                         f"{self.words.eos_token or self.words.sep_token}; the template is saved with the tokenizer")
        self.tokenizer.config["chat_template"] = self.words.chat_template

    # -- model and training --------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Batch and dtype."""
        choice = machine.pick_dtype(self.recipe.train.dtype, self.device)
        rows = self.recipe.finetune.rows or max(1, min(ROWS, len(self.train) // 8))
        return {"dtype": str(choice.dtype).removeprefix("torch."), "why_dtype": choice.why, "context": self.fit.context, "rows": rows}

    def objective(self, plan: Value) -> Objective:
        """That of the task."""
        return self.learns

    def model(self, plan: Value, objective: Objective) -> Model:
        """The model that is started from, with the head of the task."""
        labels = tuple(getattr(self.learns, "labels", ()))
        model = load_model(self.source, torch.float32, task=self.head, classes=len(labels) or None, seed=self.recipe.train.seed)
        console.notes(model.notes)
        model.labels = labels
        if isinstance(self.learns, Embed) and self.learns.pooling == "auto":
            self.learns.pooling = "mean" if model.config.num_encoder_layers else "last"
        if isinstance(self.learns, Dpo) and not self.recipe.lora.rank:
            self.learns.reference = load_model(self.source, torch.float32, task=self.head).to(self.device)
        if self.words.chat_template is not None and len(self.words) > model.config.vocab_size:
            model = resized(model, vocab_size=len(self.words), context=model.config.max_position_embeddings)
        self._freeze(model)
        if (lora := self.recipe.lora).rank:
            shape = adapters.Shape(lora.rank, lora.alpha or 2.0 * lora.rank, lora.dropout)
            adapters.attach(model, shape, lora.targets, seed=self.recipe.train.seed)
        return model

    def _freeze(self, model: Model) -> None:
        if not (count := self.recipe.finetune.freeze):
            return
        depths = {name: depth for name, depth in depth_of(model).items() if depth <= count}
        if max(depth_of(model).values()) <= count:
            raise ConfigError(f"`finetune.freeze` is {count}, and the model has {model.config.num_hidden_layers} layers: nothing would be learnt "
                              "but the head", hint="freeze fewer layers")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in depths)

    def learning(self, model: Model, objective: Objective, plan: Value) -> Learning:
        """Batches of rows, AdamW, and an end after some epochs or when nothing improves."""
        t, f, rows = self.recipe.train, self.recipe.finetune, int(plan["rows"])
        common = {"pad": filler(self.words), "vocab_size": model.config.vocab_size}
        room = self.fit.context if self.learns.packs else 0
        loader = Examples(self.train, rows, t.seed, room=room, name=", ".join(self.recipe.data.paths), **common)
        held = Examples(self.held, rows, 0, name="held-out rows", **common)
        steps = t.steps
        if steps is None and t.tokens is None and t.budget is None:
            steps = max(1, math.ceil(f.epochs * loader.epoch_steps))
        elif t.tokens is not None:
            steps = min(steps or t.tokens, math.ceil(t.tokens / loader.tokens_per_step))
        self.held_out = HeldOutRows(model, self.learns, held)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rate = t.learning_rate or RATE * (RATE_AT / max(trained, 10**5)) ** 0.5
        decay = f.layer_decay
        depths = depth_of(model)
        top = max(depths.values()) + 1
        optimizer = Optimizer(model, {}, lr=rate, adamw_lr=rate, weight_decay=t.weight_decay, betas=(0.9, 0.98),
                              scales={name: decay ** (top - depth) for name, depth in depths.items()} if decay != 1 else {})
        return Learning(
            loader=loader,
            optimizer=optimizer,
            evaluate=self.held_out,
            limits=Limits(steps=steps, budget=t.budget, converged=True, patience=min(t.patience, PATIENCE)),
            eval_every=t.eval_every or (0 if t.budget is not None else max(1, (steps or 0) // EVALUATIONS)),
            evaluations=EVALUATIONS,
            held_out=int(held.lengths.sum()),
            validation_tokens=SUBSET_TOKENS,
            rows=rows,
            take_best=True,
        )

    # -- the result ----------------------------------------------------------------------------------------------------

    def data_identity(self) -> dict[str, Any]:
        """Fingerprints of the rows, of the tokenizer, and of what stays as it is."""
        found = {"data_fingerprint": sets.fingerprint([*self.train, *self.held]), "tokenizer_fingerprint": self.tokenizer.fingerprint}
        if self.recipe.lora.rank or self.recipe.finetune.freeze or self.recipe.finetune.task == "dpo":
            found["base_sha256"] = weights_hash(self.source)
        return found

    def write(self, model: Model, folder: Path) -> None:
        """An adapter, or the model; what was chosen on held-out rows goes into config.json, under our name."""
        if self.recipe.lora.rank:
            adapters.save(model, folder, str(self.source.resolve()))
            return
        super().write(model, folder)
        if isinstance(self.learns, Embed):
            write_pooling(folder, Pooling(self.learns.pooling, longest=self.fit.context), width=model.config.hidden_size)
        described = json.loads((folder / "config.json").read_bytes())
        if kind := getattr(self.learns, "kind", None):
            described["problem_type"] = kind
        if settled := self.learns.settle(model, self.held_out.judged):
            described["threefold"] = settled
        files.write_file(folder / "config.json", json.dumps(described, indent=2) + "\n")

    def save_tokenizer(self, folder: Path, context: int) -> None:
        """With what was loaded beside the ids: a second side for translations, a chat template."""
        if self.words.target is None:
            super().save_tokenizer(folder, context)
        else:
            self.words.save_pretrained(folder)

    def card(self, model: Model, evaluation: Line) -> str:
        """The model card."""
        return task_card(self.recipe, model.config, model.num_parameters(), len(self.train), len(self.held), evaluation)


def weights_hash(folder: Path) -> str:
    """A hash of the weights of a model directory."""
    return hashlib.sha256("".join(files.sha256(path) for path in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()


def depth_of(model: Model) -> dict[str, int]:
    """Where each parameter of the body stands: 0 for embeddings, n for the n-th layer from the bottom; heads are left out."""
    found = {}
    for name, _ in model.named_parameters():
        if not name.startswith("transformer."):
            continue
        parts = name.split(".")
        at = int(parts[parts.index("blocks") + 1]) + 1 if "blocks" in parts else 0
        if parts[1] == "decoder" and model.config.num_encoder_layers:
            at += model.config.num_encoder_layers * bool(at)
        found[name] = at if "blocks" in parts or "norm" not in parts[2] else model.config.num_hidden_layers
    return found


def _held_out(rows: Sequence[Row], learns: RowObjective, share: float, seed: int) -> np.ndarray:
    """Which rows are held out: a share of each class; rows that say the same stand on one side."""
    first: dict[str, int] = {}
    same = [first.setdefault(repr(sorted((k, v) for k, v in row.fields.items() if k in (*learns.fields, *learns.optional) and k != "label")), n)
            for n, row in enumerate(rows)]
    chosen = [n for n, one in enumerate(same) if n == one]
    side = np.zeros(len(rows), dtype=bool)
    side[chosen] = sets.split([learns.target_of(rows[n]) for n in chosen], share, seed)
    held: np.ndarray = side[np.asarray(same)]
    return held

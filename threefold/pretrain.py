"""Stage 2: from raw text, or an earlier model, to a foundation model in a run directory.

    text -> tokenizer -> shards -> shape -> model -> trainer -> RUN/model, README, report

Decisions:
- What can be refused is refused before the first byte is written, by the same `check` that a dry run makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from threefold import console, rundir, stage
from threefold.config import Recipe
from threefold.data.loader import Loader
from threefold.data.shards import Shards, ensure, is_prepared, left_out
from threefold.errors import DataError
from threefold.model.base import Model
from threefold.model.build import matrix_parts
from threefold.model.families import family_of
from threefold.objectives import Objective, kind_of, task_of
from threefold.objectives.heldout import HeldOut
from threefold.objectives.samples import sampler
from threefold.plan.check import Checked, check, resolved
from threefold.plan.shape import config_from, plan_run
from threefold.stage import Learning, Request, Stage, figure
from threefold.text.clean import normalise
from threefold.text.sources import parse_source, read_documents
from threefold.text.tokenizer import Tokenizer
from threefold.training.card import model_card
from threefold.training.decisions import Value
from threefold.training.length import PATIENCE, Limits
from threefold.training.log import Line
from threefold.training.optim import Optimizer

MUON_LR, PURE_ADAMW_LR = 0.025, 1e-3

__all__ = ["Pretraining", "Request", "dry_run", "figure", "pretrain"]


def pretrain(recipe: Recipe, request: Request) -> dict[str, Any]:
    """Run a recipe to its end in `request.out`, from wherever that run stands; returns the last evaluation as plain
    data.

    Raises a ThreefoldError that says what to mend; Interrupted after a signal, with a checkpoint saved.
    """
    recipe = resolved(recipe)
    return stage.run(recipe, request, _refused(recipe, request), Pretraining)


def dry_run(recipe: Recipe, request: Request | None = None) -> dict[str, Any]:
    """What a run would do, checked as the run checks it, with nothing written. Of the data the first document of each
    source is read. With a `request` its folder and log are looked at too."""
    recipe = resolved(recipe)
    checked = check(recipe) if request is None else _refused(recipe, request)
    if request is not None and not request.fresh:
        rundir.compare(recipe, request.out, force=request.force)
    for path, found in checked.files.items():
        if found and not checked.prepared:
            next(read_documents(parse_source(path).path, recipe.data.columns, recipe.data.on_problem))
    return {"files": {path: len(names) for path, names in checked.files.items()}, "recipe": recipe.flat()}


def _refused(recipe: Recipe, request: Request) -> Checked:
    """What the check finds, of the recipe and of the place where the result is to go, before anything is written."""
    checked = check(recipe, has_data=is_prepared(request.out / "data"))
    uses = [checked.origin, *(Path(p) for p in recipe.data.paths if Path(p).exists())]
    stage.refused(request, [path for path in uses if path is not None])
    return checked


class Pretraining(Stage):
    """A run that learns from running text."""

    reading = "reading, cleaning and encoding the data, documents"
    shards: Shards
    checked: Checked

    def __init__(self, recipe: Recipe, request: Request, checked: Checked, started: float, **more: Any) -> None:
        super().__init__(recipe, request, checked, started, **more)
        self.checked = checked

    # -- text to shards -------------------------------------------------------------------------------------------

    def prepare(self, bar: console.Progress) -> None:
        """Open or make the shards, and the tokenizer."""
        d = self.recipe.data
        if self.checked.prepared:
            self.shards = Shards.open(d.paths[0], verify=True)
            self.tokenizer = Tokenizer.load(self.shards.tokenizer_dir)
            other = self.checked.tokenizer if self.origin is None else Tokenizer.load(self.origin)
            if other is not None:
                self.shards.check_tokenizer(other.fingerprint)
            return
        folder = self.run / "data"
        prepared, begun = folder / "tokenizer", is_prepared(folder)
        self.tokenizer = Tokenizer.load(prepared) if prepared.is_dir() else self._tokenizer()
        self.shards = ensure(
            [parse_source(path) for path in d.paths],
            self.tokenizer,
            folder,
            val_fraction=d.val_fraction,
            columns=d.columns,
            near_duplicates=d.near_duplicates,
            skip_problems=d.skip_problems,
            progress=lambda documents, characters: bar.update(documents, characters=characters),
            accept_new_data=self.request.accept_new_data,
            note=console.note,
        )
        console.notes([] if begun and not self.request.accept_new_data else left_out(self.shards))
        held, learnt = (self.shards.count(side).bytes for side in ("validation", "train"))
        if held > 2 * d.val_fraction * (held + learnt):
            console.note(f"{held / (held + learnt):.0%} of the text is held out, more than `data.val_fraction` {d.val_fraction:g}: documents are "
                         "held out whole, and there are few; cut them into smaller ones for less")

    def _tokenizer(self) -> Tokenizer:
        asked, learns = self.recipe.tokenizer.kind_or_path, kind_of(self.recipe.train.objective)
        if self.origin is not None:
            tokenizer = Tokenizer.load(self.origin)
            if added := self.recipe.model.grow_vocab:
                tokenizer = tokenizer.grow(self._texts(), added)
        elif self.checked.tokenizer is not None:
            tokenizer = self.checked.tokenizer
        else:
            kind = family_of(self.recipe.model.family).tokenizer if asked == "auto" else asked
            tokenizer = Tokenizer.train(kind, self._texts(), self.recipe.tokenizer.vocab_size, special=learns.special,
                                        roles={} if kind == "wordpiece" else learns.roles)
        console.notes(tokenizer.notes)
        return tokenizer

    def _texts(self) -> Iterator[str]:
        for path in self.recipe.data.paths:
            for document in read_documents(parse_source(path).path, self.recipe.data.columns, self.recipe.data.on_problem):
                yield normalise(document.text)

    # -- shape, model, training -----------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Shape, context, batch and dtype for this machine and data."""
        return plan_run(self.recipe, self.shards, self.tokenizer, self.origin, self.device, elapsed=self.elapsed())

    def objective(self, plan: Value) -> Objective:
        """The recipe's objective, with the head that its family has for it."""
        task = task_of(self.recipe, family_of(config_from(plan["config"]).model_type))
        return kind_of(self.recipe.train.objective).make(self.recipe, self.tokenizer, task)

    def model(self, plan: Value, objective: Objective) -> Model:
        """A new model, or the one that is continued."""
        config = config_from(plan["config"])
        if self.origin is None:
            return objective.build(config, self.recipe.train.seed)
        model = objective.load(self.origin, vocab_size=config.vocab_size, context=config.max_position_embeddings)
        console.notes(model.notes)
        return model

    def learning(self, model: Model, objective: Objective, plan: Value) -> Learning:
        """Rows cut from the shards; Muon for matrices and AdamW for the rest."""
        t = self.recipe.train
        context, rows = int(plan["context"]), int(plan["rows"])
        loader = Loader(self.shards, objective.span(context), rows, t.seed, example=objective.example)
        held_out = self.shards.count("validation").tokens
        if not held_out:
            raise DataError(
                f"`{self.run / 'data'}` has no validation part", hint="prepare it with a validation fraction above 0"
            )
        pure = t.optimizer == "adamw"
        scale = 0.3 if self.origin is not None else 1.0  # a trained model is moved more gently
        optimizer = Optimizer(
            model,
            {} if pure else matrix_parts(model),
            lr=t.learning_rate or scale * (PURE_ADAMW_LR if pure else MUON_LR),
            adamw_lr=t.adamw_learning_rate or scale * kind_of(t.objective).rate,
            weight_decay=t.weight_decay,
            iterate_in=torch.bfloat16 if model.compute_dtype == torch.bfloat16 else None,
        )
        ends = [
            e for e in (t.steps, None if t.tokens is None else -(-t.tokens // loader.tokens_per_step)) if e is not None
        ]
        known = min(ends, default=0)
        pieces = self.tokenizer.token_bytes()
        return Learning(
            loader=loader,
            optimizer=optimizer,
            evaluate=HeldOut(model, objective, self.shards, context, pieces),
            sample=sampler(model, self.tokenizer, self.shards, context, pieces),
            limits=Limits(steps=known or None, budget=t.budget, converged=t.until == "converged", patience=t.patience or PATIENCE),
            eval_every=t.eval_every or (
                0 if t.budget is not None else max(1, known // 10) if known else max(10, loader.epoch_steps // 4)),
            evaluations=max(1, min(8, round((t.budget or 0) / 10))),
            held_out=held_out,
            validation_tokens=int(plan["validation_windows"]) * context,
            rows=rows,
            source_names=loader.names,
        )

    # -- the result -----------------------------------------------------------------------------------------------

    def data_identity(self) -> dict[str, Any]:
        """Fingerprints of the shards and of their tokenizer."""
        return {"data_fingerprint": self.shards.fingerprint, "tokenizer_fingerprint": self.shards.tokenizer_fingerprint}

    def card(self, model: Model, evaluation: Line) -> str:
        """The model card."""
        return model_card(self.recipe, self.shards, model, evaluation)

"""Stage 2: from raw text, or an earlier model, to a foundation model in a run directory.

    text -> tokenizer -> shards -> shape -> model -> trainer -> RUN/model, README, report

Decisions:
- This is the one place that turns a recipe into objects; the trainer and the rooms below take plain arguments.
- What the machine's speed or the data's size suggest (size, context, batch, learning rate, warm-up) is one decision
  `plan` at step 0, so that a resumed or replayed run is shaped alike wherever it runs.
- What can be refused is refused before the first byte is written, by the same `check` that a dry run makes.
- The same command again resumes. A finished run says so; a changed recipe is shown and needs `force` (rundir.py),
  changed data `accept_new_data`; `fresh` starts over.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from threefold import console, device, files, rundir
from threefold.config import Recipe, dump, load_recipe
from threefold.data.loader import Loader
from threefold.data.shards import Shards, ensure, is_prepared
from threefold.device import Machine
from threefold.errors import DataError, UsageError
from threefold.model import weights
from threefold.model.base import Model
from threefold.model.build import matrix_parts
from threefold.model.config import TransformerConfig
from threefold.model.families import family_of
from threefold.model.weights import save_model
from threefold.objectives import Objective, Vocabulary, kind_of, task_of
from threefold.objectives.heldout import HeldOut
from threefold.objectives.samples import sampler
from threefold.plan.check import Checked, check, resolved
from threefold.plan.shape import config_from, plan_run
from threefold.text.clean import normalise
from threefold.text.sources import parse_source, read_documents
from threefold.text.tokenizer import Tokenizer
from threefold.text.tokenizer_json import framed
from threefold.training.card import model_card
from threefold.training.decisions import Decisions, Value
from threefold.training.length import Length, Limits
from threefold.training.log import RunLog
from threefold.training.optim import Optimizer
from threefold.training.report import write_report
from threefold.training.trainer import Settings, Trainer

MODEL_FILES = files.besides(*weights.FILES, *Tokenizer.FILES, "README.md")
MUON_LR, ADAMW_LR, PURE_ADAMW_LR = 0.025, 0.015, 1e-3


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a recipe is to be run. started: `time.monotonic()` at the start of the process, for the budget."""

    out: Path
    fresh: bool = False
    force: bool = False
    accept_new_data: bool = False
    steal_lock: bool = False
    replay: Path | None = None
    step: int | None = None
    started: float | None = None


def pretrain(recipe: Recipe, request: Request) -> dict[str, Any]:
    """Run a recipe to its end in `request.out`, from wherever that run stands; returns the last evaluation as plain
    data.

    Raises a ThreefoldError that says what to mend; Interrupted after a signal, with a checkpoint saved.
    """
    started = request.started if request.started is not None else time.monotonic()
    recipe, run = resolved(recipe), request.out
    checked = _refused(recipe, request)
    with files.lock(run, steal=request.steal_lock):
        for folder in (run, run / "checkpoints"):
            files.clean_leftovers(folder)
        if rundir.SetAside.left_behind(run):
            console.note(f"a fresh start in `{run}` did not come as far as its first step: the run before it is back")
        if request.fresh:
            before = rundir.SetAside(run)
            try:
                return _Run(recipe, request, checked, started, settled=before.drop).go()
            except BaseException:
                rundir.SetAside.left_behind(run)
                raise
        asks_for_more = request.accept_new_data or request.step is not None
        if not asks_for_more and (done := rundir.finished(recipe, run)) is not None:
            console.say(f"`{run}` is finished: {figure(_result(run, done))} after step {done['step']:,}; --fresh starts over")
            if not (run / "report.html").exists():  # killed in its last moment
                write_report(run)
            return _result(run, done)
        rundir.compare(recipe, run, force=request.force)
        return _Run(recipe, request, checked, started).go()


def train(recipe: Recipe | str | Path, out: str | Path = "runs/latest", **how: Any) -> dict[str, Any]:
    """Run a recipe, or the TOML file of one, in the run directory `out`: what `threefold pretrain` does.

    `how` are fields of `Request` (fresh, force, replay, ...). The same call again resumes.
    """
    found = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), warn=console.warn)
    return pretrain(found, Request(out=Path(out), **how))


def dry_run(recipe: Recipe, request: Request | None = None) -> dict[str, Any]:
    """What a run would do, checked as the run checks it, with nothing written. Of the data the first document of each
    source is read. With a `request` its folder and log are looked at too."""
    recipe = resolved(recipe)
    checked = check(recipe) if request is None else _refused(recipe, request)
    if request is not None and not request.fresh:
        rundir.compare(recipe, request.out, force=request.force)
    for path, found in checked.files.items():
        if found and not checked.prepared:
            next(read_documents(parse_source(path).path, recipe.data.columns))
    return {"files": {path: len(names) for path, names in checked.files.items()}, "recipe": recipe.flat()}


def _refused(recipe: Recipe, request: Request) -> Checked:
    """What the check finds, of the recipe and of the place where the result is to go, before anything is written."""
    run, replay = request.out, request.replay
    checked = check(recipe, has_data=is_prepared(run / "data"))
    if replay is not None and not replay.is_file():
        raise UsageError(f"there is no log `{replay}` to replay", hint="--replay RUN/log.jsonl of another run")
    if replay is not None and not Decisions(RunLog(run / "log.jsonl"), RunLog(replay).lines()).replaying:
        raise UsageError(f"`{replay}` holds no decision: there is nothing to replay", hint="--replay RUN/log.jsonl of another run")
    uses = [checked.origin, replay if request.fresh else None, *(Path(p) for p in recipe.data.paths if Path(p).exists())]
    rundir.claim(run, [path for path in uses if path is not None])
    files.check_ours(run / "model", MODEL_FILES)
    return checked


class _Run:
    """The objects of one run, made in the order in which they depend on each other."""

    def __init__(
        self,
        recipe: Recipe,
        request: Request,
        checked: Checked,
        started: float,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self.checked, self.origin = checked, checked.origin
        self.recipe, self.request, self.started, self.run = recipe, request, started, request.out
        self.settled = settled  # told when data and plan are there
        self.log = RunLog(self.run / "log.jsonl")
        self.decisions = Decisions(self.log, RunLog(request.replay).lines() if request.replay else ())
        device.set_threads(recipe.train.threads)
        device.keep_freed_memory()
        self.device = device.pick_device(note=console.note)

    def go(self) -> dict[str, Any]:
        """Prepare, train, export."""

        with console.progress(None, "reading, cleaning and encoding the data, documents") as bar:
            shards, tokenizer = self._data(bar)
        plan = self.decisions.make("plan", 0, lambda: plan_run(
            self.recipe, shards, tokenizer, self.origin, self.device, elapsed=time.monotonic() - self.started))
        if plan is None:
            raise UsageError(f"`{self.request.replay}` holds no decision `plan` at step 0: it cannot be replayed")
        files.write_atomic(self.run / "recipe.toml", dump(self.recipe))  # only now: what was refused must not look agreed
        self.settled()
        device.set_threads(self.recipe.train.threads or int(plan.get("threads", 0)))
        objective = self._objective(config_from(plan["config"]), tokenizer)
        model = self._model(plan, objective)
        trainer = self._trainer(model, objective, shards, tokenizer, plan)
        step = trainer.resume(self.request.step)
        self._announce(model, trainer, plan, step)
        with console.progress(trainer.length.end(step), "training, step") as bar:
            trainer.tell = functools.partial(_show, bar, trainer)
            trainer.fit()
        if objective.frames:
            tokenizer = Tokenizer(framed(tokenizer.spec, tokenizer.roles), tokenizer.roles, config=tokenizer.config)
        return self._export(objective.results(model), tokenizer, shards, plan)

    # -- text to shards -------------------------------------------------------------------------------------------

    def _data(self, bar: console.Progress) -> tuple[Shards, Tokenizer]:
        d = self.recipe.data
        if self.checked.prepared:
            shards = Shards.open(d.paths[0], verify=True)
            tokenizer = Tokenizer.load(shards.tokenizer_dir)
            other = self.checked.tokenizer if self.origin is None else Tokenizer.load(self.origin)
            if other is not None:
                shards.check_tokenizer(other.fingerprint)
            return shards, tokenizer
        folder = self.run / "data"
        prepared = folder / "tokenizer"
        tokenizer = Tokenizer.load(prepared) if prepared.is_dir() else self._tokenizer()
        shards = ensure(
            [parse_source(path) for path in d.paths],
            tokenizer,
            folder,
            val_fraction=d.val_fraction,
            columns=d.columns,
            near_duplicates=d.near_duplicates,
            progress=lambda documents, characters: bar.update(documents, characters=characters),
            accept_new_data=self.request.accept_new_data,
            note=console.note,
        )
        return shards, tokenizer

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
            for document in read_documents(parse_source(path).path, self.recipe.data.columns):
                yield normalise(document.text)

    # -- shape and model ------------------------------------------------------------------------------------------

    def _objective(self, config: TransformerConfig, tokenizer: Tokenizer) -> Objective:
        task = task_of(self.recipe, family_of(config.model_type))
        return kind_of(self.recipe.train.objective).make(self.recipe, Vocabulary.of(tokenizer), task)

    def _model(self, plan: Value, objective: Objective) -> Model:
        config = config_from(plan["config"])
        if self.origin is None:
            model = objective.build(config, self.recipe.train.seed)
        else:
            model = objective.load(self.origin, vocab_size=config.vocab_size, context=config.max_position_embeddings)
            console.notes(model.notes)
        dtype = getattr(torch, plan["dtype"])
        if dtype == torch.float64:
            model.double()
        model.compute_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return model.to(self.device).train()

    # -- training -------------------------------------------------------------------------------------------------

    def _trainer(self, model: Model, objective: Objective, shards: Shards, tokenizer: Tokenizer, plan: Value) -> Trainer:
        t = self.recipe.train
        context, rows = int(plan["context"]), int(plan["rows"])
        loader = Loader(shards, objective.span(context), rows, t.seed, example=objective.example)
        console.notes(loader.notes)
        if not shards.count("validation").tokens:
            raise DataError(
                f"`{self.run / 'data'}` has no validation part", hint="prepare it with a validation fraction above 0"
            )
        pure = t.optimizer == "adamw"
        scale = 0.3 if self.origin is not None else 1.0  # a trained model is moved more gently
        optimizer = Optimizer(
            model,
            {} if pure else matrix_parts(model),
            lr=t.learning_rate or scale * (PURE_ADAMW_LR if pure else MUON_LR),
            adamw_lr=t.adamw_learning_rate or scale * ADAMW_LR,
            weight_decay=t.weight_decay,
            iterate_in=torch.bfloat16 if model.compute_dtype == torch.bfloat16 else None,
        )
        ends = [
            e for e in (t.steps, None if t.tokens is None else -(-t.tokens // loader.tokens_per_step)) if e is not None
        ]
        known = min(ends, default=0)
        eval_every = t.eval_every or (
            0 if t.budget is not None else max(1, known // 10) if known else max(10, loader.epoch_steps // 4)
        )
        length = Length(
            Limits(steps=known or None, budget=t.budget, converged=t.until == "converged", patience=t.patience),
            self.decisions,
            warmup=max(1, round(t.warmup_fraction * known)) if known else WARMUP,
            evaluations=max(1, min(8, round((t.budget or 0) / 10))),
            eval_every=eval_every,
            validation_tokens=shards.count("validation").tokens,
            tokens_per_step=loader.tokens_per_step,
            started=self.started,
        )
        settings = Settings(
            schedule="constant" if t.until == "converged" and not known and t.budget is None else t.schedule,
            warmup=length.warmup,
            cooldown=t.cooldown_fraction,
            clip=t.clip,
            micro_batch=min(rows, t.micro_batch or rows),
            halve_on_memory=True,
            save_every=t.save_every,
            save_seconds=t.save_seconds,
            keep=t.keep,
            nonfinite=t.nonfinite,
            spike=t.spike,
            on_save_error=t.on_save_error,
            log_every=t.log_every,
            workers=t.workers,
            validation_tokens=int(plan["validation_windows"]) * context,
        )
        pieces = tokenizer.token_bytes()
        if t.compile:
            model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]
        return Trainer(
            self.run,
            model,
            objective,
            loader,
            optimizer,
            length,
            self.log,
            self.decisions,
            settings,
            evaluate=HeldOut(model, objective, shards, context, pieces),
            sample=sampler(model, tokenizer, shards, context, pieces),
            identity=self._identity(shards),
            source_names=loader.names,
            accept_new_data=self.request.accept_new_data,
            warn=console.warn,
        )

    def _identity(self, shards: Shards) -> dict[str, Any]:
        return {
            "recipe_sha256": rundir.recipe_hash(self.recipe),
            "data_fingerprint": shards.fingerprint,
            "tokenizer_fingerprint": shards.tokenizer_fingerprint,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "compile": self.recipe.train.compile,
        }

    def _announce(self, model: Model, trainer: Trainer, plan: Value, step: int) -> None:
        machine = Machine.here(self.device).as_dict()
        count = model.num_parameters()
        self.log.append(
            {
                "event": "start",
                "step": step,
                "family": model.config.model_type,
                "objective": self.recipe.train.objective,
                "parameters": count,
                "context": plan["context"],
                "batch_tokens": trainer.loader.tokens_per_step,
                "dtype": plan["dtype"],
                "torch": machine["pytorch"],
                "threads": machine["threads"],
                "device": machine["device_name"],
                "machine": machine,
            }
        )
        words = (f"{model.config.model_type}, {count:,} parameters, context {plan['context']:,}, "
                 f"{trainer.loader.tokens_per_step:,} tokens a step, {plan['dtype']}")
        console.say(f"going on from step {step:,}: {words}" if step else f"training {words}")

    # -- the result -----------------------------------------------------------------------------------------------

    def _export(self, results: Mapping[str, Model], tokenizer: Tokenizer, shards: Shards, plan: Value) -> dict[str, Any]:
        last = rundir.last_evaluation(self.log.lines())
        for name, model in results.items():
            with files.published(self.run / name, foreign=MODEL_FILES) as folder:
                save_model(model, folder, dtype=self.recipe.train.save_dtype)
                tokenizer.save(folder, context=int(plan["config"]["max_position_embeddings"]))
                files.write_file(
                    folder / "README.md", model_card(self.recipe, shards, model.config, model.num_parameters(), last)
                )
        seconds = round(time.monotonic() - self.started, 3)
        self.log.append({"event": "finished", "step": last["step"], "session_seconds": seconds,
                         "recipe_sha256": rundir.recipe_hash(self.recipe)}, sync=True)
        write_report(self.run)
        return _result(self.run, last)


WARMUP = 12  # steps, where the number of steps is not known before


def _show(bar: console.Progress, trainer: Trainer, line: dict[str, Any]) -> None:
    bar.total = trainer.length.end(int(line["step"])) or bar.total
    facts = {name: line[name] for name in ("loss", "val_loss", "tokens_per_second") if name in line}
    bar.update(int(line["step"]), **facts)
    if line.get("event") == "evaluation":
        sample = " ".join("".join(line.get("samples", [])).split())[:160]
        figures = f"held-out loss {line['val_loss']:.4f}"
        if line["val_bits_per_byte"] is not None:
            figures += f", {line['val_bits_per_byte']:.3f} bits per byte"
        console.say(f"step {line['step']:,}: {figures}" + (f"\n  | {sample}" if sample else ""))


def figure(result: Mapping[str, Any]) -> str:
    """The figure of a result: bits per byte where its loss is that of a text, else the loss in nats."""
    if result["bits_per_byte"] is None:
        return f"a loss of {result['loss']:.4f}"
    return f"{result['bits_per_byte']:.3f} bits per byte"


def _result(run: Path, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": str(run),
        "model": str(run / "model"),
        "step": line["step"],
        "loss": line["val_loss"],
        "bits_per_byte": line["val_bits_per_byte"],
    }

"""Stage 2: from raw text, or an earlier model, to a foundation model in a run directory.

    text -> tokenizer -> shards -> shape -> model -> trainer -> RUN/model, README, report

Decisions:
- This is the one place that turns a recipe into objects; the trainer and the rooms below take plain arguments.
- What the machine's speed or the data's size suggest (size, context, batch, learning rate, warm-up) is one decision
  `plan` at step 0, so that a resumed or replayed run is shaped alike wherever it runs.
- The same command again resumes. A finished run says so; a changed recipe is shown and needs `force`, changed data
  `accept_new_data`; `fresh` starts over.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threefold import console, files
from threefold.config import Recipe, difference, dump, load_recipe
from threefold.errors import ConfigError, DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from threefold.data.shards import Shards
    from threefold.model.heads import CausalLM
    from threefold.text.tokenizer import Tokenizer
    from threefold.training.decisions import Value
    from threefold.training.log import Line
    from threefold.training.trainer import Trainer

MUON_LR, ADAMW_LR, PURE_ADAMW_LR = 0.025, 0.006, 1e-3


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
    recipe = resolved(recipe)
    run = request.out
    with files.lock(run, steal=request.steal_lock):
        for folder in (run, run / "checkpoints"):
            files.clean_leftovers(folder)
        if request.fresh:
            for name in ("model", "checkpoints", "data", "dumps", "log.jsonl", "recipe.toml", "report.html"):
                if (run / name).exists() or (run / name).is_symlink():
                    files.remove_tree(run / name)
        if not request.accept_new_data and (done := _finished(recipe, run)) is not None:
            console.say(f"`{run}` is finished: bits per byte {done['val_bits_per_byte']:.3f} after step {done['step']:,}; "
                        "--fresh starts over")
            return _result(run, done)
        _compare(recipe, run, force=request.force)
        return _Run(recipe, request, started).go()


def train(recipe: Recipe | str | Path, out: str | Path = "runs/latest", **how: Any) -> dict[str, Any]:
    """Run a recipe, or the TOML file of one, in the run directory `out`: what `threefold pretrain` does.

    `how` are fields of `Request` (fresh, force, replay, ...). The same call again resumes.
    """
    found = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), warn=console.warn)
    return pretrain(found, Request(out=Path(out), **how))


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what its own fields imply: no limit means until converged; continuing a model means its
    tokenizer."""
    t = recipe.train
    if not recipe.data.paths:
        raise ConfigError("no data: `data.paths` is empty", hint="name files, folders or `python`: --data PATH")
    if t.steps is None and t.tokens is None and t.budget is None and t.until is None:
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(t, until="converged"))
    return recipe


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Check everything that can be checked without writing: sources, tokenizer, family and size. Returns what would
    run."""
    from threefold.model.families import FAMILIES
    from threefold.text.sources import expand, parse_source

    recipe = resolved(recipe)
    found = {path: [str(p) for p in expand(parse_source(path).path)] for path in recipe.data.paths}
    if recipe.model.family not in FAMILIES:
        raise ConfigError(f"unknown family `{recipe.model.family}`", hint=did_you_mean(recipe.model.family, FAMILIES))
    _origin(recipe)
    return {"files": {path: len(names) for path, names in found.items()}, "recipe": recipe.flat()}


class _Run:
    """The objects of one run, made in the order in which they depend on each other."""

    def __init__(self, recipe: Recipe, request: Request, started: float) -> None:
        from threefold import device
        from threefold.training.decisions import Decisions
        from threefold.training.log import RunLog

        self.recipe, self.request, self.started, self.run = recipe, request, started, request.out
        self.log = RunLog(self.run / "log.jsonl")
        self.decisions = Decisions(self.log, RunLog(request.replay).lines() if request.replay else ())
        device.set_threads(recipe.train.threads)
        self.device = device.pick_device(note=console.note)
        self.origin = _origin(recipe)

    def go(self) -> dict[str, Any]:
        """Prepare, train, export."""
        from threefold import device
        from threefold.plan.shape import plan_run

        with console.progress(None, "reading, cleaning and encoding the data, documents") as bar:
            shards, tokenizer = self._data(bar)
        files.write_atomic(self.run / "recipe.toml", dump(self.recipe))  # only now: what was refused must not look agreed
        plan = self.decisions.make("plan", 0, lambda: plan_run(
            self.recipe, shards, tokenizer, self.origin, self.device, elapsed=time.monotonic() - self.started))
        if plan is None:
            raise UsageError(f"`{self.request.replay}` holds no decision `plan` at step 0: it cannot be replayed")
        device.set_threads(self.recipe.train.threads or int(plan.get("threads", 0)))
        model = self._model(plan, tokenizer)
        trainer = self._trainer(model, shards, tokenizer, plan)
        step = trainer.resume(self.request.step)
        self._announce(model, trainer, plan, step)
        with console.progress(trainer.length.end(step), "training, step") as bar:
            trainer.tell = functools.partial(_show, bar, trainer)
            trainer.fit()
        return self._export(model, tokenizer, shards, plan)

    # -- text to shards -------------------------------------------------------------------------------------------

    def _data(self, bar: console.Progress) -> tuple[Shards, Tokenizer]:
        from threefold.data.shards import Shards, ensure
        from threefold.text.sources import parse_source
        from threefold.text.tokenizer import Tokenizer

        d = self.recipe.data
        if len(d.paths) == 1 and (Path(d.paths[0]) / "manifest.json").is_file():  # prepared by `threefold data prepare`
            shards = Shards.open(d.paths[0], verify=True)
            return shards, Tokenizer.load(shards.tokenizer_dir)
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
        )
        return shards, tokenizer

    def _tokenizer(self) -> Tokenizer:
        from threefold import hub
        from threefold.text.tokenizer import KINDS, Tokenizer

        asked = self.recipe.tokenizer.kind_or_path
        if self.origin is not None:
            tokenizer = Tokenizer.load(self.origin)
            added = self.recipe.model.grow_vocab
            return tokenizer.grow(self._texts(), added) if added else tokenizer
        kind = "bpe" if asked == "auto" else asked
        if kind in KINDS:
            return Tokenizer.train(kind, self._texts(), self.recipe.tokenizer.vocab_size)
        return Tokenizer.load(hub.resolve(kind))

    def _texts(self) -> Iterator[str]:
        from threefold.text.clean import normalise
        from threefold.text.sources import parse_source, read_documents

        for path in self.recipe.data.paths:
            for document in read_documents(parse_source(path).path, self.recipe.data.columns):
                yield normalise(document.text)

    # -- shape and model ------------------------------------------------------------------------------------------

    def _model(self, plan: Value, tokenizer: Tokenizer) -> CausalLM:
        import torch

        from threefold.model.build import build_model
        from threefold.model.grow import grow_vocabulary
        from threefold.model.weights import load_model
        from threefold.plan.shape import config_from

        config = config_from(plan["config"])
        if self.origin is None:
            model = build_model(config, seed=self.recipe.train.seed)
        else:
            model = grow_vocabulary(load_model(self.origin, dtype=torch.float32), config.vocab_size)
        dtype = getattr(torch, plan["dtype"])
        if dtype == torch.float64:
            model.double()
        model.compute_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return model.to(self.device).train()

    # -- training -------------------------------------------------------------------------------------------------

    def _trainer(self, model: CausalLM, shards: Shards, tokenizer: Tokenizer, plan: Value) -> Trainer:
        from threefold.data.loader import Loader
        from threefold.evaluation.loss import Evaluation, evaluate_shards
        from threefold.model.build import matrix_parts
        from threefold.objectives import OBJECTIVES
        from threefold.training.length import Length, Limits
        from threefold.training.optim import Optimizer
        from threefold.training.trainer import Settings, Trainer

        t = self.recipe.train
        if t.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective `{t.objective}`", hint=did_you_mean(t.objective, OBJECTIVES))
        context, rows = int(plan["context"]), int(plan["rows"])
        loader = Loader(shards, context, rows, t.seed)
        for note in loader.notes:
            console.note(note)
        if not shards.count("validation").tokens:
            raise DataError(
                f"`{self.run / 'data'}` has no validation part", hint="prepare it with a validation fraction above 0"
            )
        pure = t.optimizer == "adamw"
        scale = 0.3 if self.origin is not None else 1.0  # a trained model is moved more gently
        optimizer = Optimizer(
            model,
            {} if pure else matrix_parts(model.config),
            lr=t.learning_rate or scale * (PURE_ADAMW_LR if pure else MUON_LR),
            adamw_lr=t.adamw_learning_rate or scale * ADAMW_LR,
            weight_decay=t.weight_decay,
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
        )
        pieces = tokenizer.token_bytes()

        def evaluate(whole: bool) -> Evaluation:
            return evaluate_shards(
                model, shards, context, pieces, subset=None if whole else int(plan["validation_windows"])
            )

        if t.compile:
            import torch
            model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]
        return Trainer(
            self.run,
            model,
            OBJECTIVES[t.objective](),
            loader,
            optimizer,
            length,
            self.log,
            self.decisions,
            settings,
            evaluate=evaluate,
            sample=functools.partial(_sample, model, tokenizer, context),
            identity=self._identity(shards),
            source_names=loader.names,
            warn=console.warn,
        )

    def _identity(self, shards: Shards) -> dict[str, Any]:
        import torch

        return {
            "recipe_sha256": _hash(self.recipe),
            "data_fingerprint": shards.fingerprint,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "compile": self.recipe.train.compile,
        }

    def _announce(self, model: CausalLM, trainer: Trainer, plan: Value, step: int) -> None:
        from threefold.device import Machine

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

    def _export(self, model: CausalLM, tokenizer: Tokenizer, shards: Shards, plan: Value) -> dict[str, Any]:
        from threefold.model.weights import save_model
        from threefold.training.card import model_card
        from threefold.training.report import write_report

        last = next(
            line for line in reversed(self.log.lines()) if line.get("event") == "evaluation" and line.get("whole")
        )
        with files.published(self.run / "model") as folder:
            save_model(model, folder, dtype=self.recipe.train.save_dtype)
            tokenizer.save(folder, context=int(plan["config"]["max_position_embeddings"]))
            files.write_file(
                folder / "README.md", model_card(self.recipe, shards, model.config, model.num_parameters(), last)
            )
        seconds = round(time.monotonic() - self.started, 3)
        self.log.append({"event": "finished", "step": last["step"], "session_seconds": seconds,
                         "recipe_sha256": _hash(self.recipe)}, sync=True)
        write_report(self.run)
        return _result(self.run, last)


WARMUP = 12  # steps, where the number of steps is not known before


def _show(bar: console.Progress, trainer: Trainer, line: dict[str, Any]) -> None:
    bar.total = trainer.length.end(int(line["step"])) or bar.total
    facts = {name: line[name] for name in ("loss", "val_loss", "tokens_per_second") if name in line}
    bar.update(int(line["step"]), **facts)
    if line.get("event") == "evaluation":
        sample = " ".join("".join(line.get("samples", [])).split())[:160]
        figures = f"held-out loss {line['val_loss']:.4f}, {line['val_bits_per_byte']:.3f} bits per byte"
        console.say(f"step {line['step']:,}: {figures}" + (f"\n  | {sample}" if sample else ""))


def _sample(model: CausalLM, tokenizer: Tokenizer, context: int) -> list[str]:
    """A short continuation of nothing, always with the same seed, so that samples of one run can be compared."""
    from threefold.generation.engine import generate

    return generate(model, tokenizer, [""], max_new_tokens=min(context - 1, 96), temperature=0.8, top_p=0.95, seed=0)


def _origin(recipe: Recipe) -> Path | None:
    from threefold import hub

    return hub.resolve(recipe.model.from_model) if recipe.model.from_model else None


def _compare(recipe: Recipe, run: Path, *, force: bool) -> None:
    """Raise ConfigError, with the difference, where the run was begun with a recipe that needs `force` to change."""
    if not (run / "recipe.toml").exists():
        return
    refused = [change for change in difference(load_recipe(run / "recipe.toml"), recipe) if not change.safe]
    if refused and not force:
        shown = "\n  ".join(str(change) for change in refused)
        raise ConfigError(f"`{run}` was begun with another recipe:\n  {shown}",
                          hint="go on with the new one with --force, start over with --fresh, or choose another --out")


def _finished(recipe: Recipe, run: Path) -> Line | None:
    """The last evaluation of a run that ended with exactly this recipe, or None."""
    from threefold.training.log import RunLog

    lines = RunLog(run / "log.jsonl").lines() if (run / "model" / "config.json").exists() else []
    ended = [line for line in lines if line.get("event") in ("start", "finished")]
    if not ended or ended[-1].get("recipe_sha256") != _hash(recipe):
        return None
    return next(line for line in reversed(lines) if line.get("event") == "evaluation" and line.get("whole"))


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(dump(recipe).encode()).hexdigest()


def _result(run: Path, line: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": str(run),
        "model": str(run / "model"),
        "step": line["step"],
        "loss": line["val_loss"],
        "bits_per_byte": line["val_bits_per_byte"],
    }

"""A stage of a model's life as a run: what pretraining, fine-tuning and alignment have in common.

    data -> plan -> model -> trainer -> RUN/model, README, report

Decisions:
- A stage is the one place that turns a recipe into objects; the trainer and the rooms below take plain arguments.
- What the machine or the data suggest is one decision `plan` at step 0, so that a resumed or replayed run is shaped
  alike wherever it runs.
- The same command again resumes. A finished run says so; a changed recipe is shown and needs `force` (rundir.py),
  changed data `accept_new_data`; `fresh` starts over.
"""

from __future__ import annotations

import abc
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from threefold import console, device, files, rundir
from threefold.config import Recipe, dump
from threefold.data.loader import Batches
from threefold.device import Machine
from threefold.errors import Interrupted, UsageError
from threefold.model import adapters, pooling, weights
from threefold.model.base import Model
from threefold.model.weights import save_model
from threefold.objectives.term import Objective
from threefold.text.tokenizer import Tokenizer
from threefold.text.tokenizer_json import framed
from threefold.training.decisions import Decisions, Value
from threefold.training.length import Length, Limits
from threefold.training.log import Line, RunLog
from threefold.training.optim import Optimizer
from threefold.training.report import write_report
from threefold.training.trainer import GOES_ON, Settings, Trainer

MODEL_FILES = files.besides(*weights.FILES, *Tokenizer.FILES, *adapters.FILES, *pooling.FILES, "README.md")
WARMUP = 12  # steps, where the number of steps is not known before


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


class Origin(Protocol):
    """What a check has found, as far as every stage has it: the folder of the model that is continued."""

    @property
    def origin(self) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What a stage hands to the trainer. `evaluate` and `sample` as there; `validation_tokens`: of each source, on the way."""

    loader: Batches
    optimizer: Optimizer
    evaluate: Callable[[int | None], Mapping[str, Any]]
    sample: Callable[[], list[str]] = list
    limits: Limits
    eval_every: int
    evaluations: int
    held_out: int                      # tokens of the whole held-out part
    validation_tokens: int
    rows: int                          # of a batch
    source_names: Sequence[str] = ()
    take_best: bool = False            # see training.trainer.Settings


class Stage(abc.ABC):
    """The objects of one run, made in the order in which they depend on each other. Each stage says what its data, plan,
    objective and model are."""

    reading: str  # what is said while data is prepared
    tokenizer: Tokenizer

    def __init__(self, recipe: Recipe, request: Request, checked: Origin, started: float, settled: Callable[[], None] = lambda: None) -> None:
        self.recipe, self.request, self.started, self.run = recipe, request, started, request.out
        self.origin, self.settled = checked.origin, settled  # `settled` is told when data and plan are there
        self.log = RunLog(self.run / "log.jsonl")
        self.decisions = Decisions(self.log, RunLog(request.replay).lines() if request.replay else ())
        device.set_threads(recipe.train.threads)
        device.keep_freed_memory()
        self.device = device.pick_device(note=console.note)

    # -- what a stage says ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def prepare(self, bar: console.Progress) -> None:
        """Read the data; afterwards `self.tokenizer` and what else the stage needs is there."""

    @abc.abstractmethod
    def plan(self) -> dict[str, Any]:
        """What is chosen for this machine and data, as plain values: `dtype`, `context`, `rows`, perhaps `threads`."""

    @abc.abstractmethod
    def objective(self, plan: Value) -> Objective:
        """What is learnt."""

    @abc.abstractmethod
    def model(self, plan: Value, objective: Objective) -> Model:
        """The model to train, in float32 on the CPU."""

    @abc.abstractmethod
    def learning(self, model: Model, objective: Objective, plan: Value) -> Learning:
        """What the trainer needs."""

    @abc.abstractmethod
    def data_identity(self) -> dict[str, Any]:
        """Fingerprints of data and tokenizer."""

    @abc.abstractmethod
    def card(self, model: Model, evaluation: Line) -> str:
        """The model card."""

    def write(self, model: Model, folder: Path) -> None:
        """Write a result into its folder, all but tokenizer and card."""
        save_model(model, folder, dtype=self.recipe.train.save_dtype)

    def save_tokenizer(self, folder: Path, context: int) -> None:
        """Write the tokenizer beside a result."""
        self.tokenizer.save(folder, context=context)

    # -- the run -------------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds of the budget that are gone."""
        return time.monotonic() - self.started

    def go(self) -> dict[str, Any]:
        """Prepare, train, export."""
        with console.progress(None, self.reading) as bar:
            self.prepare(bar)
        plan = self.decisions.make("plan", 0, self.plan)
        if plan is None:
            raise UsageError(f"`{self.request.replay}` holds no decision `plan` at step 0: it cannot be replayed")
        files.write_atomic(self.run / "recipe.toml", dump(self.recipe))  # only now: what was refused must not look agreed
        self.settled()
        device.set_threads(self.recipe.train.threads or int(plan.get("threads", 0)))
        objective = self.objective(plan)
        model = self._placed(self.model(plan, objective), plan)
        trainer = self._trainer(model, objective, plan)
        step = trainer.resume(self.request.step)
        self._announce(model, trainer, plan, step)
        with console.progress(trainer.length.end(step), "training, step") as bar:
            trainer.tell = functools.partial(_show, bar, trainer)
            trainer.fit()
        if objective.frames:
            self.tokenizer = Tokenizer(framed(self.tokenizer.spec, self.tokenizer.roles), self.tokenizer.roles, config=self.tokenizer.config)
        return self._export(objective.results(model), plan)

    def _placed(self, model: Model, plan: Value) -> Model:
        dtype = getattr(torch, plan["dtype"])
        if dtype == torch.float64:
            model.double()
        model.compute_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
        return model.to(self.device).train()

    def _trainer(self, model: Model, objective: Objective, plan: Value) -> Trainer:
        t, learning = self.recipe.train, self.learning(model, objective, plan)
        console.notes(learning.loader.notes)
        known = learning.limits.steps or 0
        warmup = max(1, round(t.warmup_fraction * known)) if known else WARMUP
        length = Length(
            learning.limits,
            self.decisions,
            warmup=warmup if t.budget is None else min(warmup, WARMUP),  # a budget is looked at soon
            evaluations=learning.evaluations,
            eval_every=learning.eval_every,
            validation_tokens=learning.held_out,
            tokens_per_step=learning.loader.tokens_per_step,
            before_last=min(learning.validation_tokens, learning.held_out) if learning.take_best else 0,
            started=self.started,
        )
        settings = Settings(
            schedule="constant" if t.until == "converged" and not known and t.budget is None else t.schedule,
            warmup=warmup,
            cooldown=t.cooldown_fraction,
            clip=t.clip,
            micro_batch=min(learning.rows, t.micro_batch or learning.rows),
            save_every=t.save_every,
            save_seconds=t.save_seconds,
            keep=t.keep,
            nonfinite=t.nonfinite,
            spike=t.spike,
            on_save_error=t.on_save_error,
            log_every=t.log_every,
            workers=t.workers,
            validation_tokens=learning.validation_tokens,
            take_best=learning.take_best,
        )
        if t.compile:
            model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]
        return Trainer(
            self.run,
            model,
            objective,
            learning.loader,
            learning.optimizer,
            length,
            self.log,
            self.decisions,
            settings,
            evaluate=learning.evaluate,
            sample=learning.sample,
            identity={
                "recipe_sha256": rundir.recipe_hash(self.recipe),
                **self.data_identity(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "compile": t.compile,
                "device": device.name_of(self.device),
            },
            source_names=learning.source_names,
            accept_new_data=self.request.accept_new_data,
            warn=console.warn,
        )

    def _announce(self, model: Model, trainer: Trainer, plan: Value, step: int) -> None:
        machine = Machine.here(self.device).as_dict()
        count = model.num_parameters()
        self.log.append(
            {
                "event": "start",
                "step": step,
                "family": model.config.model_type,
                "objective": trainer.objective.name,
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

    def _export(self, results: Mapping[str, Model], plan: Value) -> dict[str, Any]:
        last = rundir.last_evaluation(self.log.lines())
        for name, model in results.items():
            with files.published(self.run / name, foreign=MODEL_FILES) as folder:
                self.write(model, folder)
                self.save_tokenizer(folder, int(model.config.max_position_embeddings))
                files.write_file(folder / "README.md", self.card(model, last))
        seconds = round(time.monotonic() - self.started, 3)
        self.log.append({"event": "finished", "step": last["step"], "session_seconds": seconds,
                         "recipe_sha256": rundir.recipe_hash(self.recipe)}, sync=True)
        write_report(self.run)
        return result_of(self.run, last)


def run(recipe: Recipe, request: Request, checked: Origin, stage: Callable[..., Stage]) -> dict[str, Any]:
    """Run a checked recipe to its end in `request.out`, from wherever that run stands; returns the last evaluation as
    plain data.

    Raises a ThreefoldError that says what to mend; Interrupted after a signal, with a checkpoint saved.
    """
    try:
        return _run(recipe, request, checked, stage)
    except Interrupted as stopped:
        once = [flag for flag, given in (("--fresh", request.fresh), ("--step", request.step is not None)) if given]
        if not once or stopped.hint != GOES_ON:
            raise
        raise Interrupted(stopped.signum, str(stopped), hint=f"the same command without {' and '.join(once)} goes on from here") from stopped


def _run(recipe: Recipe, request: Request, checked: Origin, stage: Callable[..., Stage]) -> dict[str, Any]:
    started = request.started if request.started is not None else time.monotonic()
    out = request.out
    with files.lock(out, steal=request.steal_lock):
        for folder in (out, out / "checkpoints"):
            files.clean_leftovers(folder)
        if rundir.SetAside.left_behind(out):
            console.note(f"a fresh start in `{out}` did not come as far as its first step: the run before it is back")
        if request.fresh:
            before = rundir.SetAside(out)
            try:
                return stage(recipe, request, checked, started, settled=before.drop).go()
            except BaseException:
                rundir.SetAside.left_behind(out)
                raise
        asks_for_more = request.accept_new_data or request.step is not None
        if not asks_for_more and (done := rundir.finished(recipe, out)) is not None:
            console.say(f"`{out}` is finished: {figure(result_of(out, done))} after step {done['step']:,}; --fresh starts over")
            if not (out / "report.html").exists():  # killed in its last moment
                write_report(out)
            return result_of(out, done)
        rundir.compare(recipe, out, force=request.force)
        return stage(recipe, request, checked, started).go()


def refused(request: Request, uses: Sequence[Path]) -> None:
    """Refuse, before anything is written, a place for the result that holds other things, or a log that cannot be
    replayed. `uses` are files and folders that the run reads."""
    out, replay = request.out, request.replay
    if replay is not None and not replay.is_file():
        raise UsageError(f"there is no log `{replay}` to replay", hint="--replay RUN/log.jsonl of another run")
    if replay is not None and not Decisions(RunLog(out / "log.jsonl"), RunLog(replay).lines()).replaying:
        raise UsageError(f"`{replay}` holds no decision: there is nothing to replay", hint="--replay RUN/log.jsonl of another run")
    rundir.claim(out, [*uses, *([replay] if request.fresh and replay is not None else [])])
    files.check_ours(out / "model", MODEL_FILES)


def _show(bar: console.Progress, trainer: Trainer, line: dict[str, Any]) -> None:
    bar.total = trainer.length.end(int(line["step"])) or bar.total
    facts = {name: line[name] for name in ("loss", "val_loss", "tokens_per_second") if name in line}
    bar.update(int(line["step"]), **facts)
    if line.get("event") == "evaluation":
        sample = " ".join("".join(line.get("samples", [])).split())[:160]
        figures = f"held-out loss {line['val_loss']:.4f}"
        if line["val_bits_per_byte"] is not None:
            figures += f", {line['val_bits_per_byte']:.3f} bits per byte"
        figures += "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in line.get("metrics", {}).items()
                           if isinstance(value, float | int))
        console.say(f"step {line['step']:,}: {figures}" + (f"\n  | {sample}" if sample else ""))


def figure(result: Mapping[str, Any]) -> str:
    """The figure of a result: bits per byte where its loss is that of a text, the first of its metrics where it has some,
    else the loss in nats."""
    if result["bits_per_byte"] is not None:
        return f"{result['bits_per_byte']:.3f} bits per byte"
    for name, value in result.get("metrics", {}).items():
        return f"{name.replace('_', ' ')} {value:.4g}"
    return f"a loss of {result['loss']:.4f}"


def result_of(run: Path, line: Line) -> dict[str, Any]:
    """The last evaluation of a run as plain data."""
    found = {
        "run": str(run),
        "model": str(run / "model"),
        "step": line["step"],
        "loss": line["val_loss"],
        "bits_per_byte": line["val_bits_per_byte"],
    }
    return {**found, "metrics": line["metrics"]} if "metrics" in line else found

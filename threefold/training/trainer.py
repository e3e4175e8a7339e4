"""The one loop that trains every family and every objective.

Decisions:
- A step is a pure function of (weights, optimizer, batch(step), progress). What is not - the steps a budget buys, a
  halved micro-batch, a skipped or rolled-back step, "converged" - goes through `Decisions` and is on disk before it
  takes effect.
- Gradients are those of sum over terms of coefficient * sum / total weight, the totals taken over all micro-batches
  before the first backward pass: accumulation changes nothing but memory.
- The loop knows no files but the log and the checkpoints, no model but its parameters, no text: evaluation and samples
  are handed in as callables.
- Saves do not change the trajectory, so they may follow the clock; evaluations follow the step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threefold import files
from threefold.data.loader import Batch, Loader
from threefold.errors import DiskError, Interrupted, MemoryLimitError, NumericError
from threefold.model.weights import write_safetensors
from threefold.objectives.term import Objective
from threefold.training import checkpoint, schedule
from threefold.training.decisions import Decisions, Value
from threefold.training.guards import MOST_SKIPS, SpikeGuard, is_finite
from threefold.training.length import Length
from threefold.training.log import Line, RunLog
from threefold.training.optim import Optimizer, clip_gradients
from threefold.training.signals import Signals


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of the loop, resolved: no zero here means "choose"."""

    schedule: str = "linear"
    warmup: int = 20
    cooldown: float = 0.6
    final: float = 0.0
    clip: float = 1.0
    micro_batch: int
    halve_on_memory: bool = True
    save_every: int = 0
    save_seconds: float = 60.0
    keep: int = 2
    nonfinite: str = "stop"
    spike: str = "log"
    on_save_error: str = "stop"
    log_every: int = 1
    workers: int = 1


@dataclass
class Progress:
    """Where a run stands. Everything in it goes into `state.json`."""

    step: int = 0
    tokens: int = 0
    skips: int = 0
    best_loss: float = math.inf
    best_step: int = -1
    waited: int = 0
    spikes: list[list[float]] = field(default_factory=lambda: [[], []])


@dataclass(frozen=True)
class StepResult:
    """What one step measured: the loss over all micro-batches in nats, its parts, the gradient norm before clipping."""

    loss: float
    terms: dict[str, float]
    sources: dict[int, float]
    norm: float
    samples: list[int]


class Trainer:
    """Trains `model` on `loader` until `length` says that it is done; `fit` returns the last evaluation."""

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        optimizer: Optimizer,
        length: Length,
        log: RunLog,
        decisions: Decisions,
        settings: Settings,
        *,
        evaluate: Callable[[bool], dict[str, float]],
        sample: Callable[[], list[str]] = list,
        identity: dict[str, Any] | None = None,
        source_names: Sequence[str] = (),
        context: Callable[[int], dict[str, Any]] = lambda step: {},
        tell: Callable[[Line], None] = lambda line: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run, self.model, self.objective, self.loader, self.optimizer = run, model, objective, loader, optimizer
        self.length, self.log, self.decisions, self.settings = length, log, decisions, settings
        self.evaluate, self.sample, self.identity, self.source_names = evaluate, sample, identity or {}, source_names
        self.context, self.tell, self.warn = context, tell, warn
        self.progress, self.spikes = Progress(), SpikeGuard()
        self.micro_batch = settings.micro_batch
        self._saved_at = time.monotonic()

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Run to the end from wherever the run stands; raises Interrupted after a signal, with a checkpoint saved."""
        with Signals() as signals:
            batches = self._batches()
            while not self.length.is_over(self.progress.step):
                step, started = self.progress.step, time.perf_counter()
                result = self._step(step, next(batches))
                self._after(step, result, time.perf_counter() - started)
                if self.progress.step != step + 1:  # rolled back: other batches follow
                    batches = self._batches()
                if signals.received:
                    self._save()
                    raise Interrupted(signals.received, f"{signals.name} at step {self.progress.step}: saved",
                                      hint="the same command goes on from here")
                if self.length.is_evaluation(self.progress.step) and not self.length.is_over(self.progress.step):
                    batches = self._evaluation(batches)
                if self._save_is_due():
                    self._save()
            whole = self._evaluated(whole=True)
            if checkpoint.steps(self.run)[:1] != [self.progress.step]:
                self._save()
        return whole

    def _step(self, step: int, batch: Batch) -> StepResult | None:
        """One update, or None where a guard kept it from the weights."""
        while True:
            self._take_micro_batch(step)
            try:
                result = self._gradients(step, batch)
                break
            except (RuntimeError, MemoryError) as error:
                self.optimizer.zero_grad()
                if not _is_out_of_memory(error):
                    raise
                self._halve(step, batch, error)
        if not is_finite(result.loss, result.norm):
            return self._not_finite(step, batch, result)
        if self.spikes.is_spike(result.loss, result.norm) and self._spike(step, result):
            return None
        self.optimizer.step(self.factor(step), step)
        self.optimizer.zero_grad()
        self.progress.skips = 0
        self.spikes.add(result.loss, result.norm)
        return result

    def _gradients(self, step: int, batch: Batch) -> StepResult:
        parts = list(batch.split(self.micro_batch if self.objective.unit == "row" else len(batch)))
        totals: dict[str, float] = {}
        for part in parts:
            for name, weight in self.objective.weights(part).items():
                totals[name] = totals.get(name, 0.0) + weight
        if empty := [name for name, weight in totals.items() if weight == 0]:
            raise NumericError(
                f"step {step}: nothing to learn from in the term {', '.join(empty)}: every label of the samples "
                f"{self._describe(batch)} is masked",
                hint="the answer may have been cut off by the context: use a longer context or shorter examples",
            )
        sums = dict.fromkeys(totals, 0.0)
        sources: dict[int, list[float]] = {}
        loss = 0.0
        for part in parts:
            terms = self.objective.terms(self.model, part, **self.context(step))
            total = torch.stack([t.coefficient * t.sum / totals[t.name] for t in terms]).sum()
            total.backward()  # type: ignore[no-untyped-call]
            loss += float(total.detach())
            for term in terms:
                sums[term.name] += float(term.sum.detach())
                if len(self.source_names) > 1 and term.rows is not None:
                    _add_by_source(sources, part, term.rows)
        norm = float(clip_gradients(self.optimizer.parameters, self.settings.clip))
        return StepResult(
            loss,
            {n: sums[n] / totals[n] for n in totals},
            {s: a / max(b, 1) for s, (a, b) in sources.items()},
            norm,
            [int(s) for s in batch.samples],
        )

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at a step."""
        s = self.settings
        start, total = self.length.span(step)
        return schedule.factor(
            s.schedule,
            step - start,
            None if total is None else total - start,
            warmup=s.warmup if start == 0 else 1,
            cooldown=s.cooldown,
            final=s.final,
        )

    def _batches(self) -> Iterator[Batch]:
        """Batches from the current step on; a rollback moves the data on by what it skips, the step stays."""
        back = [(int(value["to"]), int(value["skipped"])) for _, value in self.decisions.known("rollback")]
        indices = (step + sum(n for to, n in back if to <= step) for step in itertools.count(self.progress.step))
        return (batch for _, batch in self.loader.follow(indices, self.settings.workers))

    # -- after a step ---------------------------------------------------------------------------------------------

    def _after(self, step: int, result: StepResult | None, seconds: float) -> None:
        p = self.progress
        if p.step != step:
            return  # a rollback has moved it
        p.step = step + 1
        self.length.measured(p.step, seconds)
        if result is None:
            return
        p.tokens += self.loader.tokens_per_step
        line: Line = {
            "step": p.step,
            "loss": result.loss,
            "lr": self.optimizer.peak * self.factor(step),
            "grad_norm": result.norm,
            "tokens": p.tokens,
            "seconds": round(self.length.elapsed(), 3),
            "tokens_per_second": round(self.loader.tokens_per_step / seconds),
        }
        if len(result.terms) > 1:
            line["terms"] = result.terms
        if result.sources:
            line["sources"] = {self.source_names[s]: value for s, value in sorted(result.sources.items())}
        if p.step % self.settings.log_every == 0 or p.step == 1:
            self.log.append(line)
        self.tell(line)

    def _evaluation(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        values = self._evaluated(whole=False)
        p = self.progress
        if values["loss"] < p.best_loss:
            p.best_loss, p.best_step, p.waited = values["loss"], p.step, 0
        else:
            p.waited += 1
        back = self.length.after_evaluation(p.step, waited=p.waited, best_step=p.best_step)
        if self.length.keeps_best and p.best_step == p.step:
            self._save()
        if back is None:
            return batches
        self._go_back(checkpoint.at(self.run, back))
        return self._batches()

    def _evaluated(self, *, whole: bool) -> dict[str, float]:
        started = time.perf_counter()
        values = self.evaluate(whole)
        seconds = time.perf_counter() - started
        self.length.evaluated(seconds, values["tokens"])
        line: Line = {
            "event": "evaluation",
            "step": self.progress.step,
            "whole": whole,
            "val_loss": values["loss"],
            "val_bits_per_byte": values["bits_per_byte"],
            "val_tokens": values["tokens"],
            "eval_seconds": round(seconds, 3),
        }
        if samples := self.sample():
            line["samples"] = samples
        self.log.append(line)
        self.tell(line)
        return values

    # -- guards ---------------------------------------------------------------------------------------------------

    def _not_finite(self, step: int, batch: Batch, result: StepResult) -> None:
        self.optimizer.zero_grad()
        self.progress.skips += 1
        if self.settings.nonfinite == "skip" and self.progress.skips <= MOST_SKIPS:
            self.decisions.make("skip", step, lambda: {"why": f"loss {result.loss}, gradient norm {result.norm}"})
            return None
        dump = self.run / "dumps" / f"step-{step:06d}.safetensors"
        files.make_dirs(dump.parent)
        write_safetensors(
            dump, {"input_ids": batch.input_ids, "labels": batch.labels, "samples": torch.tensor(result.samples)}
        )
        raise NumericError(
            f"step {step}: loss is {result.loss}, gradient norm {result.norm}, on the samples {self._describe(batch)}; "
            f"no update was made, the batch is in `{dump}`",
            hint="lower the learning rate (train.learning_rate), look at the samples, or go on with train.nonfinite=skip",
        )

    def _spike(self, step: int, result: StepResult) -> bool:
        """Handle a spike; True if the update is not to be made."""
        action = self.settings.spike
        seen: Value = {"loss": result.loss, "grad_norm": result.norm, "action": action}
        if action == "rollback":
            again = any(at == step for at, _ in self.decisions.known("rollback"))
            back = None if again else checkpoint.latest(self.run, up_to=step - 1, skipped=self.warn)
            if back is not None:
                self.decisions.make(
                    "rollback", step, lambda: {**seen, "to": back.step, "skipped": step - back.step + 1}
                )
                self.optimizer.zero_grad()
                self._go_back(back)
                return True
        self.decisions.make("spike", step, lambda: seen)
        if action != "log":
            self.optimizer.zero_grad()
        return action != "log"

    def _take_micro_batch(self, step: int) -> None:
        for at, value in self.decisions.known("micro_batch"):
            if at <= step:
                self.micro_batch = min(self.micro_batch, int(value["rows"]))

    def _halve(self, step: int, batch: Batch, error: BaseException) -> None:
        rows, length = batch.input_ids.shape
        what = (
            f"step {step}: not enough memory for a micro-batch of {self.micro_batch} rows of {length} tokens ({error})"
        )
        if self.micro_batch == 1 or not self.settings.halve_on_memory or self.objective.unit != "row":
            raise MemoryLimitError(
                what, hint="a smaller context, a smaller model (--size) or a smaller train.micro_batch needs less"
            ) from error
        half = max(1, min(self.micro_batch, rows) // 2)
        self.warn(f"{what}; going on with {half} rows")
        self.decisions.make("micro_batch", step, lambda: {"rows": half})
        self.micro_batch = half

    def _describe(self, batch: Batch) -> str:
        return "; ".join(str(self.loader.describe(int(s))) for s in batch.samples[:4]) + (
            " ..." if len(batch.samples) > 4 else ""
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        s = self.settings
        if s.save_every:
            return self.progress.step % s.save_every == 0
        return s.save_seconds > 0 and time.monotonic() - self._saved_at >= s.save_seconds

    def _save(self) -> None:
        p = self.progress
        p.spikes = self.spikes.state()
        state = {"progress": {**vars(p), "best_loss": None if math.isinf(p.best_loss) else p.best_loss},
                 "elapsed": self.length.elapsed(), "micro_batch": self.micro_batch, "branches": len(self._branches())}
        model = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        try:
            if not checkpoint.folder(self.run, p.step).exists():
                checkpoint.save(
                    self.run, p.step, model=model, optimizer=self.optimizer.state(), state=state, identity=self.identity
                )
            checkpoint.prune(
                self.run, self.settings.keep, spare=p.best_step if self.length.keeps_best else None, warn=self.warn
            )
        except DiskError as error:
            if self.settings.on_save_error != "continue":
                raise
            self.warn(f"{error}; training goes on without this checkpoint")
        self._saved_at = time.monotonic()

    def resume(self, step: int | None = None) -> int:
        """Take up the newest checkpoint that verifies (or exactly `step`); returns the step, 0 where there is none."""
        found = checkpoint.at(self.run, step) if step is not None else checkpoint.latest(self.run, skipped=self.warn)
        while step is None and found is not None and not self._is_on_path(found):
            self.warn(f"step {found.step} lies on a path that a later decision left; it is removed")
            checkpoint.remove(found.path)
            found = checkpoint.latest(self.run, skipped=self.warn)
        if (seen := self.log.lines()):
            self.length.carried = max(float(line.get("seconds", 0.0)) for line in seen)
        if found is not None:
            self._restore(found)
        self.log.resume_at(self.progress.step)
        return self.progress.step

    def _branches(self) -> list[int]:
        """The steps to which decisions went back, in the order in which they were taken."""
        taken = [
            (at, int(value["to"])) for kind in ("rollback", "converged") for at, value in self.decisions.known(kind)
        ]
        return [to for _, to in sorted(taken)]

    def _is_on_path(self, found: checkpoint.Checkpoint) -> bool:
        return all(found.step <= to for to in self._branches()[int(found.state()["branches"]):])

    def _go_back(self, found: checkpoint.Checkpoint) -> None:
        """Take an earlier checkpoint up again, for good: what came after it lies on a path that is left."""
        for later in checkpoint.steps(self.run):
            if later > found.step:
                checkpoint.remove(checkpoint.folder(self.run, later))
        self._restore(found)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        state = found.state()
        tensors = found.model()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[name])
        self.optimizer.load(found.optimizer())
        values = state["progress"]
        self.progress = Progress(
            **{**values, "best_loss": math.inf if values["best_loss"] is None else values["best_loss"]}
        )
        self.spikes.load(self.progress.spikes)
        self.micro_batch = min(self.settings.micro_batch, int(state["micro_batch"]))
        self.log.resume_at(self.progress.step)


def _add_by_source(sources: dict[int, list[float]], part: Batch, rows: torch.Tensor) -> None:
    counts = (part.labels != -100).sum(1)
    for source, total, count in zip(part.sources.tolist(), rows.tolist(), counts.tolist(), strict=True):
        entry = sources.setdefault(source, [0.0, 0.0])
        entry[0] += total
        entry[1] += count


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in str(error)
        or "out of memory" in str(error)
    )

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threefold import seeds
from threefold.data.loader import Batch, Batches
from threefold.device import is_out_of_memory
from threefold.errors import CheckpointError, DiskError, Interrupted, MemoryLimitError, NumericError
from threefold.objectives.term import Objective
from threefold.training import schedule
from threefold.training.decisions import LEAVING, Decisions, Value
from threefold.training.gradients import LESS_MEMORY, Measured, NothingToLearn, accumulate
from threefold.training.guards import MOST_SKIPS, SpikeGuard, dump_batch, is_finite
from threefold.training.keeper import Keeper, Progress
from threefold.training.length import Length
from threefold.training.log import Line, RunLog
from threefold.training.optim import Optimizer, clip_gradients
from threefold.training.signals import Signals

GOES_ON = "the same command goes on from here"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of the loop, resolved."""

    schedule: str = "linear"
    warmup: int = 20
    cooldown: float = 0.6
    clip: float = 1.0
    micro_batch: int
    save_every: int = 0
    save_seconds: float = 60.0
    keep: int = 2
    nonfinite: str = "stop"
    spike: str = "log"
    on_save_error: str = "stop"
    log_every: int = 1
    workers: int = 1
    validation_tokens: int = 0  # of each source, for evaluations on the way
    take_best: bool = False  # what is left are the weights of the best evaluation, not the last ones


@dataclass(frozen=True)
class StepResult:
    """An update that was made: what was measured, and the gradient norm before clipping."""

    measured: Measured
    norm: float


class Trainer:
    """Trains `model` on `loader` until `length` says that it is done; `fit` returns the last evaluation."""

    def __init__(
        self,
        run: Path, model: nn.Module, objective: Objective, loader: Batches, optimizer: Optimizer,
        length: Length, log: RunLog, decisions: Decisions, settings: Settings,
        *,
        evaluate: Callable[[int | None], Mapping[str, Any]],
        sample: Callable[[], list[str]] = list,
        identity: dict[str, Any] | None = None,
        source_names: Sequence[str] = (),
        accept_new_data: bool = False,
        tell: Callable[[Line], None] = lambda line: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run, self.model, self.objective, self.loader, self.optimizer = run, model, objective, loader, optimizer
        self.length, self.log, self.decisions, self.settings = length, log, decisions, settings
        self.evaluate, self.sample, self.source_names = evaluate, sample, source_names
        self.tell, self.warn = tell, warn
        self.keeper = Keeper(run, model, optimizer, decisions, log, keep=settings.keep, identity=identity or {},
                             warn=lambda text: self.warn(text))
        self.accept_new_data = accept_new_data
        self.progress, self.spikes = Progress(), SpikeGuard()
        self.weights_of: int | None = None  # the step of the weights that are left, where they are not those of the last one
        self.micro_batch = settings.micro_batch
        self._drops = any(getattr(module, "dropout", 0) for module in model.modules())
        self._unwritten: list[Line] = []
        self._saved_at = time.monotonic()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Run to the end from wherever the run stands; raises Interrupted after a signal, with a checkpoint saved."""
        with Signals() as signals:
            batches = self._batches()
            while not self.length.is_over(self.progress.step):
                step, started = self.progress.step, time.perf_counter()
                result = self._step(step, next(batches))
                if self.progress.step != step:  # rolled back: other batches follow
                    batches = self._batches()
                else:
                    self._after(step, result, time.perf_counter() - started)
                    if self._evaluation():
                        batches = self._batches()
                self._leave(signals)
                if self._save_is_due():
                    self._save()
            del batches
            self._save()
            self._leave(signals)
            if self.settings.take_best:
                self._take_best()
            last = self._evaluated(last=True)  # a signal from here on finds the result a moment away
            self._write_lines()
        return last

    def _leave(self, signals: Signals) -> None:
        """Save and stop, where a signal asked for it."""
        if signals.received:
            done = "saved" if self._save() else "not saved"
            raise Interrupted(signals.received, f"{signals.name} at step {self.progress.step}: {done}", hint=GOES_ON)

    def _step(self, step: int, batch: Batch) -> StepResult | None:
        """One update, or None where a guard kept it from the weights."""
        while True:
            self._take_micro_batch(step)
            try:
                measured = self._gradients(step, batch)
                break
            except (RuntimeError, MemoryError) as error:
                self.optimizer.zero_grad()
                if not is_out_of_memory(error):
                    raise
                self._halve(step, batch, error)
        result = StepResult(measured, float(clip_gradients(self.optimizer.parameters, self.settings.clip)))
        if not is_finite(measured.loss, result.norm):
            self._not_finite(step, batch, result)
            return None
        if self._spike(step, result):
            return None
        self.optimizer.step(self.factor(step), step)
        self.optimizer.zero_grad()
        self.progress.skips = 0
        self.spikes.add(measured.loss, result.norm)
        return result

    def _gradients(self, step: int, batch: Batch) -> Measured:
        parts = list(batch.split(self._rows(batch)))
        try:
            return accumulate(self.model, self.objective, parts, lambda part: self._context(step, part),
                              by_source=len(self.source_names) > 1)
        except NothingToLearn as empty:
            raise NumericError(
                f"step {step}: nothing to learn from in the term {', '.join(empty.args)}: every label of the samples "
                f"{self._describe(batch)} is masked",
                hint="the answer may have been cut off by the context: use a longer context or shorter examples",
            ) from None

    def _rows(self, batch: Batch) -> int:
        """Rows of a micro-batch: whole units, and at least one."""
        unit = self.objective.unit
        return self.micro_batch if unit == "row" else max(2, self.micro_batch // 2 * 2) if unit == "pair" else len(batch)

    def _context(self, step: int, part: Batch) -> dict[str, Any]:
        """What a forward pass needs besides the batch: a key for the dropout of each row, where the model drops."""
        if not self._drops:
            return {}
        keys = [seeds.key(self.loader.seed, "dropout", step, int(sample)) for sample in part.samples]
        return {"dropout_keys": torch.tensor(keys, device=part.input_ids.device)}

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at a step; a cool-down falls from where the rate stood."""
        if (cooling := self.length.cooling(step)) is None:
            return self._planned_factor(step)
        start, end = cooling
        fall = schedule.factor("linear", step - start, end - start, warmup=1)
        return self._planned_factor(start) * fall

    def _planned_factor(self, step: int) -> float:
        s = self.settings
        return schedule.factor(s.schedule, step, self.length.planned_end(step), warmup=s.warmup, cooldown=s.cooldown)

    def _batches(self) -> Iterator[Batch]:
        """Batches from the current step on."""
        numbers = map(self.decisions.batch_of, itertools.count(self.progress.step))
        return (batch for _, batch in self.loader.follow(numbers, self.settings.workers))

    # -- after a step --------------------------------------------------------------------------------------------------

    def _after(self, step: int, result: StepResult | None, seconds: float) -> None:
        p = self.progress
        p.step = step + 1
        self.length.measured(p.step, seconds)
        if result is None:
            return
        p.tokens += self.loader.tokens_per_step
        line: Line = {
            "step": p.step,
            "loss": result.measured.loss,
            "lr": self.optimizer.peak * self.factor(step),
            "grad_norm": result.norm,
            "tokens": p.tokens,
            "seconds": round(self.length.elapsed(), 3),
            "tokens_per_second": round(self.loader.tokens_per_step / max(seconds, 1e-9)),
        }
        if len(result.measured.terms) > 1:
            line["terms"] = result.measured.terms
        if result.measured.sources:
            line["sources"] = {self.source_names[s]: value for s, value in sorted(result.measured.sources.items())}
        if p.step % self.settings.log_every == 0 or p.step == 1:
            self._note(line)
        self.tell(line)

    def _evaluation(self) -> bool:
        """Evaluate where it is time to; True if the run went back to an earlier step for it."""
        p = self.progress
        if not self.length.is_evaluation(p.step) or self.length.is_over(p.step):
            return False
        values = self._evaluated()
        criterion = self._criterion(values)
        if criterion < p.best_loss:
            p.best_loss, p.best_step, p.waited = criterion, p.step, 0
        else:
            p.waited += 1
        if self.length.keeps_best and p.best_step == p.step:
            self._save()
        back = self.length.after_evaluation(p.step, waited=p.waited, best=self._best)
        if back is not None and back < p.step:
            self._go_back(back)
            return True
        return False

    def _take_best(self) -> None:
        """Put the weights of the best evaluation in the place of the last ones, where those are no better on the same text."""
        p = self.progress
        if p.best_step in (-1, p.step) or self._criterion(self._evaluated()) < p.best_loss:
            return
        found = self.keeper.reachable(p.best_step)
        if found is not None and found.step == p.best_step:
            self.keeper.put_back(found)
            self.weights_of = found.step
            self._note({"event": "best", "step": found.step, "of": p.step})

    @staticmethod
    def _criterion(values: Mapping[str, Any]) -> float:
        return float(values.get("criterion", values["loss"]))

    def _best(self) -> int:
        """The step to go back to: that of the best evaluation, or the nearest before it that can still be trusted."""
        found = self.keeper.reachable(self.progress.best_step)
        return self.progress.step if found is None else found.step

    def _evaluated(self, *, last: bool = False) -> dict[str, Any]:
        tokens: int | None = self.settings.validation_tokens  # of each source
        if last and (tokens := self.length.closing_tokens(self.progress.step)) is not None:
            self.warn(f"the budget has no time for all {self.length.validation_tokens:,} held-out tokens: the last evaluation "
                      f"takes about {tokens:,}; `threefold evaluate {self.run}` takes all of them")
            tokens //= max(1, len(self.source_names))
        started = time.perf_counter()
        try:
            values = dict(self.evaluate(tokens))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(f"step {self.progress.step}: not enough memory to evaluate ({error})", hint=LESS_MEMORY) from error
        seconds = time.perf_counter() - started
        self.length.evaluated(seconds, values.get("seen", values["tokens"]))  # what it took goes with the text, not with the labels
        line: Line = {
            "event": "evaluation",
            "step": self.progress.step,
            "whole": tokens is None,
            "last": last,
            "val_loss": values["loss"],
            "val_bits_per_byte": values["bits_per_byte"],
            "val_tokens": values["tokens"],
            "eval_seconds": round(seconds, 3),
        }
        if last and self.weights_of is not None:
            line["weights_of"] = self.weights_of
        if "metrics" in values:
            line["metrics"] = values["metrics"]
        if samples := self.sample():
            line["samples"] = samples
        self._note(line)
        self.tell(line)
        return values

    def _note(self, line: Line) -> None:
        """Log a line. Where training is to outlive a full disk, lines wait in memory until there is room."""
        self._unwritten.append(line)
        try:
            self._write_lines()
        except DiskError as error:
            if self.settings.on_save_error != "continue":
                raise
            if len(self._unwritten) == 1:
                self.warn(f"{error}; training goes on, and the log is held in memory")

    def _write_lines(self) -> None:
        while self._unwritten:
            self.log.append(self._unwritten[0])
            del self._unwritten[0]

    # -- guards --------------------------------------------------------------------------------------------------------

    def _not_finite(self, step: int, batch: Batch, result: StepResult) -> None:
        self.optimizer.zero_grad()
        self.progress.skips += 1
        what = f"loss is {result.measured.loss}, gradient norm {result.norm}"
        if self.settings.nonfinite == "skip" and self.progress.skips <= MOST_SKIPS:
            self.decisions.make("skip", step, lambda: {"why": what, "samples": batch.samples.tolist()}, forced=True)
            return
        dumped = dump_batch(self.run / "dumps" / f"step-{step:06d}.safetensors", batch)
        raise NumericError(
            f"step {step}: {what}, on the samples {self._describe(batch)}; no update was made, {dumped}",
            hint="lower the learning rate (train.learning_rate), look at the samples, "
            "or go on with train.nonfinite=skip",
        )

    def _spike(self, step: int, result: StepResult) -> bool:
        """Handle a spike; True if the update is not to be made."""
        is_spike = self.spikes.is_spike(result.measured.loss, result.norm)
        # What lasts is no spike: after so many updates left out in a row one is made, and joins the window.
        action = self.settings.spike if self.progress.skips < MOST_SKIPS else "log"
        seen: Value = {"loss_seen": result.measured.loss, "norm_seen": result.norm, "action": action}

        def back() -> Value | None:
            found = self.keeper.reachable(step - 1) if is_spike and action == "rollback" else None
            return None if found is None else {**seen, "to": found.step, "skipped": step - found.step + 1}

        again = any(at == step for at, _ in self.decisions.known("rollback"))  # twice from one step leads nowhere
        if not again and (rollback := self.decisions.make("rollback", step, back)) is not None:
            self.optimizer.zero_grad()
            self._go_back(int(rollback["to"]))
            return True
        spike = self.decisions.make("spike", step, lambda: seen if is_spike else None)
        if spike is None or spike["action"] == "log":
            return False
        self.optimizer.zero_grad()
        self.progress.skips += 1
        return True

    def _take_micro_batch(self, step: int) -> None:
        self.decisions.make("micro_batch", step, lambda: None)  # one of a replayed log comes into force at its step
        for at, value in self.decisions.known("micro_batch"):
            if at <= step:
                self.micro_batch = min(self.micro_batch, int(value["rows"]))

    def _halve(self, step: int, batch: Batch, error: BaseException) -> None:
        rows, length = batch.input_ids.shape
        rows = min(rows, self.micro_batch)
        what = (f"step {step}: not enough memory for a micro-batch of {rows} rows x {length:,} tokens x "
                f"{self.loader.vocab_size:,} ids of the vocabulary ({error})")
        least = {"row": 1, "pair": 2}.get(self.objective.unit, rows)
        if rows <= least:
            raise MemoryLimitError(what, hint=LESS_MEMORY) from error
        self.warn(f"{what}; going on with {rows // 2} rows")
        self.decisions.revise("micro_batch", step, {"rows": rows // 2})
        self.micro_batch = rows // 2

    def _describe(self, batch: Batch) -> str:
        shown = "; ".join(str(self.loader.describe(int(s))) for s in batch.samples[:4])
        return shown + (" ..." if len(batch.samples) > 4 else "")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        s = self.settings
        if any(self.progress.step == int(value["to"]) for _, value in self.decisions.coming(*LEAVING)):
            return True  # the replayed log will go back to it
        if s.save_every:
            return self.progress.step % s.save_every == 0
        return s.save_seconds > 0 and time.monotonic() - self._saved_at >= s.save_seconds

    def _save(self) -> bool:
        """Save this step, if it is not; False where that failed and training is to go on."""
        p, started = self.progress, time.perf_counter()
        if self.keeper.saved == p.step:
            return True
        p.spikes = self.spikes.state()
        spare = {int(value["to"]) for _, value in self.decisions.coming(*LEAVING)}
        if self.length.keeps_best:
            spare.add(p.best_step)
        more = {"elapsed": self.length.elapsed(), "micro_batch": self.micro_batch}
        try:
            self.keeper.save(p, more, spare=spare)
        except DiskError as error:
            if self.settings.on_save_error != "continue":
                raise
            self.warn(f"{error}; training goes on without this checkpoint")
            return False
        finally:
            self._saved_at = time.monotonic()  # a save that takes long does not call for the next one
        self._note({"event": "saved", "step": p.step, "seconds": round(time.perf_counter() - started, 3)})
        return True

    def resume(self, step: int | None = None) -> int:
        """Take up the newest checkpoint that verifies (or exactly `step`); returns the step, 0 where there is none.

        Raises CheckpointError for a `step` that is damaged or not there, and for one of another model.
        """
        found = self.keeper.find(step)
        carried = [0.0]
        if found is not None:
            self.keeper.check_data(found, accept_new=self.accept_new_data)
            carried.append(float(found.state().get("elapsed", 0.0)))
        seen = self.log.lines()
        used = [float(line["seconds"]) for line in seen if "loss" in line]
        self.length.carried = max([*carried, *used, *(float(line["elapsed"]) for line in seen if "elapsed" in line)])
        if found is not None:
            later = self.keeper.after(found.step) if step is not None else []
            self._take(*self.keeper.take_up(found, for_good=step is not None))
            if later:
                self.warn(f"going on from step {step}: the checkpoints of later steps ({', '.join(map(str, later))}) are removed")
            if self.length.begins_again(found.step):
                self.progress.waited = 0  # its patience begins anew
        else:
            self.log.resume_at(0)
        if seen:  # the time that was used stays used, also where the lines that tell of it are gone
            self.log.append({"event": "resumed", "step": self.progress.step, "elapsed": round(self.length.carried, 3)})
        return self.progress.step

    def _go_back(self, step: int) -> None:
        found = self.keeper.reachable(step)
        if found is None:
            raise CheckpointError(f"no checkpoint at or before step {step} is left to go back to in `{self.run}`",
                                  hint="--fresh starts over")
        self._take(*self.keeper.take_up(found, for_good=True))

    def _take(self, progress: Progress, more: Mapping[str, Any]) -> None:
        self.progress = progress
        self.spikes.load(progress.spikes)
        self.micro_batch = min(self.settings.micro_batch, int(more["micro_batch"]))

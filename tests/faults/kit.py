"""The injection kit: ways to make disk, process, numbers and clock fail, and a run small enough for loops.

Everything hangs on the one seam of `files.py`: each low-level operation of the package passes it, so that tests can let
the n-th one fail, kill the process at it, or record what a power cut would leave behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.data.helpers import shards_of
from tests.faults.disk import FaultyFiles, PowerLoss, corrupt
from threefold import files
from threefold.data.loader import Batch, Loader
from threefold.data.shards import Shards
from threefold.errors import ThreefoldError
from threefold.model.base import Model
from threefold.model.build import build_model, matrix_parts, scaled
from threefold.model.language import CausalLM
from threefold.objectives.causal import Causal
from threefold.objectives.term import Objective, Term
from threefold.training import checkpoint
from threefold.training.decisions import Decisions
from threefold.training.length import Length, Limits
from threefold.training.log import Line, RunLog
from threefold.training.optim import Optimizer
from threefold.training.trainer import Settings, Trainer

__all__ = ["FaultyFiles", "PowerLoss", "corrupt"]

# -- a small run -------------------------------------------------------------------------------------------------------

VOCABULARY, CONTEXT, ROWS = 40, 16, 4


def tiny_shards(sources: int = 1, tokens: int = 900) -> Shards:
    """Documents of a sawtooth with noise, so that there is something to learn, in memory."""
    parts = []
    for source in range(sources):
        rng = np.random.default_rng(source)
        documents, left = [], tokens
        while left > 0:
            length = int(rng.integers(5, 60))
            body = 2 + (np.arange(length) + int(rng.integers(30))) * (source + 1) % (VOCABULARY - 2)
            noise = rng.random(length) < 0.1
            body[noise] = rng.integers(2, VOCABULARY, int(noise.sum()))
            documents.append([1, *body.tolist(), 1])
            left -= length + 2
        parts.append(documents)
    shares = [1 / sources] * sources if sources > 1 else None
    return shards_of(*parts, shares=shares)


def tiny_model(
    dtype: torch.dtype = torch.float32, *, depth: int = 2, width: int = 32, dropout: float = 0.0
) -> CausalLM:
    """Two layers, 32 wide; ends of branches are not zero, so that every weight has a gradient from the first step."""
    config = scaled("gpt2" if dropout else "qwen3", width=width, depth=depth, vocab_size=VOCABULARY, context=CONTEXT)
    if dropout:
        config = dataclasses.replace(config, embd_pdrop=dropout, resid_pdrop=dropout, attention_dropout=dropout)
    model = build_model(config, seed=0, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def tiny_trainer(
    run: Path,
    *,
    steps: int | None = 20,
    budget: float | None = None,
    converged: bool = False,
    patience: int = 3,
    eval_every: int = 0,
    evaluate: Callable[[Trainer], float] | None = None,
    warmup: int = 4,
    replay: Sequence[Line] = (),
    model: Model | None = None,
    objective: Objective | None = None,
    shards: Shards | None = None,
    loader: Loader | None = None,
    rows: int = ROWS,
    seed: int = 0,
    lr: float = 0.02,
    adamw_lr: float = 0.01,
    clock: Callable[[], float] = time.monotonic,
    warnings: list[str] | None = None,
    names: Sequence[str] = (),
    pure_adamw: bool = False,
    **settings: Any,
) -> Trainer:
    """A trainer over the tiny model and shards that resumes whatever stands in `run`; `evaluate(trainer)` is a loss."""
    files.make_dirs(run)
    model = tiny_model() if model is None else model
    loader = Loader(tiny_shards() if shards is None else shards, CONTEXT, rows, seed) if loader is None else loader
    matrices = {} if pure_adamw else matrix_parts(model)
    optimizer = Optimizer(model, matrices, lr=lr, adamw_lr=adamw_lr, weight_decay=0.1)
    log = RunLog(run / "log.jsonl")
    decisions = Decisions(log, replay)
    length = Length(
        Limits(steps=steps, budget=budget, converged=converged, patience=patience),
        decisions,
        warmup=warmup,
        eval_every=eval_every,
        evaluations=3,
        validation_tokens=0,
        tokens_per_step=loader.tokens_per_step,
        closing_seconds=0.0,
        clock=clock,
    )

    def measure(tokens: int | None) -> dict[str, float]:
        loss = held_out(trainer) if evaluate is None else evaluate(trainer)
        return {"loss": loss, "bits_per_byte": loss, "tokens": 64.0}

    told = [] if warnings is None else warnings
    trainer = Trainer(
        run,
        model,
        objective or Causal(),
        loader,
        optimizer,
        length,
        log,
        decisions,
        Settings(**{"micro_batch": rows, "workers": 0, "warmup": warmup, "save_every": 5, **settings}),
        evaluate=measure,
        source_names=names,
        warn=told.append,
        identity={"torch": torch.__version__, "data_fingerprint": "tiny"},
    )
    return trainer


def held_out(trainer: Trainer) -> float:
    """The loss on one fixed batch."""
    batch = trainer.loader.batch(10_000)
    with torch.no_grad():
        total, count = trainer.model.loss_sum(batch.input_ids, batch.labels, batch.positions, batch.documents)  # type: ignore[operator]
    return float(total) / int(count)


def train(run: Path, **settings: Any) -> Trainer:
    """What the command does: clean up under the lock, resume, go on to the end."""
    with files.lock(run):
        for folder in (run, run / "checkpoints"):
            files.clean_leftovers(folder)
        trainer = tiny_trainer(run, **settings)
        trainer.resume()
        trainer.fit()
    return trainer


class Halted(Exception):
    """Raised in the middle of a run, where a test wants it to end."""


def halt(run: Path, after: int, **settings: Any) -> None:
    """A run that ends just after the line of step `after` is in the log, before anything else is done at that step."""
    trainer = tiny_trainer(run, **settings)

    def tell(line: Line) -> None:
        if line["step"] == after and "loss" in line:
            raise Halted

    trainer.tell = tell
    trainer.resume()
    with contextlib.suppress(Halted):
        trainer.fit()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and optimizer state, copied."""
    named = {f"model.{name}": p.detach() for name, p in trainer.model.named_parameters()}
    return {name: t.clone() for name, t in {**named, **trainer.optimizer.state()}.items()}


def saved_state(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """The same from the newest checkpoint (or that of `step`) on disk."""
    found = checkpoint.latest(run) if step is None else checkpoint.at(run, step)
    assert found is not None
    return {**{f"model.{name}": t for name, t in found.model().items()}, **found.optimizer()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise equality, names included."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


WALL_CLOCK = ("seconds", "tokens_per_second", "eval_seconds", "elapsed")
RECORDS = ("saved", "resumed", "start", "finished")  # what happened to the process, not to the model


def history(run: Path) -> list[Line]:
    """The log without what depends on the clock, starts and saves among it, with decisions sorted to their steps."""
    lines = [
        {k: v for k, v in line.items() if k not in WALL_CLOCK}
        for line in RunLog(run / "log.jsonl").lines()
        if line.get("event") not in RECORDS
    ]
    return sorted(lines, key=lambda line: (line["step"], "loss" not in line, line.get("event") != "decision"))


def step_lines(run: Path) -> list[int]:
    """The steps that have a line, in the order of the log."""
    return [int(line["step"]) for line in RunLog(run / "log.jsonl").lines() if "loss" in line]


# -- the process -------------------------------------------------------------------------------------------------------


class Child:
    """A forked copy of this process that does `work` and exits, with the exit code of the command line for our errors.

    torch is loaded already, so that a child costs milliseconds; it must not have used more than one thread.
    """

    def __init__(self, work: Callable[[], object], *, crash_at: int = 0, output: Path | None = None) -> None:
        assert torch.get_num_threads() == 1, "a process with threads must not be forked"
        sys.stdout.flush()
        sys.stderr.flush()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if output is not None:
                    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(fd, 1)
                    os.dup2(fd, 2)
                files._crash_at, files._count = crash_at, 0
                work()
                code = 0
            except ThreefoldError as error:
                code = error.exit_code
                os.write(2, f"error: {error}\nhint: {error.hint}\n".encode())
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if the child is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_after(self, seconds: float) -> int:
        """Wait so long for it to end, then SIGKILL; returns as `wait`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.kill()
        return self.wait()


def in_child(work: Callable[[], object], *, crash_at: int = 0) -> int:
    """The exit code of `work` done in a fork, which ends itself at disk operation `crash_at`."""
    return Child(work, crash_at=crash_at).wait()


# -- the numbers -------------------------------------------------------------------------------------------------------


class Poisoned(Causal):
    """Causal, with the loss of rows that hold one of `samples` multiplied, as a bad sample would (N01, N03)."""

    def __init__(self, samples: set[int], factor: float) -> None:
        self.samples, self.factor = samples, factor

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """The terms, poisoned where such a row is among them."""
        (term,) = super().terms(model, batch, **context)
        factor = self.factor if self.samples & {int(s) for s in batch.samples} else 1.0
        return [Term(term.name, term.sum * factor, term.weight, rows=term.rows)]


def poison_gradient(parameter: nn.Parameter, at: int, value: float = float("nan")) -> None:
    """Put `value` into one number of the gradient at the `at`-th backward pass (from 0) from now on."""
    passes = iter(range(10**9))

    def hook(gradient: Tensor) -> Tensor:
        if next(passes) == at:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient

    parameter.register_hook(hook)  # type: ignore[no-untyped-call]


def no_memory_above(model: nn.Module, rows: int) -> None:
    """Raise the allocator's error in every forward pass of more than `rows` rows (R01)."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = inputs[0] if inputs else keywords["input_ids"]
        if len(ids) > rows:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
            )

    model.transformer.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[union-attr]


class FakeClock:
    """A clock that goes on by `tick` seconds each time it is read, and by more when told."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

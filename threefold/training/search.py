"""Which learning rate: a few are tried for a while, by the one trainer, and the best on held-out rows is taken.

Decisions:
- A trial is a short run of its own in a scratch folder, from the same weights and over the same first batches; afterwards the
  weights are put back, and the run that follows does not know of it but for the rate.
- A rate at which numbers are no longer finite is the worst. What was found is one decision of the run, so that a resumed or replayed
  run does not search.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threefold import files
from threefold.data.loader import Batches
from threefold.errors import Interrupted, NumericError
from threefold.objectives.term import Objective
from threefold.training.decisions import Decisions, Value
from threefold.training.length import Length, Limits
from threefold.training.log import RunLog
from threefold.training.optim import Optimizer
from threefold.training.trainer import Settings, Trainer

STRIDE = 3.0  # from one rate to the next


def around(rate: float, count: int) -> list[float]:
    """`count` rates with `rate` in their middle (or above it), each three times the one before."""
    return [rate * STRIDE ** (number - (count - 1) // 2) for number in range(count)]


def best_rate(rates: Sequence[float], steps: int, model: nn.Module, objective: Objective, loader: Batches, optimizer: Callable[[float], Optimizer],
              evaluate: Callable[[], Mapping[str, Any]], run: Path, *, micro_batch: int) -> Value:
    """`rate`, the one that is best after so many steps, and what each came to (`tried`, lower is better)."""
    begun = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tried: dict[str, float] = {}
    for rate in rates:
        folder = files.temp_dir_beside(run / "search")
        try:
            log = RunLog(folder / "log.jsonl")
            decisions = Decisions(log)
            length = Length(Limits(steps=steps), decisions, warmup=max(1, steps // 10), evaluations=1, eval_every=steps)
            settings = Settings(warmup=length.warmup, micro_batch=micro_batch, save_seconds=math.inf)
            values = Trainer(folder, model, objective, loader, optimizer(rate), length, log, decisions, settings,
                             evaluate=lambda tokens: evaluate()).fit()
            tried[f"{rate:.3g}"] = float(values.get("criterion", values["loss"]))
        except NumericError:
            tried[f"{rate:.3g}"] = math.inf
        except Interrupted as stopped:
            raise Interrupted(stopped.signum, "interrupted while learning rates were tried: nothing of them is kept",
                              hint="the same command begins again") from stopped
        finally:
            files.remove_tree(folder)
            gc.collect()  # a trainer and its moments hold each other
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in begun:
                        p.copy_(begun[name])
                        p.grad = None
    if not any(map(math.isfinite, tried.values())):
        raise NumericError(f"at none of the learning rates {', '.join(tried)} did the numbers stay finite",
                           hint="begin lower: --train.learning_rate, and look at the rows")
    best = min(rates, key=lambda rate: tried[f"{rate:.3g}"])
    return {"rate": best, "tried": {name: value if math.isfinite(value) else None for name, value in tried.items()}}

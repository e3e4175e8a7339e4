"""What document borders cost: training on rows that hold several documents, with the borders kept and without.

    python -m benchmarks.packing

In one process, in turns: the same model, ids and optimizer; once with `documents` and `positions`, so that no token
sees another document, once with neither. Tokens a second of whole training steps. Documents are on average a quarter of
the context long; where each row lies in one document the loader hands over no borders, and nothing is paid.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from benchmarks.harness import Findings, Measure, Measurement, Result, Row, main, rounds, say

# width, layers, context, rows
SHAPES = ((128, 4, 64, 12), (256, 5, 256, 8), (384, 6, 256, 16), (512, 8, 1024, 4))
QUICK_SHAPES = ((64, 2, 32, 2),)
VOCABULARY = 4096
DOCUMENTS_PER_ROW = 4
SIDES = ("without", "with")


def run(options: argparse.Namespace) -> Findings:
    """Every shape, both sides in turns."""
    measurements: list[Measurement] = []
    dtype = ""
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        trainer = Trainer(shape)
        dtype = trainer.dtype
        seconds = 0.0 if options.quick else 2.0
        for side in SIDES:
            trainer.speed(side, seconds=0.0)
        for repetition, side in rounds(options.repeats, SIDES):
            speed = trainer.speed(side, seconds)
            say(f"  {repetition + 1}/{options.repeats} {shape} {side} borders: {speed:,.0f} tokens/s")
            measurements.append({"shape": list(shape), "side": side, "repetition": repetition, "tokens_per_second": speed})
    return Findings(
        name="packing",
        settings={"vocabulary": VOCABULARY, "documents_per_row": DOCUMENTS_PER_ROW, "dtype": dtype, "family": "qwen3"},
        measurements=measurements,
    )


class Trainer:
    """A model with its optimizer, stepping over one batch."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        import torch

        from threefold import device
        from threefold.model.build import build_model, matrix_parts, scaled
        from threefold.training.optim import Optimizer

        width, depth, context, rows = shape
        config = scaled("qwen3", vocab_size=VOCABULARY, width=width, depth=depth, context=context)
        self.model = build_model(config, seed=0).train()
        chosen = device.pick_dtype("auto", torch.device("cpu")).dtype
        self.model.compute_dtype = chosen if chosen in (torch.bfloat16, torch.float16) else None
        self.dtype = str(chosen).removeprefix("torch.")
        self.optimizer = Optimizer(self.model, matrix_parts(self.model), lr=1e-4, adamw_lr=1e-4, weight_decay=0.1)
        self.steps = 0
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (rows, context), generator=generator)
        self.labels = torch.randint(VOCABULARY, (rows, context), generator=generator)
        borders = torch.zeros(rows, context, dtype=torch.int32)
        for row in range(rows):
            cuts = torch.randperm(context - 1, generator=generator)[: DOCUMENTS_PER_ROW - 1] + 1
            borders[row, cuts] = 1
        self.documents = borders.cumsum(1, dtype=torch.int32)
        places = torch.arange(context).expand(rows, -1)
        self.positions = places - torch.where(borders.bool(), places, 0).cummax(1).values

    def speed(self, side: str, seconds: float) -> float:
        """Tokens a second over at least two steps and at least `seconds`."""
        borders: tuple[Any, Any] = (self.positions, self.documents) if side == "with" else (None, None)
        steps, start = 0, time.perf_counter()
        while steps < 2 or time.perf_counter() - start < seconds:
            loss, count = self.model.loss_sum(self.ids, self.labels, *borders)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step(1.0, self.steps)
            self.optimizer.zero_grad()
            steps, self.steps = steps + 1, self.steps + 1
        return steps * self.ids.numel() / (time.perf_counter() - start)


def rows(result: Result) -> list[Row]:
    """A line for each shape."""
    found = []
    for shape in dict.fromkeys(tuple(m["shape"]) for m in result.measurements):
        plain, kept = (result.spread("tokens_per_second", shape=list(shape), side=side) for side in SIDES)
        width, depth, context, count = shape
        found.append(
            Row(
                measure=f"document borders: width {width}, {depth} layers, {count} rows of {context}",
                peer=f"without: {plain.words('tokens/s', 0)}",
                threefold=kept.words("tokens/s", 0),
                compared=f"{100 * (kept.median / plain.median - 1):+.1f} %",
            )
        )
    return found


MEASURE = Measure(name="packing", summary="tokens a second with and without document borders", repeats=5, run=run, rows=rows)

if __name__ == "__main__":
    sys.exit(main(MEASURE))

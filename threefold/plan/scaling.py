"""Which model, context and batch suit the compute and the data at hand: the rule behind `--size auto`.

Decisions:
- Compute is floating-point operations of the whole training: what a budget buys at the speed this machine was measured
  to have on a small model of the family, forward and backward, and not at the speed of its largest matrix product.
- At these scales the best model is larger and sees fewer tokens than the asymptotic law says (Hoffmann et al. 2022,
  arXiv:2203.15556): Muon learns fast per token, and wide matrices use the machine better. The table of shapes below was
  fitted to runs over English, Korean and source code; docs/log.md holds the runs.
- Context starts short: in the first seconds a model learns from its last few dozen characters, and short rows mean
  more updates.
- The rule gives plain numbers, and the run writes them down as a decision. `--size`, `--context` and `--batch-tokens`
  overrule it.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TERA = 1e12
SUBSET_TOKENS = 8192  # of each source, for evaluations on the way


@dataclass(frozen=True)
class Shape:
    """width, depth: of the model. context: tokens in a row. batch_tokens: tokens of one update."""

    width: int
    depth: int
    context: int
    batch_tokens: int

    @property
    def parameters(self) -> int:
        """Inside the blocks, for the usual proportions (four projections of the width, a gated hidden layer of 8/3)."""
        return 12 * self.width**2 * self.depth


# Operations up to which a shape is the best one tried.
SHAPES: tuple[tuple[float, Shape], ...] = (
    (0.9 * TERA, Shape(96, 1, 64, 1024)),
    (3 * TERA, Shape(96, 2, 64, 1024)),
    (12 * TERA, Shape(96, 2, 128, 1024)),
    (25 * TERA, Shape(128, 4, 256, 1536)),
    (60 * TERA, Shape(192, 4, 256, 2048)),
    (200 * TERA, Shape(256, 5, 256, 4096)),
    (600 * TERA, Shape(320, 6, 256, 8192)),
    (2e3 * TERA, Shape(448, 7, 512, 16384)),
    (1e4 * TERA, Shape(576, 9, 512, 32768)),
    (1e5 * TERA, Shape(768, 12, 1024, 65536)),
)
# The same for families with an encoder: they are asked for fewer tokens of a row, so they want more rows, and short ones (their
# blocks are those of each stack). From 600 teraflop on they grow as decoders do.
WITH_ENCODER: tuple[tuple[float, Shape], ...] = (
    (4 * TERA, Shape(96, 2, 64, 2048)),
    (30 * TERA, Shape(128, 4, 64, 4096)),
    (150 * TERA, Shape(192, 4, 64, 4096)),
    (600 * TERA, Shape(256, 4, 128, 8192)),
    *SHAPES[7:],
)
LARGEST = Shape(1024, 16, 1024, 131072)


def choose(operations: float | None, train_tokens: int, *, with_encoder: bool = False) -> Shape:
    """The shape for so much compute; None means: as much as the data deserves (`--until converged`)."""
    operations = worth_of_data(train_tokens) if operations is None else operations
    shape = next((shape for limit, shape in (WITH_ENCODER if with_encoder else SHAPES) if operations <= limit), LARGEST)
    context = shape.context
    while context > 64 and context * 8 > train_tokens:
        context //= 2
    return Shape(shape.width, shape.depth, context, max(context, shape.batch_tokens))


def worth_of_data(train_tokens: int) -> float:
    """Operations that a corpus deserves: ten epochs of the largest model that has no more parameters than twice the
    tokens."""
    fitting = [shape for _, shape in SHAPES if shape.parameters <= 2 * train_tokens] or [SHAPES[0][1]]
    return 6.0 * fitting[-1].parameters * min(10 * train_tokens, 2_000_000_000)


def worth_of_steps(tokens: int) -> float:
    """Operations behind a given number of training tokens: of the model that has about as many parameters."""
    return 6.0 * tokens * min(max(float(tokens), 1e5), 1e9)


def speed(dtype: torch.dtype, device: torch.device, vocab_size: int) -> tuple[float, int]:
    """Floating-point operations a second that training reaches here, and the threads it reaches them with.

    A small model is run forward and backward for a fraction of a second, with all threads and with one: where another
    program keeps a core busy, threads that wait for each other are slower than one alone, by up to a hundred times.
    """
    import torch

    from threefold.model.build import build_model, flops_per_token, scaled
    from threefold.model.language import CausalLM

    # On a GPU a small model would measure how fast Python gives it work.
    width, rows, context = (128, 16, 64) if device.type == "cpu" else (768, 16, 512)
    config = scaled("qwen3", vocab_size=min(vocab_size, 512), width=width, depth=2, context=context)
    model = build_model(config).to(device)
    assert isinstance(model, CausalLM)
    if dtype == torch.float64:
        model.double()
    model.compute_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
    ids = torch.zeros(rows, context, dtype=torch.int64, device=device)

    def seconds() -> float:
        start = time.perf_counter()
        total, _ = model.loss_sum(ids, ids)
        total.backward()  # type: ignore[no-untyped-call]
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - start
    threads = torch.get_num_threads()
    measured: dict[int, float] = {}
    for count in sorted({threads, 1} if device.type == "cpu" else {threads}):
        torch.set_num_threads(count)
        if seconds() < 3 * min(measured.values(), default=math.inf):
            measured[count] = statistics.median(seconds() for _ in range(3))
    best = min(measured, key=lambda count: measured[count])
    torch.set_num_threads(best)
    return flops_per_token(config, 64) * ids.numel() / measured[best], best

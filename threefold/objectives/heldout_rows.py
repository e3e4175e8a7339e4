"""How good a model is on held-out rows: the loss, and the figures of its task.

Decision: on the way a fixed part of the rows is judged, at the end all of them; texts that have to be written are judged
for `WRITTEN` rows drawn once, fewer on the way, because each costs as much as hundreds of losses. How many is said.
"""

from __future__ import annotations

from typing import Any

from threefold.data.examples import Examples
from threefold.data.loader import Batch
from threefold.device import is_out_of_memory
from threefold.errors import NumericError
from threefold.evaluation.loss import evaluating
from threefold.model.base import Model
from threefold.objectives.rows import Judged, RowObjective
from threefold.objectives.term import Sums

WRITTEN = 200
TIES = 1e-4  # how much a nat counts beside a figure: it decides between equal ones


class HeldOutRows:
    """Evaluates on all held-out rows, or on about so many tokens of them. `judged` holds what the last call saw; `written`: how
    many texts are written at most, None: one for every row. Less is taken at once where memory runs out."""

    def __init__(self, model: Model, objective: RowObjective, examples: Examples, *, written: int | None = WRITTEN) -> None:
        self.model, self.objective, self.examples, self.written = model, objective, examples, written
        self.judged: list[Judged] = []

    def __call__(self, tokens: int | None) -> dict[str, Any]:
        while True:
            try:
                return self._evaluated(tokens)
            except (RuntimeError, MemoryError) as error:
                fewer = self.examples.size // 2
                if not is_out_of_memory(error) or fewer < self.objective.fewest or self.objective.unit == "batch":
                    raise
                self.examples.size = fewer  # changes memory and time, not the result

    def _evaluated(self, tokens: int | None) -> dict[str, Any]:
        rows = None if tokens is None else max(self.examples.size, round(tokens / float(self.examples.lengths.mean())))
        sums, seen = Sums(), 0
        self.judged = []
        with evaluating(self.model):
            for numbers, batch in self.examples.once(rows):
                batch = batch.to(self.model.device)
                seen += int(self.examples.lengths[numbers].sum())
                if all(self.objective.weights(batch).values()):
                    sums.add(self.objective.terms(self.model, batch))
                if not self.objective.writes:
                    self._judge(numbers, batch)
            if self.objective.writes:
                for numbers, batch in self.examples.once(self.written if tokens is None else max(1, (self.written or WRITTEN) // 4)):
                    self._judge(numbers, batch.to(self.model.device))
        if not sums.sums:
            raise NumericError("there is nothing to judge in the held-out rows", hint="hold more rows out (data.val_fraction)")
        loss = sums.loss("held-out rows")
        found: dict[str, Any] = {"loss": loss, "bits_per_byte": None, "tokens": seen, "bytes": 0}
        if self.judged:
            found["metrics"] = self.objective.measure(self.judged) | ({"judged": len(self.judged)} if self.objective.writes else {})
            first = next(iter(found["metrics"].values()))
            found["criterion"] = TIES * loss - first if isinstance(first, float) else loss
        return found

    def _judge(self, numbers: list[int], batch: Batch) -> None:
        self.judged += self.objective.judge(self.model, batch, [self.examples.items[n] for n in numbers])

"""How long a run is: steps, tokens, a time budget, or until it has converged; whichever comes first.

Decisions:
- Steps and tokens are arithmetic. What a budget buys is measured once warm-up is over and written down (`steps`), and
  is revised at evaluations alone, so that a run that was killed takes the same path as one that was not.
- "Converged" is patience on the validation loss. The run then goes back to its best checkpoint and lets the learning
  rate fall to zero from there (warm-up, stable, decay: arXiv:2405.18392). That binds as long as the same is asked for: a run
  that is resumed with more steps, patience or time goes on.
- A budget pays for everything: the clock starts with the process, goes on over resumes, and a reserve is kept for the
  last evaluation and the export. Steps bought with one budget do not bind a run that is resumed with another.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from threefold.training.decisions import Decisions, Value

MEASURED = 128  # the last so many steps give the time of a step: their median, which another program does not soon change
FEWEST = 3  # so many must be measured before anything is bought: the first one is slow
COOLDOWN_SHARE = 0.2  # of the steps to the best evaluation, after convergence
CLOSING_SHARE = 0.5  # of the budget, at most, for the last evaluation
SLACK = 0.01  # of the budget, left unspent: steps are not equally long
PATIENCE = 5  # evaluations without improvement, where none is named


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the user asked for. At least one is set. budget in seconds; patience in evaluations without improvement."""

    steps: int | None = None
    budget: float | None = None
    converged: bool = False
    patience: int = PATIENCE


class Length:
    """Counts steps and the clock. `carried` is the time earlier sessions of this run have used, in seconds; `before_last` are
    held-out tokens that are evaluated once more before the last, whole evaluation."""

    def __init__(
        self,
        limits: Limits,
        decisions: Decisions,
        *,
        warmup: int,
        evaluations: int = 8,
        eval_every: int = 0,
        validation_tokens: int = 0,
        tokens_per_step: int = 1,
        before_last: int = 0,
        closing_seconds: float = 0.3,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self.decisions, self.warmup, self.evaluations = limits, decisions, warmup, evaluations
        self._eval_every = eval_every
        self.validation_tokens, self.tokens_per_step, self.closing_seconds = (
            validation_tokens,
            tokens_per_step,
            closing_seconds,
        )
        self.before_last = before_last
        self.clock = clock
        self.started = clock() if started is None else started
        self.carried = 0.0
        self._steps: list[float] = []
        self._evaluation_rate: float | None = None

    # -- what the loop asks ---------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds this run has taken, over all its sessions."""
        return self.carried + self.clock() - self.started

    def is_over(self, step: int) -> bool:
        """Whether no step is left."""
        end = self.end(step)
        return end is not None and step >= end

    def end(self, step: int) -> int | None:
        """The last step as far as it is known."""
        cooling = self.cooling(step)
        ends = [end for end in (self.planned_end(step), cooling[1] if cooling else None) if end is not None]
        return min(ends) if ends else None

    def planned_end(self, step: int) -> int | None:
        """The last step that steps and budget allow, as far as it is known at `step`."""
        ends = [self.limits.steps] if self.limits.steps is not None else []
        if bought := self._bought(step):
            ends.append(int(bought[-1]["steps"]))
        return min(ends) if ends else None

    def cooling(self, step: int) -> tuple[int, int] | None:
        """First and last step of the cool-down after convergence, where `step` lies in it."""
        converged = self._converged()
        if not converged or step < int(converged[-1]["to"]):
            return None
        return int(converged[-1]["to"]), int(converged[-1]["end"])

    def is_evaluation(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        every = self._eval_every
        if not every:
            every = next((int(value["eval_every"]) for value in self._bought(step) if "eval_every" in value), 0)
        return every > 0 and step > 0 and step % every == 0

    def closing_tokens(self, step: int) -> int | None:
        """Held-out tokens of the last evaluation: None means all of them, as they are where a budget has time for it."""
        bought = self._bought(step)
        return int(bought[-1]["closing_tokens"]) if bought and "closing_tokens" in bought[-1] else None

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint so far must not be pruned."""
        return self.limits.converged

    def _under(self) -> list[float | bool | None]:
        """What a convergence is judged by."""
        return [self.limits.steps, self.limits.budget, self.limits.converged, self.limits.patience]

    def _converged(self) -> list[Value]:
        """The convergences that bind: those under the same limits, and all that are replayed."""
        return [value for _, value in self.decisions.known("converged")
                if self.decisions.replaying or value.get("under", self._under()) == self._under()]

    def begins_again(self, step: int) -> bool:
        """Whether a run that had converged goes on at this step, since more is asked for now."""
        taken = self.decisions.taken("converged")
        return bool(taken) and not self._converged() and step <= int(taken[-1][1]["end"])

    def _bought(self, step: int) -> list[Value]:
        """What this budget has bought up to `step`, by step."""
        if self.limits.budget is None:
            return []
        return [value for at, value in self.decisions.known("steps")
                if at <= step and value["budget"] == self.limits.budget]

    # -- what the loop tells --------------------------------------------------------------------------------------

    def measured(self, step: int, seconds: float) -> None:
        """A step took so long; after warm-up this buys the steps of a budget."""
        self._steps = [*self._steps[-MEASURED + 1:], seconds]
        budget = self.limits.budget
        if budget is None or any(value["budget"] == budget for _, value in self.decisions.known("steps")):
            return
        late = self.elapsed() > 0.8 * budget  # where steps are long, three of them must do, and beyond the budget one
        enough = (step >= self.warmup or late) and (len(self._steps) >= min(self.warmup, FEWEST) or self.elapsed() > budget)
        self.decisions.make("steps", step, lambda: self._buy(step, first=True) if enough else None)

    def evaluated(self, seconds: float, tokens: float) -> None:
        """An evaluation took so long: what the last, whole one will take is reckoned from it."""
        if tokens:
            self._evaluation_rate = seconds / tokens

    def after_evaluation(self, step: int, *, waited: int, best: Callable[[], int]) -> int | None:
        """Decide what an evaluation decides; returns the step to go back to, or None.

        waited: evaluations since the best one. best: the step to go back to for it, asked for where it is time.
        """
        if self._bought(step):
            self.decisions.make("steps", step, lambda: self._buy(step, first=False))
        if not self.limits.converged or self._converged():
            return None

        def converged() -> Value | None:
            if waited < self.limits.patience:
                return None
            to = best()
            return {"to": to, "end": to + max(10, math.ceil(COOLDOWN_SHARE * to)), "waited": waited, "under": self._under()}

        decision = self.decisions.make("converged", step, converged)
        return None if decision is None else int(decision["to"])

    def _buy(self, step: int, *, first: bool) -> Value:
        assert self.limits.budget is not None
        per_step = statistics.median(self._steps[1:] or self._steps or [0.0])
        if len(self._steps) < FEWEST and (bought := self._bought(step)):  # just resumed: what was measured before
            per_step = float(bought[-1]["seconds_per_step"])
        # A forward pass in float32 costs about as much as a third of a step in float32; a half leaves room for the
        # first guess.
        rate = self._evaluation_rate or 0.5 * per_step / self.tokens_per_step
        evaluation = rate * self.validation_tokens
        most = CLOSING_SHARE * self.limits.budget
        closing = self.closing_seconds + min(evaluation, most) + rate * self.before_last
        left = self.limits.budget * (1 - SLACK) - self.elapsed() - closing
        if first:
            subset = 0.03 * max(0.0, left)  # evaluations on the way have a share of their own
            left -= subset
        steps = step + max(1, int(left / max(per_step, 1e-9)))
        value: Value = {
            "steps": steps,
            "budget": self.limits.budget,
            "seconds_per_step": round(per_step, 5),
            "closing_seconds": round(closing, 3),
        }
        if evaluation > most:
            value["closing_tokens"] = max(1, int(most / rate))
        if first:
            last = min(steps, self.limits.steps or steps)
            value["eval_every"] = max(1, (last - step) // (self.evaluations + 1))
        return value

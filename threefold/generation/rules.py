"""What may come next, whatever the model thinks: ends that come too early, repeated runs, forbidden and forced ids.

Decisions:
- Each rule does what transformers' processor of the same argument does, so that a published generation_config.json means
  here what it means there.
- Rules concern one row and are plain data of its request, so a row follows its own in any company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from threefold.errors import UsageError
from threefold.generation.sampling import NEGATIVE_INFINITY


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one request; those of the defaults forbid nothing.

    shortest    no end before so many new ids
    no_repeat   no run of so many ids stands twice in the text; 0 is off
    forbidden   runs of ids that are not written
    first       the id that comes first behind a start alone
    last        the ids of which one is the last, where nothing has ended the text before its limit
    """

    shortest: int = 0
    no_repeat: int = 0
    forbidden: tuple[tuple[int, ...], ...] = ()
    first: int | None = None
    last: tuple[int, ...] = ()

    def apply(self, logits_V: Tensor, ids: Sequence[int], written: int, limit: int, eos: frozenset[int]) -> Tensor:
        """Logits (V,) with minus infinity for what may not come behind `ids`, the last `written` of which are new, of
        `limit` at most."""
        if self.last and written + 1 == limit:
            return _alone(logits_V, self.last)
        if self.first is not None and len(ids) == 1:
            return _alone(logits_V, (self.first,))
        barred = set(eos) if written < self.shortest else set()
        for run in self.forbidden:
            before = run[:-1]
            if len(before) <= len(ids) and tuple(ids[len(ids) - len(before):]) == before and (before or run[0] not in eos):
                barred.add(run[-1])
        if self.no_repeat and len(ids) + 1 >= self.no_repeat:
            tail = tuple(ids[len(ids) - self.no_repeat + 1:])
            for end in range(self.no_repeat - 1, len(ids)):
                if tuple(ids[end - self.no_repeat + 1:end]) == tail:
                    barred.add(ids[end])
        if not barred:
            return logits_V
        logits_V = logits_V.clone()
        logits_V[sorted(barred)] = NEGATIVE_INFINITY
        return logits_V


NONE = Rules()


def rules_of(options: Mapping[str, Any], before: int) -> Rules:
    """The rules that transformers' arguments ask for, for a text that begins with `before` ids; raises `UsageError` for
    values that mean nothing."""
    shortest = _count(options, "min_new_tokens")
    if options.get("min_new_tokens") is None:
        shortest = max(0, _count(options, "min_length") - before)
    runs = [*(options.get("bad_words_ids") or ()), *([i] for i in options.get("suppress_tokens") or ())]
    if not all(isinstance(run, list | tuple) and run and all(isinstance(i, int) for i in run) for run in runs):
        raise UsageError(f"`bad_words_ids` is {options.get('bad_words_ids')!r}", hint="a list of lists of ids is expected")
    last = options.get("forced_eos_token_id")
    first = options.get("forced_bos_token_id")
    if not isinstance(first, int | None) or not isinstance(last, int | list | tuple | None):
        raise UsageError(f"a forced id is {first!r} or {last!r}", hint="whole numbers are expected")
    return Rules(shortest, _count(options, "no_repeat_ngram_size"), tuple(map(tuple, runs)), first,
                 () if last is None else (last,) if isinstance(last, int) else tuple(last))


def _count(options: Mapping[str, Any], name: str) -> int:
    value = options.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UsageError(f"`{name}` is {value!r}, expected a whole number, 0 or more")
    return value or 0


def _alone(logits_V: Tensor, ids: Sequence[int]) -> Tensor:
    out = logits_V.new_full(logits_V.shape, NEGATIVE_INFINITY)
    out[list(ids)] = 0.0
    return out

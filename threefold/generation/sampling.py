"""Logits -> the next token: pure functions on a (B, V) tensor.

Decisions:
- Each filter does exactly what transformers' processor of the same name does, ties included, in transformers' order:
  repetition penalty, temperature, top-k, top-p, min-p.
- Temperature 0 is greedy. There is no second switch for it here.
- Nothing is drawn from a random state. The uniform number behind token t of a row is a function of (seed, row, t), and
  the token is found by inverting the cumulative distribution with it. So a row gives the same text alone, in any batch,
  and after being stopped and taken up again.
- `-inf` is a legal logit: it means "excluded". NaN, `+inf` and a row with nothing left are a `NumericError`.
- Filters run on a short list of the largest logits where that provably (or, for top-p, checkably) changes nothing: a
  full sort of 50,000 entries a row costs more than a small model.
- Half precision is widened to float32 first; float64 stays float64.

Shapes: B rows, V vocabulary, K short list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from threefold.errors import ConfigError, NumericError
from threefold.seeds import numpy_rng

NEGATIVE_INFINITY = float("-inf")
SHORT_LIST = 1024  # candidates looked at before the whole vocabulary is sorted for top-p


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to choose among the next tokens. The defaults draw from the model's own distribution, unchanged.

    temperature         0 is greedy, else 0.0001 to 1000: logits are divided by it
    top_k               keep the k most probable tokens; 0 keeps all
    top_p               keep the smallest set of most probable tokens with at least this mass (arXiv:1904.09751); 1
    keeps all
    min_p               drop tokens less probable than this share of the most probable one (arXiv:2407.01082); 0 keeps
    all repetition_penalty  divide positive and multiply negative logits of tokens already seen (arXiv:1909.05858); 1
    is off
    seed                names the stream of random draws, a 64-bit whole number

    Raises `ConfigError` that lists every value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, whole, low, high, words in _RANGES:
            value = getattr(self, name)
            is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:  # NaN fails both comparisons
                problems.append(f"`{name}` is {value!r}, expected {words}")
        if not problems and 0 < self.temperature < 1e-4:
            problems.append(
                f"`temperature` is {self.temperature!r}, expected 0 (greedy) or a number from 0.0001 to 1000"
            )
        if problems:
            raise ConfigError(
                "; ".join(problems), hint="temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken without a draw."""
        return self.temperature == 0


_TINY = math.ulp(0.0)
_RANGES: tuple[tuple[str, bool, float, float, str], ...] = (
    ("temperature", False, 0.0, 1000.0, "0 (greedy) or a number from 0.0001 to 1000"),
    ("top_k", True, 0, 2**31 - 1, "a whole number, 0 (off) or more"),
    ("top_p", False, _TINY, 1.0, "a number above 0 and at most 1"),
    ("min_p", False, 0.0, 1.0, "a number from 0 to 1"),
    ("repetition_penalty", False, 0.01, 100.0, "a number from 0.01 to 100"),
    ("seed", True, -2**63, 2**64 - 1, "a 64-bit whole number"),
)


def uniforms(seed: int, row: int, count: int, start: int = 0) -> np.ndarray:
    """The random numbers in [0, 1), float64 (count,), behind tokens `start` to `start + count` of a row."""
    rng = numpy_rng(seed, "sampling", row)
    rng.bit_generator.advance(start)  # type: ignore[attr-defined]  # PCG64: one step a number
    return rng.random(count)


# ---- filters: each takes logits (B, V) and gives logits (B, V), as transformers' processors do -----------------------


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens marked in the boolean `seen_BV` less likely (`penalty` > 1) or more likely (< 1)."""
    if penalty == 1:
        return logits_BV
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def apply_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Divide by `temperature` (> 0)."""
    return logits_BV if temperature == 1 else logits_BV / temperature


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Exclude all but the k largest logits of each row; logits equal to the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(k, dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, NEGATIVE_INFINITY)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Exclude the least probable tokens of each row as long as their mass is at most 1 - p; one always stays."""
    if p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1)
    drop_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop_BV[..., -1] = False
    return logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), NEGATIVE_INFINITY)


def keep_min_p(logits_BV: Tensor, min_p: float) -> Tensor:
    """Exclude tokens whose probability is below `min_p` times that of the most probable one of the row."""
    if min_p == 0:
        return logits_BV
    probs_BV = logits_BV.softmax(dim=-1)
    drop_BV = probs_BV < min_p * probs_BV.amax(dim=-1, keepdim=True)
    drop_BV.scatter_(-1, probs_BV.argmax(dim=-1, keepdim=True), False)
    return logits_BV.masked_fill(drop_BV, NEGATIVE_INFINITY)


def warp(logits_BV: Tensor, settings: SamplingSettings) -> Tensor:
    """Temperature and the three filters in order. Greedy settings leave the logits as they are."""
    if settings.greedy:
        return logits_BV
    logits_BV = apply_temperature(logits_BV, settings.temperature)
    return keep_min_p(keep_top_p(keep_top_k(logits_BV, settings.top_k), settings.top_p), settings.min_p)


# ---- the draw --------------------------------------------------------------------------------------------------------


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Token ids (B,): the first id at which the cumulative probability passes `uniform_B` (in [0, 1))."""
    wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1, dtype=wide)
    total_B1 = cumulative_BV[:, -1:].contiguous()
    ids_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None].to(total_B1) * total_B1, right=True)
    return torch.minimum(ids_B1, torch.searchsorted(cumulative_BV, total_B1)).squeeze(
        -1
    )  # u * total may round to total


def sample(logits_BV: Tensor, settings: SamplingSettings | Sequence[SamplingSettings], uniform_B: Tensor | None = None,
           seen_BV: Tensor | None = None) -> Tensor:
    """Choose the next token of each row -> ids (B,) int64.

    logits_BV   (B, V), any floating dtype
    settings    one for all rows, or one a row (rows with equal settings are handled together)
    uniform_B   (B,) in [0, 1), see `uniforms`; not needed where every row is greedy
    seen_BV     (B, V) bool, tokens that the repetition penalty concerns; not needed where it is 1

    Raises `NumericError` for NaN, `+inf` or a row without any finite logit.
    """
    if logits_BV.dtype in (torch.float16, torch.bfloat16):
        logits_BV = logits_BV.float()
    check_finite(logits_BV)
    if isinstance(settings, SamplingSettings):
        return _sample_alike(logits_BV, settings, uniform_B, seen_BV)
    groups: dict[SamplingSettings, list[int]] = {}
    for row, own in enumerate(settings):
        groups.setdefault(replace(own, seed=0), []).append(row)
    if len(groups) == 1:
        return _sample_alike(logits_BV, settings[0], uniform_B, seen_BV)
    ids_B = torch.empty(len(settings), dtype=torch.int64, device=logits_BV.device)
    for own, rows in groups.items():
        ids_B[rows] = _sample_alike(logits_BV[rows], own, None if uniform_B is None else uniform_B[rows],
                                    None if seen_BV is None else seen_BV[rows])
    return ids_B


def check_finite(logits_BV: Tensor) -> None:
    """Refuse rows that no token can be chosen from, naming them: the largest logit is NaN or infinite."""
    largest_B = logits_BV.amax(dim=-1)
    if not bool(torch.isfinite(largest_B).all()):
        row = int((~torch.isfinite(largest_B)).nonzero()[0])
        raise NumericError(
            f"the logits of row {row} are not finite: {int(logits_BV[row].isnan().sum())} NaN and "
            f"{int(logits_BV[row].isinf().sum())} infinite of {logits_BV.shape[-1]}",
            hint="the weights may hold NaN, or half precision overflowed: try the model in float32")


def _sample_alike(
    logits_BV: Tensor, settings: SamplingSettings, uniform_B: Tensor | None, seen_BV: Tensor | None
) -> Tensor:
    if settings.repetition_penalty != 1:
        assert seen_BV is not None, "a repetition penalty needs the tokens seen so far"
        logits_BV = penalise_repetition(logits_BV, seen_BV, settings.repetition_penalty)
        check_finite(logits_BV)
    if settings.greedy:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)  # so that no temperature overflows
    assert uniform_B is not None, "a draw needs its random numbers"
    short = _short_list(logits_BV, settings)
    if short is None:
        return draw(warp(logits_BV, settings), uniform_B)
    short_BK, ids_BK = short
    return ids_BK.gather(-1, draw(keep_min_p(short_BK, settings.min_p), uniform_B)[:, None]).squeeze(-1)


def _short_list(logits_BV: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor] | None:
    """Logits and ids (B, K), by id, of all that temperature, top-k and top-p leave; None where that is not certain."""
    vocabulary = logits_BV.shape[-1]
    by_count = settings.top_k > 0
    size = settings.top_k if by_count else SHORT_LIST
    if size > vocabulary // 4 or not (by_count or settings.top_p < 1):
        return None
    logits_BV = apply_temperature(logits_BV, settings.temperature)
    values_BK, ids_BK = logits_BV.topk(size + 1, dim=-1)  # largest first; the one too many shows a tie at the border
    if bool((values_BK[:, -1] == values_BK[:, -2]).any()):
        return None
    values_BK, ids_BK = values_BK[:, :-1], ids_BK[:, :-1]
    if settings.top_p < 1:
        whole_B1 = (values_BK if by_count else logits_BV).logsumexp(dim=-1, keepdim=True)
        probs_BK = (values_BK - whole_B1).exp()
        if not by_count and bool((probs_BK.sum(dim=-1) <= settings.top_p).any()):
            return None
        # A token goes when it and all less probable ones hold at most 1 - p, that is, when the more probable hold p.
        drop_BK = probs_BK.cumsum(dim=-1) - probs_BK >= settings.top_p
        drop_BK[:, 0] = False
        values_BK = values_BK.masked_fill(drop_BK, NEGATIVE_INFINITY)
    ids_BK, order_BK = ids_BK.sort(dim=-1)
    return values_BK.gather(-1, order_BK), ids_BK

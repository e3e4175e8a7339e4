"""Beam search: the likeliest whole texts among those that a few ways at once lead to (`num_beams`).

Decisions:
- Steps, scores and the moment to stop are transformers': so many candidates that enough go on where all best ones end, a
  finished text's score divided by its length to the power of `length_penalty`, and `early_stopping` as there (True, False,
  `never`).
- A prompt is searched by itself, so that its texts are the same in any company. The beams are the batch.
- Scores are sums of logarithms in float32, as there; "cannot be" is -1e9 for a beam and minus infinity for a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from threefold.errors import UsageError
from threefold.generation.engine import SPARE_ROOM, Request
from threefold.generation.reading import LanguageModel, reader
from threefold.generation.sampling import check_finite, penalise_repetition
from threefold.model.cache import Cache

NEVER = -1e9


@dataclass(frozen=True, slots=True)
class Beams:
    """How to search: `width` ways at once, `count` texts of them given back, the best first."""

    width: int = 1
    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    renormalise: bool = False  # what the rules leave of the probabilities


def beams_of(options: Mapping[str, Any], count: int) -> Beams:
    """The search that transformers' arguments ask for; raises `UsageError` for values that mean nothing."""
    width, early, penalty = options.get("num_beams", 1), options.get("early_stopping", False), options.get("length_penalty", 1.0)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise UsageError(f"`num_beams` is {width!r}, expected a whole number, 1 or more")
    if width > 1 and (options.get("do_sample") or count > width):
        raise UsageError(
            f"`num_beams` is {width}, with `do_sample` {bool(options.get('do_sample'))} and `num_return_sequences` {count}",
            hint="beams are searched and not drawn, and give at most as many texts as there are beams: do_sample=False or num_beams=1")
    if early not in (True, False, "never") or not isinstance(penalty, int | float):
        raise UsageError(f"`early_stopping` is {early!r} and `length_penalty` {penalty!r}",
                         hint="True, False or `never`, and a number")
    return Beams(width, count, float(penalty), early, bool(options.get("renormalize_logits")))


@torch.inference_mode()
def beam_search(model: LanguageModel, request: Request, beams: Beams) -> list[list[int]]:
    """The new ids of the best texts, `beams.count` of them; a text's end is part of it. The model runs in the mode it is in."""
    side, width, most = reader(model), beams.width, request.max_new_tokens
    side.check(len(request.prompt), most)
    opening = side.opening(request.prompt, request.start)
    side.read([request.prompt])
    cache = Cache(len(opening) + min(SPARE_ROOM, most))
    texts: list[list[int]] = [[] for _ in range(width)]
    scores_B = torch.tensor([0.0] + [NEVER] * (width - 1), device=model.device)  # at first all beams are the same
    done: list[list[int]] = [[] for _ in range(width)]
    done_B, closed_B = torch.full_like(scores_B, NEVER), torch.zeros_like(scores_B, dtype=torch.bool)
    candidates = max(2, 1 + len(request.eos)) * width
    for length in range(1, most + 1):
        if length == 1:
            logits_BV = side.logits(torch.tensor([opening], device=model.device), None, None, cache).expand(width, -1)
            rows = torch.zeros(width, dtype=torch.int64, device=model.device)
            cache = cache.fork(rows)
            side.keep(rows)
        elif side.turn == len(opening) + length - 2:  # all of the text is rotated by other waves from here on
            cache = Cache(len(opening) + min(SPARE_ROOM, most))
            logits_BV = side.logits(torch.tensor([[*opening, *text] for text in texts], device=model.device), None, None, cache)
        else:
            logits_BV = side.logits(torch.tensor([text[-1:] for text in texts], device=model.device), None, None, cache)
        chances_BV = _chances(logits_BV, texts, opening, request)
        if beams.renormalise:
            chances_BV = chances_BV.log_softmax(-1)
        best_K, at_K = (chances_BV + scores_B[:, None]).flatten().topk(min(candidates, chances_BV.numel()))
        beam_K, token_K = at_K // chances_BV.shape[1], at_K % chances_BV.shape[1]
        longer = [[*texts[beam], token] for beam, token in zip(beam_K.tolist(), token_K.tolist(), strict=True)]
        ends_K = torch.tensor([text[-1] in request.eos or length == most for text in longer], device=model.device)

        # Of the candidates that end, those among the best take the places of worse finished texts.
        may_close_K = ends_K & (torch.arange(len(longer), device=model.device) < width)
        closing_K = best_K / length**beams.length_penalty + NEVER * (~may_close_K).float()
        done_B, place_B = torch.cat([done_B, closing_K]).topk(width)
        done = [[*done, *longer][place] for place in place_B.tolist()]
        closed_B = torch.cat([closed_B, may_close_K])[place_B]

        # The best of those that do not end go on.
        scores_K = best_K + ends_K.float() * NEVER
        scores_B, going_B = scores_K.topk(width)
        texts = [longer[place] for place in going_B.tolist()]
        reach = most if beams.early_stopping == "never" and beams.length_penalty > 0 else length
        worst_B = torch.where(closed_B, done_B.min(), NEVER)
        hopeful = bool((scores_B[0] / reach**beams.length_penalty > worst_B).any())
        if not hopeful or bool(ends_K.all()) or (bool(closed_B.all()) and beams.early_stopping is True):
            break
        cache = cache.fork(beam_K[going_B])
    return done[:beams.count]


def _chances(logits_BV: Tensor, texts: list[list[int]], opening: tuple[int, ...], request: Request) -> Tensor:
    """Logarithms of probabilities (B, V), with what the request's rules leave of them."""
    check_finite(logits_BV)
    chances_BV = logits_BV.float().log_softmax(-1)
    if request.settings.repetition_penalty != 1:
        seen_BV = torch.zeros_like(chances_BV, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen_BV[row, [*opening, *text]] = True
        chances_BV = penalise_repetition(chances_BV, seen_BV, request.settings.repetition_penalty)
    return torch.stack([request.rules.apply(row, [*opening, *text], len(text), request.max_new_tokens, request.eos)
                        for row, text in zip(chances_BV, texts, strict=True)])

"""What a model says while it learns: a text for people to look at, always the same question.

Decision: a sample never ends a run. Where the question and an answer do not fit, there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from threefold.data.shards import Shards
from threefold.errors import UsageError
from threefold.evaluation.loss import evaluating
from threefold.generation.engine import generate
from threefold.model.base import Model
from threefold.model.language import CausalLM, MaskedLM
from threefold.text.tokenizer import Tokenizer

ASKED = 12  # tokens of the text that a sample begins with
HIDDEN = 4  # of an encoder's text every so many tokens one is hidden


def sampler(model: Model, tokenizer: Tokenizer, shards: Shards, context: int, pieces: Sequence[bytes | None]) -> Callable[[], list[str]]:
    """What gives a sample of a model: a decoder goes on from the first words of the held-out text, an encoder fills masks in
    them. Others say nothing."""
    if isinstance(model, CausalLM):
        return functools.partial(_continued, model, tokenizer, context, tokenizer.decode(_opening(shards, pieces)[:ASKED]))
    if isinstance(model, MaskedLM) and None not in (tokenizer.mask_id, tokenizer.token_id("cls"), tokenizer.token_id("sep")):
        return functools.partial(_filled, model, tokenizer, _opening(shards, pieces)[:max(0, context - 2)])
    return list


def _opening(shards: Shards, pieces: Sequence[bytes | None]) -> list[int]:
    """The first ids of the held-out text that stand for text: what the model has not seen."""
    stream = next(found for source in range(len(shards.sources)) if len(found := shards.stream("validation", source)))
    return [int(i) for i in stream.take(np.arange(min(len(stream), 2 * ASKED))) if pieces[int(i)] is not None]


def _continued(model: CausalLM, tokenizer: Tokenizer, context: int, opening: str) -> list[str]:
    """The opening and how the model continues it, always with the same seed, so that samples of one run can be
    compared."""
    try:
        room = min(context - len(tokenizer.encode(opening)) - 2, 96)
        texts = generate(model, tokenizer, [opening], max_new_tokens=room, temperature=0.8, top_p=0.95, seed=0)
    except UsageError:
        return []
    return [opening + text for text in texts]


def _filled(model: MaskedLM, tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The opening with what the model puts in place of every fourth token, each in brackets."""
    cls, sep, mask = tokenizer.token_id("cls"), tokenizer.token_id("sep"), tokenizer.mask_id
    assert cls is not None and sep is not None and mask is not None
    hidden = list(range(HIDDEN - 1, len(ids), HIDDEN))
    if not hidden:
        return []
    asked = [mask if place in hidden else i for place, i in enumerate(ids)]
    with evaluating(model):
        best = model(torch.tensor([[cls, *asked, sep]], device=model.device))
    logits = best.logits if best.logits is not None else best.prediction_logits
    answer = logits[0, 1:-1].argmax(-1).tolist()
    words = [f"[{tokenizer.decode([answer[place]]).strip()}]" if place in hidden else tokenizer.decode([i]) for place, i in enumerate(ids)]
    return [" ".join(words)]

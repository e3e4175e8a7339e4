"""A small vocabulary, shards of it, and a row for each objective and family that go together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.data.helpers import shards_of
from threefold.config import Recipe
from threefold.data.loader import Loader
from threefold.data.shards import Shards
from threefold.model.base import Model
from threefold.model.build import scaled
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES
from threefold.objectives import OBJECTIVES, Causal, Masked, Objective, Prefix, Replaced, Seq2Seq, Span, Vocabulary

SIZE, CONTEXT, SPECIAL, SENTINELS = 97, 24, 6, 20
PAD, CLS, SEP, MASK, EOS, UNK = range(SPECIAL)


def vocabulary(*, sentinels: int = SENTINELS) -> Vocabulary:
    """97 ids: 6 special ones, 20 sentinels at the end; every third id begins a word, every tenth ends a sentence."""
    ids = np.arange(SIZE)
    special = (ids < SPECIAL) | (ids >= SIZE - SENTINELS)
    return Vocabulary(SIZE, CLS, SEP, MASK, PAD, EOS, ids[SIZE - SENTINELS:][:sentinels], special, (ids % 3 == 0) | special,
                      (ids % 10 == 0) & ~special, str)


def text_shards(documents: int = 3, length: int = 150, seed: int = 0, longer: int = 7) -> Shards:
    """Documents of plain ids, each longer than the one before it."""
    rng = np.random.default_rng(seed)
    return shards_of([rng.integers(SPECIAL, SIZE - SENTINELS, size=length + longer * n).tolist() for n in range(documents)])


@dataclass(frozen=True)
class Way:
    """A way to learn: a recipe's options, and the objective that they give for a vocabulary and a head."""

    options: dict[str, Any]
    make: Callable[[Vocabulary, str], Objective]


@dataclass(frozen=True)
class Pair:
    """An objective and a family that learns by it."""

    family: str
    make: Callable[[Vocabulary], Objective]


def _way(objective: str, make: Callable[[Vocabulary, str], Objective], **options: Any) -> Way:
    return Way({"train.objective": objective, **{f"objective.{name}": value for name, value in options.items()}}, make)


WAYS: dict[str, Way] = {
    "causal": _way("causal", lambda words, task: Causal()),
    "masked": _way("masked", lambda words, task: Masked(words, seed=0)),
    "words": _way("masked", lambda words, task: Masked(words, seed=0, whole_words=True), whole_words=True),
    "pairs": _way("masked", lambda words, task: Masked(words, seed=0, next_sentence=True), next_sentence=True),
    "replaced": _way("replaced", lambda words, task: Replaced(words, seed=0)),
    "span": _way("span", lambda words, task: Span(words, seed=0)),
    "seq2seq": _way("seq2seq", lambda words, task: Seq2Seq(words, smoothing=0.1)),
    "prefix": _way("prefix", lambda words, task: Prefix(words, seed=0, task=task)),
}


def _pairs() -> Iterator[tuple[str, Pair]]:
    """Every family under every way for which it has a head."""
    for name, way in WAYS.items():
        recipe = Recipe().override(way.options)
        for family, row in FAMILIES.items():
            task = OBJECTIVES[recipe.train.objective].task(recipe, row)
            if task in row.heads:
                yield f"{name}-{family}", Pair(family, functools.partial(_made, way, task))


def _made(way: Way, task: str, words: Vocabulary) -> Objective:
    return way.make(words, task)


PAIRS = dict(_pairs())


def config_of(family: str, **changes: object) -> TransformerConfig:
    """A tiny configuration over the vocabulary."""
    config = scaled(family, width=32, depth=1, vocab_size=SIZE, context=CONTEXT)
    ids: dict[str, object] = {"pad_token_id": PAD, "eos_token_id": EOS}
    if config.is_encoder_decoder:
        ids["decoder_start_token_id"] = PAD
    if family == "roberta":
        ids["position_offset"] = PAD + 1  # its positions begin behind the id that pads
    if family == "gpt3":
        ids["attention_windows"] = (7,)  # of its one layer
    return dataclasses.replace(config, **{**ids, **changes})  # type: ignore[arg-type]


def learner(pair: Pair, *, dtype: torch.dtype = torch.float32, **changes: object) -> tuple[Model, Objective]:
    """A random model and its objective."""
    objective = pair.make(vocabulary())
    model = objective.build(config_of(pair.family, **changes), 0).to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2 + (p.ndim == 1))
    return model.train(), objective


def loader_of(objective: Objective, rows: int = 6, seed: int = 0, shards: Shards | None = None) -> Loader:
    """A loader of the objective's examples."""
    return Loader(shards or text_shards(), objective.span(CONTEXT), rows, seed, example=objective.example)

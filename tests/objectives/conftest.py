"""A small vocabulary, shards of it, and a row for each objective and family that go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.data.helpers import shards_of
from threefold.data.loader import Loader
from threefold.data.shards import Shards
from threefold.model.base import Model
from threefold.model.build import scaled
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES
from threefold.objectives import Causal, Masked, Objective, Prefix, Replaced, Seq2Seq, Span, Vocabulary

SIZE, CONTEXT, SPECIAL, SENTINELS = 97, 24, 6, 20
PAD, CLS, SEP, MASK, EOS, UNK = range(SPECIAL)


def vocabulary(*, sentinels: int = SENTINELS) -> Vocabulary:
    """97 ids: 6 special ones, 20 sentinels at the end; every third id begins a word, every tenth ends a sentence."""
    ids = np.arange(SIZE)
    special = (ids < SPECIAL) | (ids >= SIZE - SENTINELS)
    return Vocabulary(SIZE, CLS, SEP, MASK, PAD, EOS, ids[SIZE - SENTINELS:][:sentinels], special, (ids % 3 == 0) | special,
                      (ids % 10 == 0) & ~special, str)


def text_shards(documents: int = 3, length: int = 150, seed: int = 0) -> Shards:
    """Documents of plain ids."""
    rng = np.random.default_rng(seed)
    return shards_of([rng.integers(SPECIAL, SIZE - SENTINELS, size=length + 7 * n).tolist() for n in range(documents)])


@dataclass(frozen=True)
class Pair:
    """An objective and a family that learns by it."""

    family: str
    make: Callable[[Vocabulary], Objective]


CAUSAL = {f"causal-{name}": Pair(name, lambda words: Causal()) for name, family in FAMILIES.items() if "causal" in family.heads}
MASKED = {f"masked-{name}": Pair(name, lambda words: Masked(words, seed=0)) for name, family in FAMILIES.items() if "masked" in family.heads}
PAIRS: dict[str, Pair] = {
    **CAUSAL,
    **MASKED,
    "words-bert": Pair("bert", lambda words: Masked(words, seed=0, whole_words=True)),
    "pairs-bert": Pair("bert", lambda words: Masked(words, seed=0, next_sentence=True)),
    "replaced-electra": Pair("electra", lambda words: Replaced(words, seed=0)),
    "span-t5": Pair("t5", lambda words: Span(words, seed=0)),
    "span-transformer": Pair("transformer", lambda words: Span(words, seed=0)),
    "seq2seq-transformer": Pair("transformer", lambda words: Seq2Seq(words, smoothing=0.1)),
    "seq2seq-t5": Pair("t5", lambda words: Seq2Seq(words, smoothing=0.1)),
    "prefix-llama": Pair("llama", lambda words: Prefix(words, seed=0, task="causal")),
    "prefix-t5": Pair("t5", lambda words: Prefix(words, seed=0, task="seq2seq")),
}


def config_of(family: str, **changes: object) -> TransformerConfig:
    """A tiny configuration over the vocabulary."""
    config = scaled(family, width=32, depth=1, vocab_size=SIZE, context=CONTEXT)
    ids: dict[str, object] = {"pad_token_id": PAD, "eos_token_id": EOS}
    if config.is_encoder_decoder:
        ids["decoder_start_token_id"] = PAD
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

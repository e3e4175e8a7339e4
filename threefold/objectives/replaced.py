"""Tell which tokens were replaced (ELECTRA, arXiv 2003.10555): a small generator fills masked places, and a discriminator
says for each token whether it is the one that stood there.

Decisions:
- Generator and discriminator share the token embedding and train together: loss = generator + 50 discriminator.
- What the generator draws is a function of its probabilities and of one number a place, which comes with the example: a
  batch that is computed again, or in other pieces, is drawn the same.
- The result is the discriminator; the generator lies beside it.
- A quarter of the width is what the paper found best for its smallest discriminator, after days. In minutes a discriminator of that width
  or less does not catch up with such a generator (docs/log.md): it gets one of an eighth, with two heads at least, one for each side, and
  a quarter of the layers, which learns as much in the same time and leaves more of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from threefold.data.loader import IGNORED, Batch
from threefold.model.base import Model
from threefold.model.build import build_model
from threefold.model.classifiers import Discriminator, replaced_sum
from threefold.model.config import TransformerConfig
from threefold.model.grow import resized
from threefold.model.language import MaskedLM
from threefold.model.weights import load_model
from threefold.objectives.masked import framed_rows, hide
from threefold.objectives.term import More, Objective, Term, labelled, noise_of
from threefold.objectives.vocabulary import Vocabulary

COEFFICIENT = 50.0  # of the discriminator's loss
GENERATOR, WIDE = 0.25, 256  # of the discriminator's width; up to this width half of that, and so much of the layers
NARROWEST = 16  # of its heads: with 12 channels none found its neighbour (docs/log.md)


class Duel(Model):
    """A generator and a discriminator over one token embedding."""

    task = "replaced"

    def __init__(self, generator: MaskedLM, discriminator: Discriminator) -> None:
        super().__init__(discriminator.transformer, discriminator.config)
        generator.transformer.embed = discriminator.transformer.embed
        self.generator, self.discriminator = generator, discriminator

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of both."""
        return self.transformer.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.generator.compute_dtype = self.discriminator.compute_dtype = dtype


class Replaced(Objective):
    """Terms `generator`, weight: masked tokens, and `discriminator`, weight: tokens that are no padding."""

    name = "replaced"
    frames = True
    task = "replaced"

    def __init__(self, vocabulary: Vocabulary, *, seed: int, share: float = 0.15, whole_words: bool = False) -> None:
        self.cls, self.sep, self.mask = vocabulary.need("replaced", "cls", "sep", "mask")
        self.vocabulary, self.seed, self.share, self.whole_words = vocabulary, seed, share, whole_words
        self.plain = np.flatnonzero(~vocabulary.special)

    def span(self, context: int) -> int:
        """The context without the tokens that frame the text."""
        return context - 2

    def example(self, rows: Batch, more: More) -> Batch:
        """Framed and hidden, with a number between 0 and 1 for each place that a token may be drawn for."""
        framed = framed_rows(rows, self.cls, self.sep, self.vocabulary.pad)
        ids, labels = hide(framed.input_ids.numpy(), rows.samples, self.vocabulary, self.mask, self.plain, self.seed,
                           share=self.share, whole_words=self.whole_words)
        draws = np.stack([noise_of(self.seed, "drawn", sample).random(ids.shape[1]) for sample in rows.samples]).astype(np.float32)
        return dataclasses.replace(framed, input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels), draws=torch.from_numpy(draws))

    def build(self, config: TransformerConfig, seed: int) -> Model:
        """A discriminator of the configuration and a smaller generator."""
        generator = build_model(_smaller(config), seed + 1, task="masked")
        discriminator = build_model(config, seed, task="replaced")
        assert isinstance(generator, MaskedLM) and isinstance(discriminator, Discriminator)
        return Duel(generator, discriminator)

    def load(self, folder: Path, *, vocab_size: int, context: int) -> Model:
        """The discriminator in the folder, and the generator beside it or a new one."""
        size = {"vocab_size": vocab_size, "context": context}
        discriminator = resized(load_model(folder, torch.float32, task="replaced"), **size)
        beside = folder.parent / "generator"
        if (beside / "config.json").is_file():
            generator = resized(load_model(beside, torch.float32, task="masked"), **size)
        else:
            generator = build_model(_smaller(discriminator.config), 1, task="masked")
        assert isinstance(generator, MaskedLM) and isinstance(discriminator, Discriminator)
        duel = Duel(generator, discriminator)
        duel.notes = discriminator.notes
        return duel

    def results(self, model: Model) -> dict[str, Model]:
        """The discriminator, and the generator beside it."""
        assert isinstance(model, Duel)
        return {"model": model.discriminator, "generator": model.generator}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Masked tokens; tokens that are no padding."""
        real = batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
        return {"generator": labelled(batch), "discriminator": float(real)}

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sums of negative log-likelihoods in nats, in float32 or wider."""
        assert isinstance(model, Duel)
        weights = self.weights(batch)
        more = {"attention_mask": batch.attention_mask, **context}
        total, _, states = model.generator.loss_rows(batch.input_ids, batch.labels, batch.positions, batch.documents, **more)
        logits, judged, labels = self.judged(model, batch, states, **more)
        return [Term("generator", total, weights["generator"]),
                Term("discriminator", replaced_sum(logits, labels, judged), weights["discriminator"], COEFFICIENT)]

    def judged(self, model: Duel, batch: Batch, states: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The discriminator's logits (B, T) on what the generator makes of a batch, the places that count, and where a token
        was replaced."""
        corrupted, labels = self._corrupted(model.generator, batch, states)
        hidden = model.discriminator.hidden(corrupted, batch.positions, batch.documents, **more)
        judged = torch.ones_like(labels, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask != 0
        return model.discriminator.head(hidden)[..., 0], judged, labels

    @torch.no_grad()
    def _corrupted(self, generator: MaskedLM, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor]:
        """The ids with a drawn token at each masked place, and 1 where it is not the original."""
        assert batch.draws is not None
        hiding = batch.labels != IGNORED
        logits = generator.lm_head(states[hiding].detach(), generator.transformer.embed.weight).float()
        sums = logits.softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(sums, (batch.draws[hiding] * sums[:, -1])[:, None]).squeeze(1)
        corrupted = batch.input_ids.clone()
        corrupted[hiding] = drawn.clamp(max=logits.shape[-1] - 1)
        original = batch.labels.where(hiding, batch.input_ids)
        return corrupted, (corrupted != original).long()


def _smaller(config: TransformerConfig) -> TransformerConfig:
    """The generator's configuration: less wide, and of a small discriminator less deep, over the same embedding."""
    small, layers = config.hidden_size <= WIDE, config.num_encoder_layers
    share = GENERATOR / 2 if small else GENERATOR
    heads = max(2, round(config.num_attention_heads * share))
    head_dim = min(max(NARROWEST, int(config.hidden_size * share) // heads), max(8, config.hidden_size // heads))
    width = heads * head_dim
    return dataclasses.replace(config, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim,
                               intermediate_size=4 * width, num_encoder_layers=max(1, round(GENERATOR * layers)) if small else layers)

"""Objectives: how a row becomes an example, and a batch a loss. One small file each; `term` holds what they share.

    term         Term(name, sum, weight, coefficient), the abstract Objective
    vocabulary   what an objective must know of a vocabulary
    causal       predict the next token                                    decoders
    masked       predict hidden tokens, and whether a text follows         encoders
    replaced     tell which tokens were replaced                           ELECTRA
    span         restore stretches that were taken out                     encoder-decoders
    prefix       go on from a beginning; `seq2seq` with label smoothing    decoders and encoder-decoders
    heldout      the loss on held-out text, for all but causal
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from threefold.config import Recipe
from threefold.errors import ConfigError, did_you_mean
from threefold.model.families.family import Family
from threefold.objectives.causal import Causal
from threefold.objectives.masked import Masked
from threefold.objectives.prefix import Prefix, Seq2Seq
from threefold.objectives.replaced import Replaced
from threefold.objectives.span import Span
from threefold.objectives.term import Objective, Term
from threefold.objectives.vocabulary import SENTINEL, Vocabulary
from threefold.text.tokenizer import Tokenizer

# As RoBERTa's: what frames a document is what frames a row, so that nothing begins or ends twice.
ENCODER = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "mask": "<mask>"}


@dataclass(frozen=True)
class Kind:
    """A row of the table. `family` is trained unless another is asked for; `make` gives the objective for a recipe, a
    tokenizer and the head that learns; `roles` are parts that a new tokenizer must have, `special` further tokens."""

    family: str
    task: Callable[[Recipe, Family], str]
    make: Callable[[Recipe, Tokenizer, str], Objective]
    roles: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    rate: float = 0.015  # AdamW's beside Muon, as runs found it (docs/log.md)


OBJECTIVES: dict[str, Kind] = {
    "causal": Kind("qwen3", lambda recipe, family: "causal", lambda recipe, tokenizer, task: Causal()),
    "masked": Kind(
        "bert", lambda recipe, family: "pretraining" if recipe.objective.next_sentence else "masked",
        lambda recipe, tokenizer, task: Masked(
            Vocabulary.of(tokenizer), seed=recipe.train.seed, share=recipe.objective.hidden_share or 0.3, whole_words=recipe.objective.whole_words,
            next_sentence=recipe.objective.next_sentence), roles=ENCODER, rate=0.008),
    "replaced": Kind(
        "electra", lambda recipe, family: "replaced",
        lambda recipe, tokenizer, task: Replaced(
            Vocabulary.of(tokenizer), seed=recipe.train.seed, share=recipe.objective.hidden_share or 0.15, whole_words=recipe.objective.whole_words),
        roles=ENCODER, rate=0.004),
    "span": Kind("t5", lambda recipe, family: "seq2seq", lambda recipe, tokenizer, task: Span(Vocabulary.of(tokenizer), seed=recipe.train.seed),
                 special=tuple(SENTINEL.format(n) for n in range(100)), rate=0.02),
    "prefix": Kind("qwen3", lambda recipe, family: "seq2seq" if "seq2seq" in family.heads else "causal",
                   lambda recipe, tokenizer, task: Prefix(Vocabulary.of(tokenizer), seed=recipe.train.seed, task=task)),
    "seq2seq": Kind("transformer", lambda recipe, family: "seq2seq",
                    lambda recipe, tokenizer, task: Seq2Seq(Vocabulary.of(tokenizer), smoothing=recipe.objective.smoothing)),
}


def kind_of(name: str) -> Kind:
    """The row of that name; raises `ConfigError` with the nearest known one."""
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective `{name}`", hint=did_you_mean(name, OBJECTIVES))
    return OBJECTIVES[name]


def task_of(recipe: Recipe, family: Family) -> str:
    """The head that a recipe trains; raises `ConfigError` where the family has none for its objective."""
    task = kind_of(recipe.train.objective).task(recipe, family)
    if task not in family.heads:
        raise ConfigError(f"the objective `{recipe.train.objective}` needs a head for `{task}`, and a `{family.name}` model has "
                          f"none", hint=f"such as --family {kind_of(recipe.train.objective).family}")
    return task


__all__ = ["OBJECTIVES", "Causal", "Kind", "Masked", "Objective", "Prefix", "Replaced", "Seq2Seq", "Span", "Term", "Vocabulary",
           "kind_of", "task_of"]

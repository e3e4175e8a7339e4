"""What can be refused before the data is read and anything is written: a real run and a dry run ask the same questions.

Decisions:
- An option that would be passed over is refused by name, here, where data, model and tokenizer are first seen together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from threefold import hub
from threefold.config import Recipe
from threefold.config.recipe import VOCAB_SIZE
from threefold.data.shards import is_prepared
from threefold.errors import ConfigError
from threefold.model.build import sized
from threefold.model.config import TransformerConfig
from threefold.model.families import family_of
from threefold.model.grow import can_grow
from threefold.model.weights import load_config
from threefold.objectives import kind_of, task_of
from threefold.text.sources import expand, parse_source
from threefold.text.tokenizer import KINDS, Tokenizer

MOST_SOURCES = 500  # each has shards, shares and a place in the manifest of its own


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what its own fields imply: no limit means until converged, no family that of the objective."""
    if task := recipe.finetune.task:
        verb = "align" if task in ("reward", "dpo") else "finetune"
        raise ConfigError(f"the recipe learns rows (`finetune.task` is `{task}`), and pretraining learns running text",
                          hint=f"threefold {verb} --recipe FILE, or threefold.train in Python")
    t = recipe.train
    kind = kind_of(t.objective)
    if recipe.model.family == "auto" and not recipe.model.from_model:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, family=kind.family))
    if not recipe.data.paths:
        raise ConfigError("no data: `data.paths` is empty", hint="name files, folders or `python`: --data PATH")
    if t.steps is None and t.tokens is None and t.budget is None and t.until is None:
        t = dataclasses.replace(t, until="converged")
        recipe = dataclasses.replace(recipe, train=t)
    if t.steps is None and t.tokens is None and t.budget is None and t.schedule != "wsd":
        raise ConfigError(f"`train.schedule` {t.schedule} needs to know where the run ends, and `until converged` does not",
                          hint="say it with --steps, --tokens or --budget, or leave the schedule `wsd`")
    return recipe


@dataclass(frozen=True)
class Checked:
    """What the check has found, so that the run does not look for it again."""

    files: dict[str, list[str]]       # of each source; of a run that has its data, none
    origin: Path | None               # the folder of the model that is continued
    tokenizer: Tokenizer | None       # the one that is asked for by the name of a model
    prepared: bool                    # whether the data is a folder that `threefold data prepare` made


def check(recipe: Recipe, *, has_data: bool = False) -> Checked:
    """Refuse what can be refused without reading the data or writing anything. A run that `has_data` of its own goes on
    without its sources.

    Raises a ThreefoldError for sources, a family, size, objective, tokenizer or model that are not there or do not hold.
    """
    m, asked, prepared = recipe.model, recipe.tokenizer.kind_or_path, _is_prepared(recipe)
    if len(recipe.data.paths) > MOST_SOURCES:
        raise ConfigError(f"{len(recipe.data.paths):,} sources, and a run keeps account of at most {MOST_SOURCES:,}",
                          hint="name the folder, or put the pattern in quotes, so that it is one source: --data 'corpus/*.txt'")
    if has_data or prepared:
        found = {path: [path] if prepared else [] for path in recipe.data.paths}
    else:
        found = {path: [str(p) for p in expand(parse_source(path).path)] for path in recipe.data.paths}
    if m.family != "auto":
        task_of(recipe, family_of(m.family))
    origin = hub.resolve(m.from_model, needs=("model", "tokenizer")) if m.from_model else None
    if origin is not None:
        family, config = load_config(origin)
        if m.family not in ("auto", family.name):
            raise ConfigError(f"`model.family` is {m.family}, and `{m.from_model}` is a {family.name}",
                              hint="leave it out: a model that is continued keeps its family")
        task_of(recipe, family)
        fits(recipe, config)
    elif m.size != "auto":
        sized(m.family, m.size, vocab_size=recipe.tokenizer.vocab_size, context=m.context or None)
    named = None if asked in (*KINDS, "auto") else Tokenizer.load(hub.resolve(asked, needs=("tokenizer",)))
    if named is not None and recipe.tokenizer.vocab_size != VOCAB_SIZE:
        raise ConfigError(f"`tokenizer.vocab_size` is {recipe.tokenizer.vocab_size:,}, and the tokenizer of `{asked}` has "
                          f"{named.vocab_size:,} pieces already", hint="leave it out, or train a new tokenizer by its kind")
    return Checked(found, origin, named, prepared)


def fits(recipe: Recipe, config: TransformerConfig) -> None:
    """Raise ConfigError where the context that is asked for is longer than that of the model that is started from, and is not
    to be had: positions are a learned table or scaled, or the model stays as it is under an adapter."""
    longest = config.max_position_embeddings
    if recipe.model.context > longest and (recipe.lora.rank or not can_grow(config)):
        why = " and stays as it is under an adapter" if recipe.lora.rank and can_grow(config) else ""
        raise ConfigError(f"`model.context` is {recipe.model.context:,}, and `{recipe.model.from_model}` was made for {longest:,}{why}",
                          hint=f"use at most {longest:,}")


def _is_prepared(recipe: Recipe) -> bool:
    """Whether the data is a folder that `threefold data prepare` made; raises ConfigError for options that would then
    be passed over."""
    if len(recipe.data.paths) != 1 or not is_prepared(Path(recipe.data.paths[0])):
        return False
    fixed = ("data.columns", "data.val_fraction", "data.near_duplicates", "data.skip_problems", "tokenizer.vocab_size", "model.grow_vocab")
    now, usual = recipe.flat(), Recipe().flat()
    asked = [key for key in fixed if now[key] != usual[key]]
    if now["tokenizer.kind_or_path"] in KINDS:
        asked.append("tokenizer.kind_or_path")
    if asked:
        raise ConfigError(f"`{recipe.data.paths[0]}` is prepared, so {', '.join(f'`{key}`' for key in asked)} can no longer be chosen",
                          hint="leave it out, or prepare the text again")
    return True

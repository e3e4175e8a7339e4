"""Recipes: frozen dataclasses <-> TOML <-> `--section.option value`.

Decisions:
- `recipe.py` holds the only list of options. Help, types, ranges, choices and what may change on resume are metadata of
  the field; the reader, the writer, the flags and the difference are driven by it.
- Keys are strict at any depth. Every problem of a recipe is found and told at once, with file and line.
- TOML knows no null: an option that may be absent is None and is left out of the file. Where 0 means "chosen for you",
  the file says `"auto"`.
- A quoted number is no number, except with a unit (`"25M"`, `"3min"`). On the command line everything is words.
- Recipes are bounded (size, depth, problems told), because they are passed around like any other file.
- A recipe of an older release is migrated by a table, and each change is named in a warning.
"""

from threefold.config.leaf import Leaf
from threefold.config.recipe import (
    DataOptions,
    ModelOptions,
    Recipe,
    TokenizerOptions,
    TrainOptions,
    leaves,
    nearest,
    safe_keys,
    sections,
)
from threefold.config.toml import FORMAT_VERSION, Change, difference, dump, load_recipe, parse_recipe
from threefold.config.words import count_in, parse_count, parse_duration

__all__ = ["FORMAT_VERSION", "Change", "DataOptions", "Leaf", "ModelOptions", "Recipe", "TokenizerOptions",
           "TrainOptions", "count_in", "difference", "dump", "leaves", "load_recipe", "nearest", "parse_count",
           "parse_duration", "parse_recipe", "safe_keys", "sections"]

"""Recipes in files: strict to read, complete to write, migrated when older."""

from __future__ import annotations

import functools
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.config.lines import key_lines
from threefold.config.recipe import MAX_PROBLEMS, Problems, Recipe, build, checked, leaves, nearest, sections
from threefold.config.words import quote
from threefold.errors import ConfigError

FORMAT_VERSION = 2
MAX_BYTES = 256 * 1024
MAX_DEPTH = 8

# {version: ((old key, new key or None where gone, why), ...)}: from files of that version to the next. Append only.
MIGRATIONS: dict[int, tuple[tuple[str, str | None, str], ...]] = {
    1: (("train.sample_every", None, "samples are written with each evaluation, see `train.eval_every`"),),
}

Warn = Callable[[str], None]


def load_recipe(path: str | Path, *, warn: Warn | None = None) -> Recipe:
    """Read a recipe. `warn` is told each change that an older file needed (the `warnings` module otherwise).

    Raises `ConfigError`: not readable, not TOML, too large, or every unknown key and wrong value, by file and line.
    """
    return parse_recipe(read_text(path, "recipe"), str(path), warn=warn)


def read_text(path: str | Path, what: str) -> str:
    """The text of a small file that is a `what` (recipe, prompt). Raises `ConfigError`: not readable, too large, not UTF-8."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} `{path}`: {(error.strerror or str(error)).lower()}",
                          hint=f"list the {what}s that come along: threefold {what}s") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"`{path}` is larger than a {what} may be: {MAX_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"`{path}` is no text: byte {error.start:,} is not UTF-8") from error


def parse_recipe(text: str, name: str = "recipe.toml", *, warn: Warn | None = None) -> Recipe:
    """A recipe from its TOML text; `name` stands in messages. Raises `ConfigError` as `load_recipe` does."""
    text = text.replace("\r\n", "\n")
    table = parse_table(text, name)
    version = table.pop("format_version", FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(f"`{name}` has `format_version` {quote(version)}, this threefold reads 1 to {FORMAT_VERSION}",
                          hint="a newer release may have written it: pip install -U threefold")
    lines = key_lines(text)
    values, origins = {}, {}
    for keys, value in _flatten(table):
        key = ".".join(keys)
        values[key], origins[key] = value, f"{name}:{lines.get(keys, 1)}: "
    for old, new, why in migrate(values, version):
        origins[new or old] = origins.pop(old)
        change = f"{origins[new or old]}`{old}` is " + (f"now `{new}`" if new else "no longer used") + f": {why}"
        (warn or functools.partial(warnings.warn, stacklevel=3))(change)
    problems = Problems(f"`{name}`")
    for key in (key for key in values if key not in leaves()):
        near = nearest(key) if len(problems.found) < MAX_PROBLEMS else ""
        problems.add(f"{origins[key]}unknown key `{key[:200]}`", f"did you mean `{near}`?" if near else "")
    result = checked(values, problems, origins=origins)
    problems.raise_if_any()
    return build(result)


def migrate(values: dict[str, Any], version: int) -> list[tuple[str, str | None, str]]:
    """Bring dotted values of an older format up to date, in place; returns the changes: (old key, new key, why)."""
    made = []
    for step in range(version, FORMAT_VERSION):
        for old, new, why in MIGRATIONS.get(step, ()):
            if old in values:
                value = values.pop(old)
                if new:
                    values.setdefault(new, value)
                made.append((old, new, why))
    return made


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, every option of it, but those for rows where it learns from running text; `parse_recipe` gives an
    equal one back."""
    import tomli_w

    table: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for key, value in recipe.flat().items():
        leaf = leaves()[key]
        if leaf.section in ("finetune", "lora") and not recipe.finetune.task:
            continue
        if value is not None:
            part = table.setdefault(leaf.section, {})
            part[key.partition(".")[2]] = "auto" if leaf.auto and value == 0 else value
    return tomli_w.dumps(table)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A leaf that differs between two recipes; `safe` if a run may be resumed with it."""

    key: str
    old: Any
    new: Any
    safe: bool

    def __str__(self) -> str:
        return f"`{self.key}`: {quote(self.old)} -> {quote(self.new)}"


def difference(old: Recipe, new: Recipe) -> list[Change]:
    """What changed between two recipes, leaf by leaf."""
    before, after = old.flat(), new.flat()
    return [Change(key=key, old=before[key], new=after[key], safe=leaf.safe)
            for key, leaf in leaves().items() if before[key] != after[key]]


def parse_table(text: str, name: str, what: str = "recipe") -> dict[str, Any]:
    """The values in the TOML text of a `what`; raises `ConfigError` with the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = re.search(r"line (\d+)", place)
        number = line[1] if line else text.count("\n") + 1
        raise ConfigError(f"{name}:{number}: not TOML: {message[:1].lower()}{message[1:]}",
                          hint='texts stand in quotes: family = "qwen3"') from error
    except (RecursionError, ValueError) as error:  # brackets without end; a number of thousands of digits
        raise ConfigError(f"`{name}` is no {what}: nested too deeply, or a number too long to be one") from error


def _flatten(table: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a parsed file by their path; a table that is itself the value of an option is left whole."""
    todo: list[tuple[tuple[str, ...], Any]] = [((key,), value) for key, value in reversed(table.items())]
    while todo:
        keys, value = todo.pop()
        is_section = len(keys) == 1 and keys[0] in sections()
        whole = ".".join(keys) in leaves() or len(keys) >= MAX_DEPTH or not (value or is_section)
        if whole or not isinstance(value, dict):
            yield keys, value
        else:
            todo.extend(((*keys, key), inner) for key, inner in reversed(value.items()))

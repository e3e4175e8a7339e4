"""One option: what it takes, what it is for, and how its value is read from a file or from words."""

from __future__ import annotations

import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from threefold.config.words import parse_count, parse_duration

INT64 = 2**63 - 1  # the largest whole number that TOML promises


def option(default: Any, help: str, **meta: Any) -> Any:
    """A dataclass field that is an option. `meta` holds fields of `Leaf` (low, choices, auto, safe, ...), and `name`,
    the key in the file where that is no Python name."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help, **meta})
    return field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One option of a recipe."""

    key: str  # `train.steps`, as in the file and on the command line
    section: str  # `train`
    name: str  # `steps`, the Python name
    kind: str  # bool int float str words map
    optional: bool
    default: Any
    help: str
    low: float | None = None  # inclusive
    high: float | None = None
    above: float | None = None  # exclusive
    below: float | None = None
    choices: tuple[str, ...] = ()
    auto: bool = False  # 0 and `auto` mean: chosen for you
    duration: bool = False  # seconds
    safe: bool = False  # may change on resume: what was trained so far does not depend on it

    def expected(self) -> str:
        """What the option takes, in words."""
        if self.choices:
            return "one of " + ", ".join(f"`{choice}`" for choice in self.choices if choice)
        plain = {"bool": "true or false", "str": "text", "words": "a list of texts", "map": "a table of texts"}
        if self.kind in plain:
            return plain[self.kind]
        kind = "a whole number" if self.kind == "int" else "a number"
        words = ["a duration (`90s`, `3min`, `2h`)" if self.duration else kind]
        bounds = [f"of at least {self.low:,}" if self.low is not None else "",
                  f"above {self.above:,}" if self.above is not None else "",
                  f"at most {self.high:,}" if self.high is not None and self.high < INT64 else "",
                  f"below {self.below:,}" if self.below is not None else ""]
        words += [" and ".join(filter(None, bounds))] if any(bounds) else []
        return " ".join(words) + (", or `auto`" if self.auto else "")

    def read(self, value: Any, *, words: bool = False) -> Any:
        """The value in its own type; with `words`, a text may stand for a number, a list, a table or `none`.

        Raises ValueError, OverflowError or ConfigError when it does not hold; the caller has the words for it.
        """
        if value is None or (words and value == "none" and (self.optional or self.kind != "str")):
            if self.optional:
                return None
            raise ValueError("absent")
        if isinstance(value, str):
            value.encode()  # a lone surrogate cannot be written down
            value = self._from_text(value, words)
        value = _READERS[self.kind](value)
        if self.kind in ("int", "float"):
            self._check_range(value)
        elif (self.choices and value not in self.choices) or (value == "" != self.default):
            raise ValueError("choice")
        return value

    def _check_range(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError("not finite")
        if self.auto and value == 0:
            return
        too_low = (self.low is not None and value < self.low) or (self.above is not None and value <= self.above)
        too_high = (self.high is not None and value > self.high) or (self.below is not None and value >= self.below)
        if too_low or too_high:
            raise ValueError("range")

    def _from_text(self, text: str, words: bool) -> Any:
        """A text that may stand for something else. In a file a number in quotes must have a unit to count as one."""
        with_unit = words or text[-1:].isalpha()
        if self.auto and text == "auto":
            return 0
        if self.duration and with_unit:
            return parse_duration(text)
        if self.kind == "int" and with_unit:
            return parse_count(text)
        if self.kind == "float" and words:
            return float(text)
        if self.kind == "bool" and words:
            return {"true": True, "yes": True, "on": True, "1": True,
                    "false": False, "no": False, "off": False, "0": False}.get(text.lower(), text)
        if self.kind in ("words", "map") and words and text[:1] in ("[", "{"):
            return tomllib.loads(f"value = {text}")["value"]
        if self.kind == "words" and words:
            return (text,)  # not split: a path may hold a comma
        if self.kind == "map" and words:
            pairs = [part.partition("=") for part in text.split(",") if part.strip()]
            return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
        return text


def leaves_of(sections: Mapping[str, type[Any]]) -> dict[str, Leaf]:
    """Every option of some section dataclasses by its dotted key, in the order in which they are written."""
    found = {}
    for section, kind in sections.items():
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            meta = dict(item.metadata)
            hint = hints[item.name]
            optional = isinstance(hint, types.UnionType)
            base = next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            key = f"{section}.{meta.pop('name', item.name)}"
            found[key] = Leaf(key=key, section=section, name=item.name, kind=_KINDS[base], optional=optional,
                              default=default, **meta)
    return found


def _exactly(*kinds: type) -> Callable[[Any], Any]:
    """A reader that takes these types, no subclasses (True is no 1), and returns the last of them."""
    def read(value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError("type")
        return kinds[-1](value)
    return read


def _read_words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise ValueError("type")
    "".join(value).encode()
    return tuple(value)


def _read_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("type")
    _read_words([*value, *value.values()])
    return dict(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "bool": _exactly(bool), "int": _exactly(int), "float": _exactly(int, float), "str": _exactly(str),
    "words": _read_words, "map": _read_map}
_KINDS = {bool: "bool", int: "int", float: "float", str: "str", tuple[str, ...]: "words", dict[str, str]: "map"}

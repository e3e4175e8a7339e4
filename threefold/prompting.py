"""Prompts as data: what is asked of a model that was not trained for it, in one TOML file each.

    lead    Decide whether each review is positive or negative.
    example Review: A fine film.          the template, filled        then `gap` and the answer
            Sentiment: positive
    text    Review: I left early.         the template, filled, and nothing behind it: the model goes on
            Sentiment:

Decisions:
- A template is text with places in braces (`{text}`; `{{` is a brace) and nothing else: no expressions, no code.
- A place may have a default. A text alone goes to the one place that has none; several are given by name.
- Files are read strictly: every unknown key and wrong value is told with its line, and a place without a value is an error.
- What comes back is the new text up to the first stop string, without the white space around it. How long an answer may be and how
  it is drawn (`new_tokens`, `temperature`) hold where the caller says nothing.
- A path that ends in .toml is taken wherever a name is.
"""

from __future__ import annotations

import functools
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from threefold import files
from threefold.config.lines import key_lines
from threefold.config.recipe import Problems
from threefold.config.toml import parse_table, read_text
from threefold.config.words import quote
from threefold.errors import ConfigError, UsageError, did_you_mean
from threefold.generation.stopping import StopStrings

FOLDER = Path(__file__).resolve().parent / "prompts"
ANSWER = "answer"
TASKS = ("text-generation", "text2text-generation", "summarization", "translation", "text-to-sql", "question-answering", "fill-mask",
         "feature-extraction", "text-classification", "token-classification", "sentence-similarity", "zero-shot-classification")
_PLACE = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A template and all that goes with it. Raises `ConfigError` for one that cannot be filled.

    name, language, what   for people; `task` is the pipeline that it was written for, and others take it too
    template    text with places; what the model goes on with
    lead        text before everything, once; it may have places too
    examples    values of the places, and `answer`: the template filled, `gap` and the answer, each followed by `join`
    stop        texts that end an answer and are not part of it
    new_tokens, temperature   as of `generate`, unless the caller says otherwise; temperature 0 takes the likeliest
    defaults    values of places that need not be given
    sample      values that show what it is for
    """

    template: str
    name: str = "prompt"
    language: str = "en"
    task: str = "text-generation"
    what: str = ""
    lead: str = ""
    gap: str = " "
    join: str = "\n\n"
    examples: tuple[Mapping[str, str], ...] = ()
    stop: tuple[str, ...] = ()
    new_tokens: int | None = None
    temperature: float | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    sample: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems(f"the prompt `{self.name}`")
        for message, hint in _contradictions(self):
            problems.add(message, hint)
        problems.raise_if_any()

    @property
    def places(self) -> tuple[str, ...]:
        """The names of all places, in order."""
        return tuple(dict.fromkeys([*_places(self.lead), *_places(self.template)]))

    @property
    def open(self) -> tuple[str, ...]:
        """The places that have no default."""
        return tuple(name for name in self.places if name not in self.defaults)

    def given(self, **values: str) -> Prompt:
        """The same prompt with values for some of its places; raises `UsageError` for a place that it does not have."""
        self._check(values)
        return replace(self, defaults={**self.defaults, **values})

    def fill(self, values: str | Mapping[str, Any], blank: str | None = None) -> str:
        """What the model is given: a text goes to the one place that is open, several places are filled by name. The answer of an
        example stands behind it, or in the place of a `blank` (the mask of a model that fills it in) where the template has one. Raises
        `UsageError` where a place stays empty or a name is not known."""
        if isinstance(values, str):
            if len(self.open) != 1:
                raise UsageError(f"the prompt `{self.name}` has {len(self.open)} open places, and one text is given",
                                 hint=f"give values by name: {', '.join(f'`{name}`' for name in self.open or self.places)}")
            values = {self.open[0]: values}
        self._check(values)
        found = {**self.defaults, **values}
        missing = [name for name in self.places if name not in found]
        if missing:
            raise UsageError(f"the prompt `{self.name}` has no value for {', '.join(f'`{name}`' for name in missing)}",
                             hint=f"its places are {', '.join(f'`{name}`' for name in self.places)}")
        shots = []
        for one in self.examples:
            shot = _filled(self.template, {**self.defaults, **one})
            shots.append(shot.replace(blank, one[ANSWER]) if blank and blank in self.template else shot + self.gap + one[ANSWER])
        return _filled(self.lead, found) + self.join.join([*shots, _filled(self.template, found)])

    def shown(self) -> str:
        """Filled with its own sample; a place without one shows its name."""
        return self.fill({**{name: f"{{{name}}}" for name in self.open}, **self.sample})

    def cut(self, text: str) -> str:
        """New text up to the first stop string."""
        stops = StopStrings(self.stop)
        return stops.feed(text) + stops.finish()

    def answer(self, text: str) -> str:
        """The answer in new text: up to the first stop string, without the white space around it."""
        return self.cut(text).strip()

    def _check(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in self.places:
                raise UsageError(f"the prompt `{self.name}` has no place `{name}`", hint=did_you_mean(str(name), self.places))
            if not isinstance(value, str):
                raise UsageError(f"`{name}` of the prompt `{self.name}` is {quote(value)}, expected a text")


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text as they come, which joined are the text without white space around it."""
    begun, held = False, ""
    for piece in pieces:
        held += piece if begun else piece.lstrip()
        kept = held.rstrip()
        if kept:
            begun, held = True, held[len(kept):]
            yield kept


# -- files -------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The names of the prompts that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_prompt(which: str | os.PathLike[str] | Prompt) -> Prompt:
    """A prompt by its name, or from a file whose name ends in .toml. Raises `UsageError` for a name that is not known, and
    `ConfigError` for a file that does not hold."""
    if isinstance(which, Prompt):
        return which
    name = os.fspath(which)
    if name.endswith(".toml"):
        return parse_prompt(read_text(os.path.expanduser(name), "prompt"), name)
    if name not in names():
        raise UsageError(f"no prompt `{name}`", hint=f"{did_you_mean(name, names())}; a file of your own ends in .toml")
    return _known(name)


@functools.cache
def _known(name: str) -> Prompt:
    path = FOLDER / f"{name}.toml"
    return parse_prompt(read_text(path, "prompt"), path.name)


def copy(name: str, out: Path) -> Path:
    """Write a prompt that comes along to a file of one's own; an existing file is not overwritten."""
    load_prompt(name)
    source = Path(os.path.expanduser(name)) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if out.exists():
        raise UsageError(f"`{out}` exists", hint="choose another place with --out")
    files.make_dirs(out.parent)
    files.write_atomic(out, source.read_bytes())
    return out


def parse_prompt(text: str, name: str = "prompt.toml") -> Prompt:
    """A prompt from its TOML text; `name` stands in messages, and its stem is the prompt's where it names none. Raises
    `ConfigError` with every problem."""
    table, lines = parse_table(text, name, "prompt"), key_lines(text)
    problems = Problems(f"`{name}`")
    values: dict[str, Any] = {"name": Path(name).stem}
    for key, value in table.items():
        where = f"{name}:{lines.get((key,), 1)}: "
        if key not in _KINDS:
            problems.add(f"{where}unknown key `{key[:80]}`", did_you_mean(key[:80], _KINDS))
            continue
        expected, holds = _KINDS[key]
        if not holds(value):
            problems.add(f"{where}`{key}`: expected {expected}, got {quote(value)}")
        values[key] = tuple(value) if isinstance(value, list) else value
    if "template" not in table:
        problems.add(f"{name}: `template` is missing", "it is the text that is filled: template = \"Review: {text}\\nSentiment:\"")
    problems.raise_if_any()
    try:
        return Prompt(**values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}", hint=error.hint) from error


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


_KINDS: dict[str, tuple[str, Any]] = {
    **{f.name: ("a text", lambda value: isinstance(value, str)) for f in fields(Prompt)},
    "stop": ("a list of texts, none of them empty", lambda value: isinstance(value, list) and all(isinstance(s, str) and s for s in value)),
    "new_tokens": ("a whole number, 1 or more", lambda value: type(value) is int and value > 0),
    "temperature": ("a number from 0 to 1000", lambda value: type(value) in (int, float) and 0 <= value <= 1000),
    "defaults": ("a table of texts", _is_texts),
    "sample": ("a table of texts", _is_texts),
    "examples": ("[[examples]], tables of texts", lambda value: isinstance(value, list) and all(map(_is_texts, value))),
}


# -- templates ---------------------------------------------------------------------------------------------------------


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """(text, the place behind it or None) of a template. Raises ValueError for braces that hold anything but a name."""
    for text, place, form, conversion in string.Formatter().parse(template):
        if place is not None and (form or conversion or not _PLACE.fullmatch(place)):
            more = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"a place is a name in small letters, got `{{{place}{more}}}`")
        yield text, place


def _places(template: str) -> list[str]:
    return [place for _, place in _parts(template) if place is not None]


def _filled(template: str, values: Mapping[str, str]) -> str:
    return "".join(text + ("" if place is None else values[place]) for text, place in _parts(template))


def _contradictions(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """What does not hold in a prompt, with hints."""
    braces = "a brace that is text is written twice: `{{` or `}}`"
    for key in ("lead", "template"):
        try:
            _places(getattr(prompt, key))
        except ValueError as error:
            yield f"`{key}` cannot be filled: {error}", braces
            return
    inside, listed = _places(prompt.template), ", ".join(f"`{name}`" for name in prompt.places)
    if not inside:
        yield "`template` has no place for a text", "name one in braces: {text}"
    if ANSWER in prompt.places:
        yield f"a place is called `{ANSWER}`, which is what examples are answered with", "call it something else"
    if prompt.task not in TASKS:
        yield f"`task` is {quote(prompt.task)}", did_you_mean(prompt.task, TASKS)
    for number, example in enumerate(prompt.examples, 1):
        for name in example:
            if name not in (*inside, ANSWER):
                yield f"example {number} has `{name}`, which is no place of the template", did_you_mean(name, [*inside, ANSWER])
        for name in (*inside, ANSWER):
            if name not in example and name not in prompt.defaults:
                yield f"example {number} has no `{name}`", f"an example has a value for each place, and `{ANSWER}`"
    for key in ("defaults", "sample"):
        for name in getattr(prompt, key):
            if name not in prompt.places:
                yield f"`{key}` has `{name}`, which is no place", f"the places are {listed}"

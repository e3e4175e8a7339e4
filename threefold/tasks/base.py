"""What all tasks have in common: inputs one or several, batches, arguments that are checked.

Decisions:
- One text at a time unless `batch_size` says otherwise: a batch changes the speed alone.
- An argument is the task's, or goes on to `generate` where the task writes, or is refused by name.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from threefold import auto
from threefold.errors import UsageError, did_you_mean
from threefold.prompting import Prompt, load_prompt
from threefold.text.encoded import Encoded
from threefold.text.pretrained import PretrainedTokenizer


class Pipeline(ABC):
    """A task, its model and its tokenizer. Abstract: each task says in `answers` what it makes of a batch of inputs."""

    loader: ClassVar[type[auto._Auto]]    # `_Auto` itself takes a directory for what it was saved for
    heads: ClassVar[tuple[str, ...]]      # what a model may have been loaded for
    options: ClassVar[tuple[str, ...]]    # arguments of a call

    def __init__(self, task: str, model: Any, tokenizer: PretrainedTokenizer, defaults: Mapping[str, Any]) -> None:
        self.task, self.model, self.tokenizer, self.defaults = task, model, tokenizer, dict(defaults)
        self._check(self.defaults)

    @property
    def kept(self) -> dict[str, Any]:
        """What the model's config.json says to its users; of several adapters that of the one in use."""
        found: dict[str, Any] = self.model.kept
        return found

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.model.device
        return device

    def __call__(self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **options: Any) -> Any:
        """The results for one input or for several, in order; `options` are the task's arguments."""
        self._check(options)
        chosen = {**self.defaults, **options}
        if (form := prompt_of(chosen)) is not None:
            chosen["prompt"] = form  # read once, not for every batch
        size = batch_size or chosen.pop("batch_size", None) or 1
        for name in ("batch_size", "num_workers"):
            chosen.pop(name, None)
        several = self.is_several(inputs)
        results = list(self._run(inputs if several else [inputs], size, chosen))
        return self.shaped(results, inputs, options) if several else self.shaped_one(results[0], inputs, options)

    def _run(self, inputs: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        rest, first = iter(inputs), 0
        while batch := list(itertools.islice(rest, size)):
            for _, group in itertools.groupby(batch, _is_pair):  # a text alone is framed otherwise than a pair
                alike = list(group)
                yield from self.answers(alike, options, first)
                first += len(alike)

    @abstractmethod
    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        """The result of each input of a batch, whose first one has the number `first` among all."""

    def is_several(self, inputs: Any) -> bool:
        """Whether it is a list of inputs, and not one."""
        return not isinstance(inputs, str | Mapping)

    def shaped(self, results: list[Any], inputs: Any, options: dict[str, Any]) -> Any:
        """What a call with several inputs gives."""
        return results

    def shaped_one(self, result: Any, inputs: Any, options: dict[str, Any]) -> Any:
        """What a call with one input gives."""
        return result

    def _check(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in (*self.options, "batch_size", "num_workers"):
                raise UsageError(f"`{name}` is not a known argument of `{self.task}`", hint=did_you_mean(name, self.options))

    def encoded(self, batch: list[Any], **options: Any) -> tuple[Encoded, dict[str, Tensor]]:
        """Rows of a batch with all that was asked for, and as the model takes them, padded where they differ in length."""
        texts = [one["text"] if isinstance(one, Mapping) else one for one in batch]
        pairs = [one.get("text_pair") if isinstance(one, Mapping) else None for one in batch]
        seconds = None if all(pair is None for pair in pairs) else [pair or "" for pair in pairs]
        rows = self.tokenizer(texts, seconds, padding=len(batch) > 1, **options)
        given = {name: torch.tensor(rows[name], device=self.device) for name in self.tokenizer.model_input_names if name in rows}
        return rows, given

    def prompted(self, batch: list[Any], options: Mapping[str, Any]) -> list[Any]:
        """The inputs of a batch, filled into the prompt where the call names one."""
        form = prompt_of(options)
        return batch if form is None else [form.fill(one, self.tokenizer.mask_token) for one in batch]

    def label(self, number: int) -> str:
        """The name of a class."""
        return self.model.labels[number] if self.model.labels else f"LABEL_{number}"


def _is_pair(one: Any) -> bool:
    return isinstance(one, Mapping) and one.get("text_pair") is not None


def prompt_of(options: Mapping[str, Any]) -> Prompt | None:
    """The prompt that a call names, or None."""
    return None if options.get("prompt") is None else load_prompt(options["prompt"])

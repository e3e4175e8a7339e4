"""What a prompt is to a model: the beginning of its own text, or another text that it reads before it writes.

Decisions:
- The engine has one loop. All that a decoder and an encoder-decoder do differently stands in the two classes here.
- An encoder reads the prompts of a batch once, with padding behind them; their keys stay in the cache. So prompts of any
  length start their answers at the same place, and a decoder's mask is not needed.
- A prompt and its answer share a decoder's context; an encoder-decoder has a context for each. Positions that are mere
  distances (T5) have no end, so there nothing is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from threefold.errors import UsageError
from threefold.model.base import Model
from threefold.model.cache import Cache
from threefold.model.language import CausalLM, Seq2SeqLM
from threefold.model.stack import Trace

LanguageModel = CausalLM | Seq2SeqLM


class Continuing:
    """A decoder writes on behind the prompt."""

    whole = False  # the prompt's end is open

    def __init__(self, model: CausalLM) -> None:
        self.model, self.context = model, model.config.max_position_embeddings
        rotary = model.transformer.last.rotary
        self.turn = None if rotary is None else rotary.turn  # what is kept of a text no longer counts when it grows beyond

    def room(self, prompt_tokens: int) -> int | None:
        """How many new tokens fit behind a prompt; None: any number."""
        return self.context - prompt_tokens

    def check(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse an empty prompt and one that does not fit; nothing is ever cut off in silence."""
        _check_numbers(prompt_tokens, new_tokens)
        if prompt_tokens + new_tokens > self.context:
            fit = self.context - prompt_tokens
            raise UsageError(
                f"the prompt of {prompt_tokens} tokens and {new_tokens} new ones need "
                f"{prompt_tokens + new_tokens} positions, and the model's context is {self.context}",
                hint=f"ask for at most {fit} new tokens, or shorten the prompt" if fit > 0 else "shorten the prompt",
            )

    def opening(self, prompt: tuple[int, ...], start: int | None) -> tuple[int, ...]:
        """What the text that is written begins with."""
        return prompt

    def read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """There is nothing to read beside the text itself."""

    def logits(self, ids_BT: Tensor, positions_BT: Tensor | None, mask_BS: Tensor | None, cache: Cache) -> Tensor:
        """Logits (B, V) of what follows the last of the ids, which are put into the cache."""
        return self.model.head(self.model.hidden(ids_BT, positions_BT, attention_mask=mask_BS, cache=cache)[:, -1])

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows alone, in this order."""


class Answering:
    """An encoder-decoder reads the prompt and writes another text, which begins with its start id."""

    whole = True  # the prompt is a text with its end

    def __init__(self, model: Seq2SeqLM) -> None:
        self.model, self.context, self.turn = model, model.config.max_position_embeddings, None
        self._endless = model.config.position_embedding_type == "relative"
        self._ids_BS: Tensor | None = None  # what is to be read, until it is
        self._mask_BS: Tensor | None = None
        self._memory: Trace | None = None

    def room(self, prompt_tokens: int) -> int | None:
        """As of `Continuing`; the prompt does not count."""
        return None if self._endless else self.context - 1

    def check(self, prompt_tokens: int, new_tokens: int) -> None:
        """As of `Continuing`, for each side by itself."""
        _check_numbers(prompt_tokens, new_tokens)
        if self._endless or max(prompt_tokens, 1 + new_tokens) <= self.context:
            return
        raise UsageError(
            f"the prompt of {prompt_tokens} tokens is to be read and {new_tokens} new ones are to be written behind a start, "
            f"and the model's context is {self.context} on either side",
            hint="shorten the prompt" if prompt_tokens > self.context else f"ask for at most {self.context - 1} new tokens",
        )

    def opening(self, prompt: tuple[int, ...], start: int | None) -> tuple[int, ...]:
        """As of `Continuing`."""
        return (self.model.start if start is None else start,)

    def read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Take up the prompts, padded behind; the first call of `logits` runs the encoder over them."""
        width = max(map(len, prompts))
        self._ids_BS = torch.tensor([ids + (self.model.pad,) * (width - len(ids)) for ids in prompts], device=self.model.device)
        if min(map(len, prompts)) < width:
            lengths_B1 = torch.tensor([[len(ids)] for ids in prompts], device=self._ids_BS.device)
            self._mask_BS = torch.arange(width, device=self._ids_BS.device) < lengths_B1

    def logits(self, ids_BT: Tensor, positions_BT: Tensor | None, mask_BS: Tensor | None, cache: Cache) -> Tensor:
        """As of `Continuing`."""
        trace = self.model.transformer(self._ids_BS, attention_mask=self._mask_BS, decoder_input_ids=ids_BT, encoded=self._memory,
                                       cache=cache)
        self._ids_BS, self._memory = None, trace.encoder
        logits_BV: Tensor = self.model.lm_head(trace.last[:, -1], self.model.transformer.embed.weight)
        return logits_BV

    def keep(self, rows_B: Tensor) -> None:
        """As of `Continuing`."""
        if self._ids_BS is not None:
            self._ids_BS = self._ids_BS[rows_B]
        if self._memory is not None:
            self._memory = Trace(self._memory.last[rows_B])
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[rows_B]


def reader(model: Model) -> Continuing | Answering:
    """How this model takes a prompt; raises `UsageError` for one that writes no text."""
    if isinstance(model, CausalLM):
        return Continuing(model)
    if isinstance(model, Seq2SeqLM):
        return Answering(model)
    raise UsageError(f"this `{model.config.model_type}` model was loaded for `{model.task}`, and that writes no text",
                     hint="a decoder or an encoder-decoder does: AutoModelForCausalLM, AutoModelForSeq2SeqLM")


def _check_numbers(prompt_tokens: int, new_tokens: int) -> None:
    if prompt_tokens < 1:
        raise UsageError("the prompt holds no token", hint="give a text, or a tokenizer with a beginning-of-text token")
    if new_tokens < 0:
        raise UsageError(f"{new_tokens} new tokens were asked for", hint="ask for 0 or more")

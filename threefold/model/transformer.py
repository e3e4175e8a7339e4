"""The Transformer: ids -> hidden states. A table of token vectors, an encoder, a decoder, or both.

Decisions:
- Positions count the tokens that are no padding, so that a text means the same wherever its padding stands.
- Ids are checked on the CPU before they are looked up: an index error on a GPU takes the process with it and names
  nothing. All that a pass asks of a batch's numbers comes in one transfer (`look`), because each makes a GPU wait.
- `compute_dtype` is the dtype of the activations; parameters keep their own. None means the embedding's.
- An encoder's trace can be handed in again (`encoded`): a text is read once, however many tokens are written for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.errors import UsageError
from threefold.model.cache import Cache
from threefold.model.dropout import fresh_keys
from threefold.model.mask import make_mask
from threefold.model.padding import layout_of
from threefold.model.positions import Learned
from threefold.model.stack import Stack, Trace


class Embedding(nn.Module):
    """A table of vectors (count, D)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Transformer(nn.Module):
    """An embedding, and an encoder, a decoder or both over it."""

    def __init__(self, embed: Embedding, encoder: Stack | None, decoder: Stack | None, *, context: int) -> None:
        super().__init__()
        self.embed, self.encoder, self.decoder, self.context = embed, encoder, decoder, context
        self.compute_dtype: torch.dtype | None = None
        self.sides: list[Any] = []  # of adapters that drop, and need to know the rows of a batch

    @property
    def last(self) -> Stack:
        """The stack whose states go to the head: the decoder, or an encoder that stands alone."""
        stack = self.decoder if self.decoder is not None else self.encoder
        assert stack is not None
        return stack

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return any(stack.drops for stack in (self.encoder, self.decoder) if stack is not None)

    def forward(
        self, input_ids: Tensor | None, *, attention_mask: Tensor | None = None, positions: Tensor | None = None,
        documents: Tensor | None = None, types: Tensor | None = None, decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None, encoded: Trace | None = None, cache: Cache | None = None,
        dropout_keys: Tensor | None = None, with_states: bool = False, with_attentions: bool = False,
        padded: bool | None = None, wanted: Tensor | None = None, only: Tensor | None = None,
    ) -> Trace:
        """input_ids (B, T) -> `Trace`. `attention_mask` (B, past + T) is nonzero for tokens that are no padding,
        `documents` (B, T) the number of the text that a token belongs to, `positions` (B, T) or (T,) where each token
        stands in its text, `types` (B, T) its kind of segment, `dropout_keys` (B,) the keys of the rows' dropout masks,
        used in training mode alone. `padded` is what `look` said of this batch, where the caller has looked already. `wanted`
        (B, T) is nonzero where the last state is used: places that only fill up are then not computed, and come back as zeros. `only`
        (B,) names the one place of each row whose last state is used, which spares the last layer the others: (B, 1, D).

        With an encoder and a decoder, `input_ids` (B, S) are read and `decoder_input_ids` (B, T) are what is written so
        far; `encoded` stands for what was read before. With `padded` the caller has looked at what is written too, or made
        it of labels that it has looked at.
        """
        if self.training and dropout_keys is None and self.drops:
            some = input_ids if input_ids is not None else decoder_input_ids
            assert some is not None
            dropout_keys = fresh_keys(len(some), some.device)
        keys = dropout_keys if self.training else None
        for side in self.sides:
            side.keys = keys
        if self.encoder is None or self.decoder is None:
            assert input_ids is not None
            return self._through(self.last, input_ids, attention_mask, positions, documents, padded, types=types, cache=cache,
                                 keys=keys, with_states=with_states, with_attentions=with_attentions, wanted=wanted, only=only)
        if encoded is None:
            if input_ids is None:
                raise UsageError("there is no text to read: `input_ids` is missing")
            encoded = self._through(self.encoder, input_ids, attention_mask, positions, documents, padded, types=types, keys=keys,
                                    with_states=with_states, with_attentions=with_attentions,
                                    wanted=None if wanted is None and only is None else attention_mask)
        if decoder_input_ids is None:
            raise UsageError("there is nothing to write behind: `decoder_input_ids` is missing",
                             hint="they are made from `labels` where those are given")
        filled = None if padded is None or decoder_attention_mask is not None else False
        trace = self._through(self.decoder, decoder_input_ids, decoder_attention_mask, None, None, filled, cache=cache, keys=keys,
                              memory=encoded.last, memory_mask=attention_mask, with_states=with_states, with_attentions=with_attentions,
                              wanted=wanted, only=only)
        return dataclasses.replace(trace, encoder=encoded)

    def _through(
        self, stack: Stack, ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, documents: Tensor | None,
        padded: bool | None, *, types: Tensor | None = None, cache: Cache | None = None, keys: Tensor | None = None,
        memory: Tensor | None = None, memory_mask: Tensor | None = None, with_states: bool, with_attentions: bool,
        wanted: Tensor | None = None, only: Tensor | None = None,
    ) -> Trace:
        past = 0 if cache is None else len(cache)
        if padded is None:
            padded, _ = self.look(ids, attention_mask, positions, past)
        if not padded:
            attention_mask = None
        if documents is not None and past:
            raise UsageError("`documents` cannot be used together with a cache that holds tokens")
        positions = _positions(stack, ids, attention_mask, positions, documents, past)
        x_BTD, length = self.embed(ids), ids.shape[1]
        if self.compute_dtype is not None:
            x_BTD = x_BTD.to(self.compute_dtype)
        masks = {window: make_mask(length, past + length, like=x_BTD, causal=stack.causal, documents_BT=documents,
                                   sources_BS=attention_mask, window=window) for window in stack.windows}
        seen = None
        if memory is not None:
            seen = make_mask(length, memory.shape[1], like=x_BTD, causal=False, sources_BS=memory_mask)
        layout = None
        if wanted is not None and cache is None and not (with_states or with_attentions) and not any(side.drops for side in self.sides):
            layout = layout_of(wanted, attention_mask, only, causal=stack.causal)
        trace: Trace = stack(x_BTD, masks, positions, types_BT=types, memory_BSD=memory, memory_mask=seen, cache=cache, keys_B=keys,
                             with_states=with_states, with_attentions=with_attentions, layout=layout, only_B=only)
        return trace

    def look(
        self, ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None, past: int = 0,
        more: Sequence[Tensor] = (),
    ) -> tuple[bool, list[int]]:
        """Check a batch before its pass: whether anything in it is padding, and the values of the scalars in `more`,
        which the caller wants to know too. One transfer from the device; nothing is known while a compiler traces.

        Raises `UsageError` for ids outside the vocabulary, positions that were not learned, and shapes that do not fit.
        """
        _check_shapes(ids, attention_mask, past)
        if torch.compiler.is_compiling():
            return attention_mask is not None, []
        asked = [*torch.aminmax(ids), *more]
        if attention_mask is not None:
            asked.append((attention_mask == 0).any())
        learned = isinstance(self.last.positions, Learned) and positions is not None and positions.numel() > 0
        if learned:
            asked.append(positions.max())  # type: ignore[union-attr]
        low, high, *rest = torch.stack([x.to(torch.int64) for x in asked]).tolist()
        vocab_size = self.embed.weight.shape[0]
        if low < 0 or high >= vocab_size:
            row, column = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
            raise UsageError(
                f"token id {int(ids[row, column])} at row {row}, position {column} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})",
                hint="was the text encoded with this model's own tokenizer? padding needs an id of the vocabulary too",
            )
        if learned:
            _check_furthest(self.last, rest.pop())
        return attention_mask is not None and bool(rest.pop()), rest


def _positions(stack: Stack, ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, documents: Tensor | None,
               past: int) -> Tensor | None:
    length = ids.shape[1]
    if positions is not None:  # `look` has seen them
        return positions[None] if positions.ndim == 1 else positions
    if attention_mask is not None:
        positions = ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)[:, past:]
    elif documents is not None:
        positions = positions_in(documents)
    elif past:
        positions = torch.arange(past, past + length, device=ids.device)[None]
    if isinstance(stack.positions, Learned) and past + length > stack.positions.count:
        # Only a row this long can stand too far; it may also be several texts, or padding.
        _check_furthest(stack, length - 1 if positions is None else int(positions.max()))
    return positions


def _check_furthest(stack: Stack, furthest: int) -> None:
    assert isinstance(stack.positions, Learned)
    learned = stack.positions.count
    if furthest >= learned:
        raise UsageError(
            f"a text of {furthest + 1} tokens is longer than the {learned} positions that this model has learned",
            hint=f"give at most {learned} tokens, prompt and new ones together",
        )


def positions_in(documents_BT: Tensor) -> Tensor:
    """Positions (B, T) that begin at 0 where the document number (B, T) changes."""
    place = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    begins = torch.ones_like(documents_BT, dtype=torch.bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return place - torch.where(begins, place, 0).cummax(1).values


def _check_shapes(ids: Tensor, attention_mask: Tensor | None, past: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(
            f"`input_ids` is {ids.dtype} of shape {tuple(ids.shape)}, expected whole numbers of shape (batch, length)",
            hint="one text is a batch of one: `input_ids[None]`",
        )
    if not ids.numel():
        raise UsageError(
            f"`input_ids` of shape {tuple(ids.shape)} holds no tokens",
            hint="an empty prompt begins with the beginning-of-text token",
        )
    sources = past + ids.shape[1]
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] != sources):
        raise UsageError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, expected (batch, {sources}): one number for each token, cached ones included"
        )

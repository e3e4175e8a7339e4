"""The Transformer: ids -> hidden states. A stack of blocks over an embedding; so far one stack, a decoder.

Decisions:
- What a forward pass needs besides the hidden states (positions, mask, rotation tables) is made once here and handed
  to all layers.
- Positions count the tokens that are no padding, so that a text means the same wherever its padding stands.
- Ids are checked on the CPU before they are looked up: an index error on a GPU takes the process with it and names
  nothing. All that a pass asks of a batch's numbers comes in one transfer (`look`), because each makes a GPU wait.
- `compute_dtype` is the dtype of the activations; parameters keep their own. None means the embedding's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.errors import UsageError
from threefold.model.attention import Mask, make_mask
from threefold.model.block import Block
from threefold.model.cache import Cache
from threefold.model.dropout import dropout, fresh_keys, site_keys
from threefold.model.positions import Rotary


class Embedding(nn.Module):
    """A table of vectors (count, D)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


@dataclass(frozen=True)
class Trace:
    """What a pass through a stack leaves: the last hidden state (B, T, D), and where asked for all of them and the
    attention."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Stack(nn.Module):
    """Blocks and the norm behind them; with `positions`, learned vectors are added at its entrance, with `rotary`
    queries and keys turn."""

    def __init__(
        self,
        blocks: list[Block],
        norm: nn.Module,
        *,
        positions: Embedding | None,
        rotary: Rotary | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.positions, self.rotary, self.dropout = positions, rotary, dropout
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.drops = dropout > 0 or any(block.dropout > 0 or block.attention.dropout > 0 for block in blocks)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        positions_BT: Tensor | None,
        *,
        cache: Cache | None = None,
        keys_B: Tensor | None = None,
        with_states: bool = False,
        with_attentions: bool = False,
    ) -> Trace:
        """(B, T, D) -> the normed hidden state; `hidden_states` are the L inputs of the blocks and then the normed
        output."""
        length = x_BTD.shape[1]
        if self.positions is not None:
            learned = self.positions.weight[:length] if positions_BT is None else self.positions(positions_BT)
            x_BTD = x_BTD + learned.to(x_BTD.dtype)
        x_BTD = dropout(x_BTD, self.dropout, None if keys_B is None else site_keys(keys_B, 0))
        tables = None if self.rotary is None else self.rotary(positions_BT, length, x_BTD)
        states, attentions = [], []
        for block in self.blocks:
            if with_states:
                states.append(x_BTD)
            x_BTD, probabilities = block(
                x_BTD, tables, mask, cache=cache, keys_B=keys_B, with_probabilities=with_attentions
            )
            if probabilities is not None and with_attentions:
                attentions.append(probabilities)
        x_BTD = self.norm(x_BTD)
        return Trace(x_BTD, (*states, x_BTD) if with_states else None, tuple(attentions) if with_attentions else None)


class Transformer(nn.Module):
    """An embedding and a decoder over it."""

    def __init__(self, embed: Embedding, decoder: Stack, *, context: int) -> None:
        super().__init__()
        self.embed, self.decoder, self.context = embed, decoder, context
        self.compute_dtype: torch.dtype | None = None

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, positions: Tensor | None = None,
                documents: Tensor | None = None, cache: Cache | None = None, dropout_keys: Tensor | None = None,
                with_states: bool = False, with_attentions: bool = False, padded: bool | None = None) -> Trace:
        """input_ids (B, T) -> `Trace`. `attention_mask` (B, past + T) is nonzero for tokens that are no padding,
        `documents` (B, T) the number of the text that a token belongs to, `positions` (B, T) or (T,) where each token
        stands in its text, `dropout_keys` (B,) the keys of the rows' dropout masks, used in training mode alone. `padded`
        is what `look` said of this batch, where the caller has looked already."""
        past = 0 if cache is None else len(cache)
        if padded is None:
            padded, _ = self.look(input_ids, attention_mask, positions, past)
        if not padded:
            attention_mask = None
        positions = self._positions(input_ids, attention_mask, positions, documents, past)
        x_BTD = self.embed(input_ids)
        if self.compute_dtype is not None:
            x_BTD = x_BTD.to(self.compute_dtype)
        length = input_ids.shape[1]
        if documents is not None and past:
            raise UsageError("`documents` cannot be used together with a cache that holds tokens")
        mask = make_mask(
            length,
            past + length,
            like=x_BTD,
            documents_BT=documents,
            sources_BS=attention_mask,
        )
        keys = dropout_keys if self.training else None
        if self.training and keys is None and self.decoder.drops:
            keys = fresh_keys(len(input_ids), input_ids.device)
        trace: Trace = self.decoder(
            x_BTD, mask, positions, cache=cache, keys_B=keys, with_states=with_states, with_attentions=with_attentions
        )
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
        learned = self.decoder.positions is not None and positions is not None and positions.numel() > 0
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
            self._check_furthest(rest.pop())
        return attention_mask is not None and bool(rest.pop()), rest

    def _positions(
        self, ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, documents: Tensor | None, past: int
    ) -> Tensor | None:
        length = ids.shape[1]
        if positions is not None:  # `look` has seen them
            return positions[None] if positions.ndim == 1 else positions
        if attention_mask is not None:
            positions = ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)[:, past:]
        elif documents is not None:
            positions = positions_in(documents)
        elif past:
            positions = torch.arange(past, past + length, device=ids.device)[None]
        if self.decoder.positions is not None and past + length > self.decoder.positions.weight.shape[0]:
            # Only a row this long can stand too far; it may also be several texts, or padding.
            self._check_furthest(length - 1 if positions is None else int(positions.max()))
        return positions

    def _check_furthest(self, furthest: int) -> None:
        assert self.decoder.positions is not None
        learned = self.decoder.positions.weight.shape[0]
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

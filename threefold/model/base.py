"""What all models have in common: a body, a description, a place, a precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from threefold.errors import NumericError, UsageError
from threefold.model.cache import Cache
from threefold.model.config import TransformerConfig
from threefold.model.losses import IGNORED, check_labels, wrong_labels
from threefold.model.output import Output
from threefold.model.stack import Trace
from threefold.model.transformer import Transformer

KEPT = ("problem_type", "threefold", "task_specific_params", "prefix")


class Model(nn.Module):
    """A Transformer under a head. Abstract: each task is one final class, which names itself in `task`."""

    task: str

    def __init__(self, transformer: Transformer, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = config
        self.labels: tuple[str, ...] = ()  # names of the classes, where the head has classes
        self.notes: list[str] = []  # what loading had to announce
        self.generation_config: dict[str, Any] = {}  # how it writes, where its directory says
        self.kept: dict[str, Any] = {}  # what config.json says to users and not to the model (`KEPT`)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of activations, and of weights where they are used; None is the parameters' own."""
        return self.transformer.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.transformer.compute_dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.transformer.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.transformer.embed.weight.dtype

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """The number of parameters, shared ones once; without those of the token embedding if asked."""
        packed = sum(p.numel() for p in self.parameters() if p.dtype == torch.uint8)  # two weights a byte
        return sum(p.numel() for p in self.parameters()) + packed - exclude_embeddings * self.transformer.embed.weight.numel()

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        types: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: Cache | None = None,
        padded: bool | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states (B, T, D) of the one stack there is, in the compute dtype; zeros may stand for padding, and behind the
        last place that is `wanted` (B, T). `padded` is given by callers that have checked the batch with `transformer.look`."""
        trace: Trace = self.transformer(
            input_ids, positions=positions, documents=documents, types=types, attention_mask=attention_mask,
            dropout_keys=dropout_keys, cache=cache, padded=padded, wanted=wanted if wanted is not None else attention_mask)
        return trace.last

    def look(
        self, ids_BT: Tensor, labels: Tensor, count: int, attention_mask: Tensor | None, positions: Tensor | None,
        past: int = 0, targets: Tensor | None = None, *, classes: bool = False, more: Sequence[Tensor] = (),
    ) -> tuple[bool, list[int]]:
        """`Transformer.look`, with the labels looked at in the same transfer: that each is one of `count` tokens (or
        `classes`), and that `targets` hold something to learn. Whether anything is padding, and the values of `more`."""
        learnable = labels if targets is None else targets
        asked = (wrong_labels(labels, count).any(), (learnable != IGNORED).any(), *more)
        padded, said = self.transformer.look(ids_BT, attention_mask, positions, past, asked)
        if said:
            check_labels(labels, count, bool(said[0]), classes=classes)
            if targets is not None and not said[1]:
                raise NumericError(
                    f"there is nothing to learn from: all labels of the {len(labels)} rows are {IGNORED} or have nothing before them",
                    hint="a row needs one label that is not masked, and for a causal model two tokens",
                )
        return padded, said[2:]


def same_shape(labels: Tensor, ids: Tensor) -> None:
    """Raise `UsageError` where there is not one label for each id."""
    if labels.shape != ids.shape:
        raise UsageError(f"`labels` has shape {tuple(labels.shape)}, expected {tuple(ids.shape)}")


def one_each(labels: Tensor, ids: Tensor, name: str) -> None:
    """Raise `UsageError` where there is not one label for each text."""
    if labels.numel() != len(ids):
        raise UsageError(f"`{name}` has shape {tuple(labels.shape)}, expected one number for each of {len(ids)} texts")


def encoded_of(given: Output | Trace | None) -> Trace | None:
    """What an encoder has said, as an earlier pass or `Body` gave it."""
    return Trace(given.last_hidden_state, given.hidden_states, given.attentions) if isinstance(given, Output) else given


def output_of(trace: Trace, return_dict: bool, *, cache: Cache | None = None, with_last: bool = False, **values: Any) -> Output:
    """An `Output` with what a pass has left, under transformers' names; the last state has a place where a body alone
    answers, and is an attribute elsewhere. A tuple of the same where no `return_dict` is wanted."""
    values["past_key_values"] = cache
    encoder = trace.encoder
    if encoder is None:
        values |= {"hidden_states": trace.hidden_states, "attentions": trace.attentions}
    else:
        values |= {
            "decoder_hidden_states": trace.hidden_states, "decoder_attentions": trace.attentions,
            "cross_attentions": trace.cross_attentions, "encoder_last_hidden_state": encoder.last,
            "encoder_hidden_states": encoder.hidden_states, "encoder_attentions": encoder.attentions}
    if with_last:
        values["last_hidden_state"] = trace.last
    output = Output({"last_hidden_state": trace.last}, **values)
    return output if return_dict else output.to_tuple()  # type: ignore[return-value]

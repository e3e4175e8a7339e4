"""Models that judge: a whole text, each token, or nothing at all (the body alone).

Decisions:
- Where a family reads its judgement from is told by `reads`: the pooled first state (BERT), the first state
  (RoBERTa, ELECTRA), the state of the last token that is no padding (decoders), or that of the end of a text that an
  encoder-decoder has been given on both sides (T5).
- transformers has no class that judges the mean of the states of these families. sentence-transformers describes it, as a projection
  behind a pooling, and such a model is `PooledClassifier`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from threefold.errors import UsageError
from threefold.model.base import Model, encoded_of, one_each, output_of, same_shape
from threefold.model.cache import Cache
from threefold.model.config import TransformerConfig
from threefold.model.heads import DenseHead, Pooler
from threefold.model.language import mean_loss
from threefold.model.losses import IGNORED
from threefold.model.norms import wide
from threefold.model.output import Output
from threefold.model.pooling import pooled
from threefold.model.stack import Trace
from threefold.model.transformer import Transformer

Reads = Literal["pooled", "first", "last", "end"]


class Body(Model):
    """ids -> hidden states, without a head; with a pooler where the family has one. Its task is `body`, or `encoder` where an
    encoder-decoder is used without its decoder."""

    def __init__(self, transformer: Transformer, config: TransformerConfig, *, pooler: Pooler | None = None, task: str = "body") -> None:
        super().__init__(transformer, config)
        self.pooler, self.task = pooler, task

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Output | Trace | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> Output:
        """`last_hidden_state` (B, T, D), `pooler_output` (B, D) where there is a pooler, and what else is asked for."""
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        trace = self.transformer(
            input_ids, attention_mask=attention_mask, types=token_type_ids, positions=position_ids,
            decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask, encoded=encoded_of(encoder_outputs),
            cache=past_key_values, with_states=output_hidden_states, with_attentions=output_attentions)
        pooled = None if self.pooler is None else self.pooler(trace.last)
        return output_of(trace, return_dict, cache=past_key_values, with_last=True, pooler_output=pooled)


class SequenceClassifier(Model):
    """A text -> logits of its classes (B, C); one class is a regression."""

    task = "classify"

    def __init__(self, transformer: Transformer, head: DenseHead, config: TransformerConfig, *, reads: Reads,
                 pooler: Pooler | None = None) -> None:
        super().__init__(transformer, config)
        self.head, self.reads, self.pooler = head, reads, pooler
        self.labels = numbered(len(head.out.weight))

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_keys: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """Logits (B, C). `labels` are classes (B,), -100 ignored, or true and false for each class (B, C) as floats, or
        values (B,) where C is 1: `loss` is the mean cross-entropy, that of each class by itself, or the mean square.

        Raises `UsageError` for labels of another shape or outside the classes, and for a text without the end at which T5
        judges; `NumericError` where every label is ignored."""
        written, padded = None, self._looked(input_ids, attention_mask, position_ids, labels)
        if self.reads == "end":  # the decoder is given the text too, behind its start
            start = self.config.decoder_start_token_id
            assert start is not None
            written = torch.cat([input_ids.new_full((len(input_ids), 1), start), input_ids[:, :-1]], 1)
        places = self._places(input_ids, attention_mask)
        only = places if not output_hidden_states and not output_attentions else None
        wanted = attention_mask if places is None else torch.zeros_like(input_ids).scatter(1, places[:, None], 1)
        trace = self.transformer(
            input_ids, attention_mask=attention_mask, types=token_type_ids, positions=position_ids, decoder_input_ids=written,
            dropout_keys=dropout_keys, with_states=output_hidden_states, with_attentions=output_attentions, padded=padded, wanted=wanted,
            only=only)
        last = trace.last if only is not None or places is None else trace.last[torch.arange(len(input_ids), device=places.device), places][:, None]
        logits_BC = self.head(self._read(last, attention_mask))
        loss = None if labels is None else _class_loss(logits_BC, labels, self.kept.get("problem_type"))
        return output_of(trace, return_dict, loss=loss, logits=logits_BC)

    def _looked(self, ids_BT: Tensor, attention_mask: Tensor | None, positions: Tensor | None, labels: Tensor | None) -> bool:
        """All checks of a batch in one transfer; whether anything in it is padding."""
        count = len(self.head.out.weight)
        ends = (self._ends(ids_BT).any(1).all(),) if self.reads == "end" and ids_BT.ndim == 2 else ()
        if labels is not None and count > 1 and labels.is_floating_point():
            if labels.shape != (len(ids_BT), count):
                raise UsageError(f"`labels` has shape {tuple(labels.shape)}, expected {(len(ids_BT), count)}: a number for each text and class",
                                 hint="labels that are whole numbers are one class for each text")
        elif labels is not None:
            one_each(labels, ids_BT, "labels")
        if labels is not None and count > 1 and not labels.is_floating_point():
            padded, said = self.look(ids_BT, labels, count, attention_mask, positions, 0, labels, classes=True, more=ends)
        else:
            padded, said = self.transformer.look(ids_BT, attention_mask, positions, 0, ends)
        if said and not said[0]:
            raise UsageError(f"a text does not end in the id {self.config.eos_token_id}, where it is judged",
                             hint="encode it with special tokens")
        return padded

    def _ends(self, ids_BT: Tensor) -> Tensor:
        return ids_BT.eq(self.config.eos_token_id)  # type: ignore[arg-type]

    def _places(self, ids_BT: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """(B,) where each text is judged; None: in all places."""
        if self.reads in ("pooled", "first"):
            return torch.zeros(len(ids_BT), dtype=torch.int64, device=ids_BT.device)
        places = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        wanted = torch.ones_like(ids_BT, dtype=torch.bool)
        if self.reads == "end":
            wanted = self._ends(ids_BT)
        elif attention_mask is not None:
            wanted = attention_mask.ne(0)
        elif self.config.pad_token_id is not None:
            wanted = ids_BT.ne(self.config.pad_token_id)
        return (places * wanted).argmax(1)

    def _read(self, states_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, D) what the head judges, of the states where the texts are judged."""
        return states_BTD[:, 0] if self.pooler is None else self.pooler(states_BTD)


class PooledClassifier(SequenceClassifier):
    """A text -> logits of its classes (B, C): one projection of its states, pooled as `how` says (`mean`, `cls`, `last`)."""

    def __init__(self, transformer: Transformer, config: TransformerConfig, *, how: str, classes: int) -> None:
        head = DenseHead(config.hidden_size, classes, activation=None, bias=True)
        super().__init__(transformer, head, config, reads="first")
        self.how = how

    def body(self) -> Body:
        """The same model without its head."""
        return Body(self.transformer, self.config, task="encoder" if self.config.is_encoder_decoder else "body")

    def _places(self, ids_BT: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        return super()._places(ids_BT, attention_mask) if self.how == "cls" else None

    def _read(self, states_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
        return pooled(states_BTD.to(wide(states_BTD.dtype)), attention_mask, self.how).to(states_BTD.dtype)


class TokenClassifier(Model):
    """A text -> logits of the classes of each token (B, T, C)."""

    task = "tag"

    def __init__(self, transformer: Transformer, head: DenseHead, config: TransformerConfig) -> None:
        super().__init__(transformer, config)
        self.head = head
        self.labels = numbered(len(head.out.weight))

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_keys: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """Logits (B, T, C); `labels` (B, T) are classes, -100 ignored, and `loss` their mean cross-entropy. Raises
        `UsageError` for labels outside the classes, `NumericError` where all are ignored."""
        padded = None if labels is None else _looked(self, input_ids, labels, labels, len(self.head.out.weight), attention_mask, position_ids)
        trace = self.transformer(
            input_ids, attention_mask=attention_mask, types=token_type_ids, positions=position_ids, dropout_keys=dropout_keys,
            with_states=output_hidden_states, with_attentions=output_attentions, padded=padded)
        logits_BTC = self.head(trace.last)
        loss = None if labels is None else mean_loss(logits_BTC, labels)
        return output_of(trace, return_dict, loss=loss, logits=logits_BTC)


class Discriminator(Model):
    """A text -> for each token a logit (B, T) that it was replaced (arXiv 2003.10555)."""

    task = "replaced"

    def __init__(self, transformer: Transformer, head: DenseHead, config: TransformerConfig) -> None:
        super().__init__(transformer, config)
        self.head = head

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_keys: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """Logits (B, T); `labels` (B, T) are 1 where a token was replaced and 0 elsewhere, -100 ignored, and `loss` is the
        mean over the tokens that are no padding. Raises `UsageError` for other labels, `NumericError` where all are ignored."""
        padded = judged = None
        if labels is not None:
            judged = labels != IGNORED if attention_mask is None else (labels != IGNORED) & (attention_mask != 0)
            padded = _looked(self, input_ids, labels, labels.where(judged, IGNORED), 2, attention_mask, position_ids)
        trace = self.transformer(
            input_ids, attention_mask=attention_mask, types=token_type_ids, positions=position_ids, dropout_keys=dropout_keys,
            with_states=output_hidden_states, with_attentions=output_attentions, padded=padded)
        logits_BT = self.head(trace.last)[..., 0]
        loss = None if labels is None or judged is None else replaced_sum(logits_BT, labels, judged) / judged.sum()
        return output_of(trace, return_dict, loss=loss, logits=logits_BT)


def numbered(count: int) -> tuple[str, ...]:
    """What the classes of a head are called as long as they have no names: transformers' words."""
    return tuple(f"LABEL_{number}" for number in range(count))


def _looked(model: Model, ids_BT: Tensor, labels_BT: Tensor, counted_BT: Tensor, classes: int, attention_mask: Tensor | None,
            positions: Tensor | None) -> bool:
    """All checks of a batch with a class for each token, of which some count, in one transfer; whether anything in it is
    padding."""
    same_shape(labels_BT, ids_BT)
    return model.look(ids_BT, labels_BT, classes, attention_mask, positions, 0, counted_BT, classes=True)[0]


def replaced_sum(logits_BT: Tensor, labels_BT: Tensor, judged_BT: Tensor) -> Tensor:
    """The summed loss in nats of the tokens that are judged, in float32 or wider."""
    logits = logits_BT[judged_BT]
    return F.binary_cross_entropy_with_logits(logits.to(wide(logits.dtype)), labels_BT[judged_BT].to(wide(logits.dtype)), reduction="sum")


def _class_loss(logits_BC: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """The mean loss, of the kind that is named; of none the one that labels and head look like."""
    logits = logits_BC.to(wide(logits_BC.dtype))
    usual = "regression" if logits.shape[1] == 1 else "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    problem = problem or usual
    if problem == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype).view_as(logits))
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)

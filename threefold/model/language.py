"""Models that predict tokens: the next one, a hidden one, or those of another text.

Decisions:
- `labels` of `forward` are transformers': a causal model shifts them inside, an encoder-decoder makes its decoder's inputs
  from them. The methods of training (`loss_rows`) take labels as they come, each under the state that predicts it.
- Only states that have a label go through the head: of a masked model one in seven, of a conversation the answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from threefold.model.base import Model, encoded_of, one_each, output_of, same_shape
from threefold.model.cache import Cache
from threefold.model.config import TransformerConfig
from threefold.model.heads import LanguageHead, Pooler
from threefold.model.linear import Linear
from threefold.model.losses import IGNORED, check_labels, wrong_labels
from threefold.model.norms import wide
from threefold.model.output import Output
from threefold.model.stack import Trace
from threefold.model.transformer import Transformer


class CausalLM(Model):
    """A decoder that predicts the next token."""

    task = "causal"

    def __init__(self, transformer: Transformer, head: LanguageHead, config: TransformerConfig) -> None:
        super().__init__(transformer, config)
        self.lm_head = head

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Hidden states -> logits, in the dtype of the hidden states."""
        return self.lm_head(hidden, self.transformer.embed.weight)  # type: ignore[no-any-return]

    def loss_sum(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Float[Tensor, ""], int]:
        """The summed loss in nats and the number of labels, for labels (B, T) that stand under their inputs already
        shifted."""
        total = self.loss_rows(input_ids, labels, positions, documents, dropout_keys=dropout_keys)[0]
        return total, int((labels != IGNORED).sum())

    def loss_rows(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " B"]]:
        """The sum of `loss_sum`, and that of each row as a by-product without gradient."""
        _, count = self.look(input_ids, labels, self.config.vocab_size, None, positions, more=((labels != IGNORED).sum(),))
        wanted = None if count == [labels.numel()] else labels != IGNORED
        hidden_BTD = self.hidden(input_ids, positions, documents, dropout_keys=dropout_keys, padded=False, wanted=wanted)
        return _summed(self.lm_head, hidden_BTD, self.transformer.embed.weight, labels, *count)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_keys: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> Output:
        """Logits (B, T, V) of a batch of ids (B, T), with transformers' words for all that may go with it.

        `labels` (B, T) are the ids themselves, shifted inside, -100 ignored: `loss` is the mean in nats.
        `past_key_values` holds what earlier calls computed; with `use_cache` one is made. `attention_mask` then covers
        the cached tokens too. `logits_to_keep` n > 0 gives logits for the last n positions alone. `hidden_states` are
        the L inputs of the layers and the last output, `attentions` the L probabilities (B, H, T, S). With
        `return_dict=False` the output is a tuple.

        Raises `UsageError` for ids outside the vocabulary and shapes that do not fit, `NumericError` where every label
        is ignored.
        """
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        places, padded, targets_BT = positions if positions is not None else position_ids, None, None
        if labels is not None:
            targets_BT = _targets(input_ids, labels, documents)
            past = 0 if past_key_values is None else len(past_key_values)
            padded, _ = self.look(input_ids, labels, self.config.vocab_size, attention_mask, places, past, targets_BT)
        trace = self.transformer(
            input_ids, attention_mask=attention_mask, positions=places, documents=documents, cache=past_key_values,
            dropout_keys=dropout_keys, with_states=output_hidden_states, with_attentions=output_attentions, padded=padded)
        logits_BTV = self.head(trace.last[:, -logits_to_keep:] if logits_to_keep else trace.last)
        loss = None if targets_BT is None else mean_loss(logits_BTV[:, :-1], targets_BT)
        return output_of(trace, return_dict, cache=past_key_values, loss=loss, logits=logits_BTV)


class MaskedLM(Model):
    """An encoder that predicts what was hidden; with a pooler and `pairs` also whether a second text follows the first."""

    task = "masked"

    def __init__(self, transformer: Transformer, head: LanguageHead, config: TransformerConfig, *, pooler: Pooler | None = None,
                 pairs: Linear | None = None) -> None:
        super().__init__(transformer, config)
        self.lm_head, self.pooler, self.pairs = head, pooler, pairs
        if pairs is not None:
            self.task = "pretraining"

    def loss_rows(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        types: Tensor | None = None,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " B"], Float[Tensor, "B T D"]]:
        """The summed loss in nats over the labels (B, T) that are not -100, that of each row as a by-product without
        gradient, and the hidden states, which a second term may want."""
        padded, count = self.look(input_ids, labels, self.config.vocab_size, attention_mask, positions, more=((labels != IGNORED).sum(),))
        hidden_BTD = self.hidden(input_ids, positions, documents, types=types, attention_mask=attention_mask,
                                 dropout_keys=dropout_keys, padded=padded)
        return *_summed(self.lm_head, hidden_BTD, self.transformer.embed.weight, labels, *count), hidden_BTD

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        next_sentence_label: Int[Tensor, " B"] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_keys: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """Logits (B, T, V) for every place, with transformers' words; `labels` (B, T) stand under their places, -100 where
        nothing was hidden. A model with `pairs` answers `prediction_logits` and `seq_relationship_logits` (B, 2), and its
        loss is the sum of both means."""
        padded, pairs = None, next_sentence_label if self.pairs is not None and labels is not None else None
        if labels is not None:
            same_shape(labels, input_ids)
            more: list[Tensor] = []
            if pairs is not None:
                one_each(pairs, input_ids, "next_sentence_label")
                more.append(wrong_labels(pairs, 2).any())
            padded, said = self.look(input_ids, labels, self.config.vocab_size, attention_mask, position_ids, 0, labels, more=more)
            if pairs is not None and said:
                check_labels(pairs, 2, bool(said[0]), classes=True)
        trace = self.transformer(input_ids, attention_mask=attention_mask, types=token_type_ids, positions=position_ids,
                                 documents=documents, dropout_keys=dropout_keys, with_states=output_hidden_states,
                                 with_attentions=output_attentions, padded=padded)
        logits_BTV = self.lm_head(trace.last, self.transformer.embed.weight)
        loss = None if labels is None else mean_loss(logits_BTV, labels)
        if self.pairs is None or self.pooler is None:
            return output_of(trace, return_dict, loss=loss, logits=logits_BTV)
        pairs_B2 = self.pairs(self.pooler(trace.last))
        if loss is not None and pairs is not None:
            loss = loss + mean_loss(pairs_B2, pairs.flatten())
        return output_of(trace, return_dict, loss=loss, prediction_logits=logits_BTV, seq_relationship_logits=pairs_B2)


class Seq2SeqLM(Model):
    """An encoder-decoder that writes one text while it reads another. `start` begins what it writes, `pad` fills."""

    task = "seq2seq"

    def __init__(self, transformer: Transformer, head: LanguageHead, config: TransformerConfig, *, start: int, pad: int) -> None:
        super().__init__(transformer, config)
        self.lm_head, self.start, self.pad = head, start, pad

    def decoder_inputs(self, labels_BT: Tensor) -> Tensor:
        """What the decoder is given where it should write the labels: shifted by one, behind the start."""
        start = labels_BT.new_full((len(labels_BT), 1), self.start)
        return torch.cat([start, labels_BT[:, :-1].where(labels_BT[:, :-1] != IGNORED, self.pad)], 1)

    def loss_rows(
        self,
        input_ids: Int[Tensor, "B S"],
        labels: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        smoothing: float = 0.0,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " B"]]:
        """The summed loss in nats over the labels (B, T) that are not -100, and that of each row without gradient."""
        padded, count = self.look(input_ids, labels, self.config.vocab_size, attention_mask, None,  # they become the decoder's inputs
                                  more=((labels != IGNORED).sum(),))
        trace = self.transformer(input_ids, attention_mask=attention_mask, decoder_input_ids=self.decoder_inputs(labels),
                                 dropout_keys=dropout_keys, padded=padded, wanted=labels != IGNORED)
        return _summed(self.lm_head, trace.last, self.transformer.embed.weight, labels, *count, smoothing=smoothing)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        *,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Int[Tensor, "B T"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Output | Trace | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_keys: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:
        """Logits (B, T, V) of what is written, with transformers' words; from `labels` (B, T), -100 ignored, the decoder's
        inputs are made where they are not given, and `loss` is the mean in nats."""
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        padded = None
        if labels is not None and input_ids is not None and encoder_outputs is None and decoder_input_ids is None:
            padded, _ = self.look(input_ids, labels, self.config.vocab_size, attention_mask, None, 0, labels)
            decoder_input_ids = self.decoder_inputs(labels)
        elif labels is not None:
            check_labels(labels, self.config.vocab_size)  # before they are the decoder's inputs
            decoder_input_ids = self.decoder_inputs(labels) if decoder_input_ids is None else decoder_input_ids
            same_shape(labels, decoder_input_ids)
            self.look(decoder_input_ids, labels, self.config.vocab_size, None, None, 0, labels)
        trace = self.transformer(
            input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, encoded=encoded_of(encoder_outputs),
            decoder_attention_mask=decoder_attention_mask, cache=past_key_values, dropout_keys=dropout_keys,
            with_states=output_hidden_states, with_attentions=output_attentions, padded=padded)
        logits_BTV = self.lm_head(trace.last, self.transformer.embed.weight)
        loss = None if labels is None else mean_loss(logits_BTV, labels)
        return output_of(trace, return_dict, cache=past_key_values, loss=loss, logits=logits_BTV)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss in nats of logits (..., V) over the labels (...) that are not -100, in float32 or wider."""
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat.to(wide(flat.dtype)), labels.reshape(-1), ignore_index=IGNORED)


def _summed(head: LanguageHead, states_BTD: Tensor, embedding_VD: Tensor, labels_BT: Tensor, count: int | None = None, *,
            smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The summed loss over the labels that are not -100, of which there are `count` if it is known, and that of each row as a
    by-product without gradient."""
    states_ND, labels_N = states_BTD.flatten(0, 1), labels_BT.flatten()
    if count == len(labels_N):
        total, losses_N = head.losses(states_ND, embedding_VD, labels_N, smoothing=smoothing, checked=True)
        return total, losses_N.view_as(labels_BT).sum(1)
    places_N = _places(labels_BT != IGNORED, count)
    total, losses_N = head.losses(states_ND[places_N], embedding_VD, labels_N[places_N], smoothing=smoothing, checked=True)
    return total, torch.zeros_like(labels_N, dtype=losses_N.dtype).index_copy(0, places_N, losses_N).view_as(labels_BT).sum(1)


def _places(chosen_BT: Tensor, count: int | None = None) -> Tensor:
    """The places (N,) of what is chosen, in order. With their `count`, which may have come with another transfer, none is
    needed for it."""
    chosen = chosen_BT.flatten()
    return chosen.nonzero()[:, 0] if count is None else (~chosen).to(torch.int8).argsort(stable=True)[:count]


def _targets(ids_BT: Tensor, labels_BT: Tensor, documents: Tensor | None) -> Tensor:
    """What each token but the last should predict (B, T - 1)."""
    same_shape(labels_BT, ids_BT)
    targets = labels_BT[:, 1:]
    if documents is not None:  # the first token of a packed text is not predicted from the text before it
        targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)
    return targets



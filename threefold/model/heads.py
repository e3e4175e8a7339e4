"""From hidden states to logits and losses.

Decisions:
- The loss is taken in float32 (float64 for a float64 model) over chunks of tokens, and never keeps the logits of a
  whole batch: for a large vocabulary they would be the largest tensor of the run.
- Where gradients are wanted the chunk's gradient is computed while its logits are at hand, so the head runs once and
  not twice.
- A causal model's `labels` are shifted inside, as transformers does it; the functions on hidden states take labels as
  they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from threefold.errors import NumericError, UsageError
from threefold.model.cache import Cache
from threefold.model.config import TransformerConfig
from threefold.model.linear import Linear
from threefold.model.norms import wide
from threefold.model.transformer import Transformer

IGNORED = -100
CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time: they should stay near the processor


def _chunk(vocabulary: int) -> int:
    return max(64, CHUNK_BYTES // (4 * vocabulary))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, needs: bool
    ) -> tuple[Tensor, Tensor]:
        """The sum, and the loss of each token, which has no gradient. `needs`: gradients are recorded at all."""
        for_hidden, for_weight = (needs and wanted for wanted in ctx.needs_input_grad[:2])
        cast_VD = weight_VD.to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=wide(hidden_ND.dtype))
        losses_N = torch.empty_like(labels_N, dtype=total.dtype)
        dhidden = torch.empty_like(hidden_ND) if for_hidden else None
        dweight: Tensor | None = None
        size = _chunk(len(weight_VD))
        for start in range(0, len(hidden_ND), size):
            hidden, labels = hidden_ND[start:start + size], labels_N[start:start + size]
            logits = F.log_softmax((hidden @ cast_VD.T).to(total.dtype), -1)
            kept = labels != IGNORED
            at = labels.where(kept, 0)[:, None]
            losses_N[start:start + size] = -logits.gather(1, at)[:, 0] * kept
            total += losses_N[start:start + size].sum()
            if for_hidden or for_weight:
                dlogits = (
                    logits.exp_()
                    .scatter_add_(1, at, torch.full_like(at, -1, dtype=total.dtype))
                    .mul_(kept[:, None])
                    .to(hidden.dtype)
                )
                if dhidden is not None:
                    torch.mm(dlogits, cast_VD, out=dhidden[start:start + size])
                if for_weight:
                    part = dlogits.T @ hidden
                    dweight = part if dweight is None else dweight.to(total.dtype).add_(part)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_N)
        return total, losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else _times(dhidden, dtotal, dhidden.dtype),
            None if dweight is None else _times(dweight, dtotal, ctx.weight_dtype),
            None,
            None,
        )


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in the wider of the two dtypes, rounded once. A factor of no dimension would be rounded first, which
    would scale the gradient of the whole body by another number than the head's."""
    return torch.mul(gradient, factor.view(1, 1), out=torch.empty_like(gradient, dtype=dtype))


def cross_entropy_each(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, " N"], *, checked: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """The sum over tokens of -log softmax(hidden weight^T)[label], in nats, and the loss of each token as a by-product
    without gradient, zero where the label is -100. `checked`: the caller knows that the labels are good.

    The product runs in hidden's dtype, the softmax and the sum in float32 (float64 for float64). Memory does not grow
    with N x V.
    """
    if not checked:
        check_labels(labels, len(weight))
    if torch.compiler.is_compiling():
        logits = F.linear(hidden, weight.to(hidden.dtype)).to(wide(hidden.dtype))
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return losses.sum(), losses.detach()
    needs = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropySum.apply(hidden, weight, labels, needs)  # type: ignore[no-untyped-call,no-any-return]


def token_losses(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The loss of each token in nats, in float32 (float64 for float64), zero where the label is -100."""
    check_labels(labels, len(weight))
    cast = weight.to(hidden.dtype)
    size = _chunk(len(weight))
    parts = [
        F.cross_entropy(
            F.linear(hidden[start : start + size], cast).to(wide(hidden.dtype)),
            labels[start : start + size],
            ignore_index=IGNORED,
            reduction="none",
        )
        for start in range(0, len(hidden), size)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=wide(hidden.dtype))


def check_labels(labels: Tensor, vocab_size: int, some_wrong: bool | None = None) -> None:
    """Raise `UsageError` for labels that are neither a token of the vocabulary nor -100. `some_wrong` is what
    `wrong_labels(...).any()` said, where it is known."""
    if torch.compiler.is_compiling() or not labels.numel():
        return
    if bool(wrong_labels(labels, vocab_size).any()) if some_wrong is None else some_wrong:
        place = wrong_labels(labels, vocab_size).nonzero()[0].tolist()
        raise UsageError(
            f"label {int(labels[tuple(place)])} at {place} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}, or {IGNORED} to ignore)",
            hint="were the labels made with this model's own tokenizer?",
        )


def wrong_labels(labels: Tensor, vocab_size: int) -> Tensor:
    """True where a label is neither a token of the vocabulary nor -100."""
    return ((labels < 0) & (labels != IGNORED)) | (labels >= vocab_size)


@dataclass
class Output:
    """What a model returns: by attribute, by key, or by place among those that are not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    last_hidden_state: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order, without `last_hidden_state` (as transformers orders them)."""
        return tuple(
            v for f in fields(self) if f.name != "last_hidden_state" and (v := getattr(self, f.name)) is not None
        )

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


class CausalLM(nn.Module):
    """A decoder that predicts the next token. `head` is None where the embedding serves as the head."""

    def __init__(self, transformer: Transformer, head: Linear | None, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = transformer
        self.lm_head = head
        self.config = config  # carried for callers; no computation reads it
        self.notes: list[str] = []  # what loading had to announce

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

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, D) that turns hidden states into logits: the head's own, or the embedding's."""
        return self.transformer.embed.weight if self.lm_head is None else self.lm_head.weight

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """The number of parameters, shared ones once; without those of the token embedding if asked."""
        return sum(p.numel() for p in self.parameters()) - exclude_embeddings * self.transformer.embed.weight.numel()

    def hidden(
        self,
        input_ids: Int[Tensor, "B T"],
        positions: Tensor | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        *,
        attention_mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: Cache | None = None,
        padded: bool | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The normed hidden states (B, T, D), in the compute dtype. `padded` is given by callers that have checked the
        batch with `transformer.look`."""
        return self.transformer(input_ids, positions=positions, documents=documents, attention_mask=attention_mask,  # type: ignore[no-any-return]
                                dropout_keys=dropout_keys, cache=cache, padded=padded).last

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Hidden states -> logits, in the dtype of the hidden states."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

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
        self._look(input_ids, labels, None, positions)
        hidden_BTD = self.hidden(input_ids, positions, documents, dropout_keys=dropout_keys, padded=False)
        total, losses_N = cross_entropy_each(hidden_BTD.flatten(0, 1), self.head_weight, labels.flatten(), checked=True)
        return total, losses_N.view_as(labels).sum(1)

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
        the L inputs of the layers and the normed output, `attentions` the L probabilities (B, H, T, S). With
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
            padded = self._look(input_ids, labels, attention_mask, places, past, targets_BT)
        trace = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            positions=places,
            documents=documents,
            cache=past_key_values,
            dropout_keys=dropout_keys,
            with_states=output_hidden_states,
            with_attentions=output_attentions,
            padded=padded,
        )
        logits_BTV = self.head(trace.last[:, -logits_to_keep:] if logits_to_keep else trace.last)
        loss = None
        if targets_BT is not None:
            flat = logits_BTV[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(flat.to(wide(flat.dtype)), targets_BT.flatten(), ignore_index=IGNORED)
        output = Output(loss, logits_BTV, past_key_values, trace.hidden_states, trace.attentions, trace.last)
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]


    def _look(
        self, ids_BT: Tensor, labels_BT: Tensor, attention_mask: Tensor | None, positions: Tensor | None, past: int = 0,
        targets_BT: Tensor | None = None,
    ) -> bool:
        """`Transformer.look`, with the labels looked at in the same transfer, and that `targets_BT` hold something to
        learn; whether anything is padding."""
        vocabulary = len(self.head_weight)
        learnable = labels_BT if targets_BT is None else targets_BT
        more = (wrong_labels(labels_BT, vocabulary).any(), (learnable != IGNORED).any())
        padded, said = self.transformer.look(ids_BT, attention_mask, positions, past, more)
        if said:
            check_labels(labels_BT, vocabulary, bool(said[0]))
            if targets_BT is not None and not said[1]:
                raise NumericError(
                    f"there is nothing to learn from: all labels of the {len(labels_BT)} rows are {IGNORED} or have nothing before them",
                    hint="a row needs at least two tokens, and one label that is not masked",
                )
        return padded


def _targets(ids_BT: Tensor, labels_BT: Tensor, documents: Tensor | None) -> Tensor:
    """What each token but the last should predict (B, T - 1)."""
    if labels_BT.shape != ids_BT.shape:
        raise UsageError(f"`labels` has shape {tuple(labels_BT.shape)}, expected {tuple(ids_BT.shape)}")
    targets = labels_BT[:, 1:]
    if documents is not None:  # the first token of a packed text is not predicted from the text before it
        targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)
    return targets

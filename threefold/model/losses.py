"""Losses over large vocabularies, without the logits of a whole batch.

Decisions:
- The loss is taken in float32 (float64 for a float64 model) over chunks of tokens, and never keeps the logits of a
  whole batch: for a large vocabulary they would be the largest tensor of the run.
- Where gradients are wanted the chunk's gradient is computed while its logits are at hand, so the head runs once and
  not twice. Where each token has a gradient of its own (preferences), that is known only later: there it runs twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from threefold.errors import UsageError
from threefold.model.norms import wide

IGNORED = -100
CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time: they should stay near the processor
AWAY = 16  # times as many on a GPU, which has no such nearness, and reads the whole head for each chunk


def _chunk(vocabulary: int) -> int:
    return max(64, CHUNK_BYTES // (4 * vocabulary))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, smoothing: float, needs: bool
    ) -> tuple[Tensor, Tensor]:
        """The sum, and the loss of each token, which has no gradient. `needs`: gradients are recorded at all."""
        for_hidden, for_weight, for_bias = (needs and wanted for wanted in ctx.needs_input_grad[:3])
        cast_VD, cast_V = _cast(hidden_ND, weight_VD, bias_V)
        total = hidden_ND.new_zeros((), dtype=wide(hidden_ND.dtype))
        losses_N = torch.empty_like(labels_N, dtype=total.dtype)
        dhidden = torch.empty_like(hidden_ND) if for_hidden else None
        dweight: Tensor | None = None
        dbias = torch.zeros_like(bias_V, dtype=total.dtype) if bias_V is not None and for_bias else None
        spread = smoothing / len(weight_VD)
        for part, scores in _logits(hidden_ND, cast_VD, cast_V):
            hidden, labels, logits = hidden_ND[part], labels_N[part], F.log_softmax(scores, -1)
            kept = labels != IGNORED
            at = labels.where(kept, 0)[:, None]
            losses = -logits.gather(1, at)[:, 0]
            if smoothing:
                losses = (1 - smoothing) * losses - spread * logits.sum(1)
            losses_N[part] = losses * kept
            total += losses_N[part].sum()
            if for_hidden or for_weight or for_bias:
                dlogits = logits.exp_().scatter_add_(1, at, torch.full_like(at, smoothing - 1, dtype=total.dtype))
                if smoothing:
                    dlogits.sub_(spread)
                dlogits = dlogits.mul_(kept[:, None]).to(hidden.dtype)
                if dbias is not None:
                    dbias += dlogits.sum(0, dtype=total.dtype)
                if dhidden is not None:
                    torch.mm(dlogits, cast_VD, out=dhidden[part])
                if for_weight:
                    more = dlogits.T @ hidden
                    dweight = more if dweight is None else dweight.to(total.dtype).add_(more)
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.weight_dtype, ctx.bias_dtype = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(losses_N)
        return total, losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias = ctx.saved_tensors
        return (
            None if dhidden is None else _times(dhidden, dtotal, dhidden.dtype),
            None if dweight is None else _times(dweight, dtotal, ctx.weight_dtype),
            None if dbias is None else _times(dbias[None], dtotal, ctx.bias_dtype)[0],
            None,
            None,
            None,
        )


class _CrossEntropyTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        losses_N = torch.empty_like(labels_N, dtype=wide(hidden_ND.dtype))
        for part, logits in _logits(hidden_ND, *_cast(hidden_ND, weight_VD, bias_V)):
            losses_N[part] = F.cross_entropy(logits, labels_N[part], reduction="none")
        return losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        for_hidden, for_weight, for_bias, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden_ND) if for_hidden else None
        dweight = torch.zeros_like(weight_VD, dtype=dlosses_N.dtype) if for_weight else None
        dbias = torch.zeros_like(bias_V, dtype=dlosses_N.dtype) if for_bias else None
        cast_VD, cast_V = _cast(hidden_ND, weight_VD, bias_V)
        for part, logits in _logits(hidden_ND, cast_VD, cast_V):
            at = labels_N[part, None]
            dlogits = logits.softmax(-1).scatter_add_(1, at, torch.full_like(at, -1, dtype=logits.dtype)).mul_(dlosses_N[part, None])
            if dbias is not None:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(hidden_ND.dtype)
            if dhidden is not None:
                torch.mm(dlogits, cast_VD, out=dhidden[part])
            if dweight is not None:
                dweight += dlogits.T @ hidden_ND[part]
        return (dhidden, None if dweight is None else dweight.to(weight_VD.dtype),
                None if dbias is None or bias_V is None else dbias.to(bias_V.dtype), None)


def _cast(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head in the dtype of what goes through it."""
    return weight_VD.to(hidden_ND.dtype), None if bias_V is None else bias_V.to(hidden_ND.dtype)


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The logits of chunk after chunk, in float32 or wider, of a head in the dtype of the states."""
    size = _chunk(len(weight_VD)) * (1 if weight_VD.device.type == "cpu" else AWAY)
    for start in range(0, len(hidden_ND), size):
        part = slice(start, start + size)
        yield part, F.linear(hidden_ND[part], weight_VD, bias_V).to(wide(hidden_ND.dtype))


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in the wider of the two dtypes, rounded once. A factor of no dimension would be rounded first, which
    would scale the gradient of the whole body by another number than the head's."""
    return torch.mul(gradient, factor.view(1, 1), out=torch.empty_like(gradient, dtype=dtype))


def cross_entropy_each(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, " N"],
    bias: Float[Tensor, " V"] | None = None, *, smoothing: float = 0.0, checked: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """The sum over tokens of -log softmax(hidden weight^T + bias)[label], in nats, and the loss of each token as a
    by-product without gradient, zero where the label is -100. `smoothing` gives that share of the target to all V tokens
    alike (arXiv 1512.00567). `checked`: the caller knows that the labels are good.

    The product runs in hidden's dtype, the softmax and the sum in float32 (float64 for float64). Memory does not grow
    with N x V.
    """
    if not checked:
        check_labels(labels, len(weight))
    if torch.compiler.is_compiling():
        cast = None if bias is None else bias.to(hidden.dtype)
        logits = F.linear(hidden, weight.to(hidden.dtype), cast).to(wide(hidden.dtype))
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
        return losses.sum(), losses.detach()
    needs = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _CrossEntropySum.apply(hidden, weight, bias, labels, smoothing, needs)  # type: ignore[no-untyped-call,no-any-return]


def token_losses(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int[Tensor, " N"], bias: Float[Tensor, " V"] | None = None
) -> Float[Tensor, " N"]:
    """-log softmax(hidden weight^T + bias)[label] of each token, in nats, with a gradient of its own: for losses that are no
    sum over tokens. Labels are tokens of the vocabulary. Precision and memory as of `cross_entropy_each`; the product with
    the vocabulary is made once more in the backward pass."""
    losses: Tensor = _CrossEntropyTokens.apply(hidden, weight, bias, labels)  # type: ignore[no-untyped-call]
    return losses


def check_labels(labels: Tensor, count: int, some_wrong: bool | None = None, *, classes: bool = False) -> None:
    """Raise `UsageError` for labels that are neither one of the `count` tokens of the vocabulary (of the `classes` of a
    head) nor -100. `some_wrong` is what `wrong_labels(...).any()` said, where it is known."""
    if torch.compiler.is_compiling() or not labels.numel():
        return
    if bool(wrong_labels(labels, count).any()) if some_wrong is None else some_wrong:
        place = wrong_labels(labels, count).nonzero()[0].tolist()
        what = f"none of the {count} classes" if classes else f"outside the vocabulary of {count}"
        raise UsageError(
            f"label {labels[tuple(place)].item()} at {place} is {what} (0 to {count - 1}, or {IGNORED} to ignore)",
            hint="classes are counted from 0, and a head has as many as the model was loaded with (`num_labels`)" if classes
            else "were the labels made with this model's own tokenizer?",
        )


def wrong_labels(labels: Tensor, count: int) -> Tensor:
    """True where a label is neither from 0 to `count` - 1 nor -100."""
    return ((labels < 0) & (labels != IGNORED)) | (labels >= count)

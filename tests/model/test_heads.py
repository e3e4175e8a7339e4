"""Losses and what a model returns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from threefold.errors import NumericError, UsageError
from threefold.model import heads
from threefold.model.build import build_model, scaled
from threefold.model.heads import Output, cross_entropy_each, token_losses


def inputs(
    n: int = 11, vocabulary: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (n,), generator=g)
    labels[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [3, 64])
def test_cross_entropy_is_exact_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_chunk", lambda _: chunk)
    hidden, weight, labels = inputs()
    total, losses = cross_entropy_each(hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    assert torch.allclose(total, expected, rtol=0, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_each(h, w, labels)[0] * 0.3, (hidden, weight))
    each = token_losses(hidden, weight, labels)
    assert torch.allclose(each, losses, rtol=0, atol=1e-13) and not losses.requires_grad and not each[labels == -100].any()
    with torch.no_grad():
        assert torch.allclose(cross_entropy_each(hidden, weight, labels)[0], expected, rtol=0, atol=1e-13)


def test_only_one_of_the_two_learns() -> None:
    hidden, weight, labels = inputs()
    cross_entropy_each(hidden.detach(), weight, labels)[0].backward()
    assert weight.grad is not None and hidden.grad is None
    cross_entropy_each(hidden, weight.detach(), labels)[0].backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_frozen_side_costs_no_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_chunk", lambda _: chunk)
    hidden, weight, labels = inputs()
    both = torch.autograd.grad(cross_entropy_each(hidden, weight, labels)[0], (hidden, weight))
    for i, (h, w) in enumerate(((hidden, weight.detach()), (hidden.detach(), weight))):
        total, _ = cross_entropy_each(h, w, labels)
        kept = total.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert kept[1 - i] is None and kept[i] is not None
        assert torch.equal(torch.autograd.grad(total, (hidden, weight)[i])[0], both[i])


def test_a_mean_scales_body_and_head_alike() -> None:
    hidden, weight, labels = inputs(n=12, dtype=torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    whole = torch.autograd.grad(cross_entropy_each(hidden, weight, labels)[0], (hidden, weight))
    mean = torch.autograd.grad(cross_entropy_each(hidden, weight, labels)[0] / 2999, (hidden, weight))
    for one, all_ in zip(mean, whole, strict=True):
        assert torch.equal(one, (all_.float() * (1 / torch.tensor(2999.0))).to(one.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_taken_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype=dtype)
    total, _ = cross_entropy_each(hidden, weight.detach().float().requires_grad_(), labels)
    assert total.dtype == token_losses(hidden, weight, labels).dtype == torch.float32
    total.backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype


def test_N13_logits_of_ten_thousand() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.tensor([[1e4], [-1e4]], dtype=dtype).requires_grad_()
        weight = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype).requires_grad_()
        total, _ = cross_entropy_each(hidden, weight, torch.tensor([0, 0]))
        total.backward()
        assert total.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()
        assert token_losses(hidden.detach(), weight.detach(), torch.tensor([1, 2])).isfinite().all()


def test_nothing_to_learn_from() -> None:
    model = build_model(scaled("qwen3", width=32, depth=2, vocab_size=9))
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(NumericError, match="nothing to learn from"):
        model(ids, labels=torch.full((1, 3), -100))
    with pytest.raises(NumericError):
        model(ids[:, :1], labels=ids[:, :1])
    total, each = cross_entropy_each(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.int64))
    assert each.shape == (0,) and float(total) == 0
    total, each = cross_entropy_each(torch.zeros(2, 4), torch.zeros(9, 4), torch.tensor([-100, -100]))
    assert not each.any() and float(total) == 0
    assert token_losses(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_N07_labels_outside_the_vocabulary() -> None:
    hidden, weight, labels = inputs()
    labels[3] = 7
    for function in (cross_entropy_each, token_losses):
        with pytest.raises(UsageError, match=r"label 7 at \[3\] is outside the vocabulary of 7"):
            function(hidden, weight, labels)


def test_an_output_answers_as_transformers_does() -> None:
    model = build_model(scaled("gpt2", width=32, depth=2, vocab_size=9))
    ids = torch.tensor([[1, 2, 3]])
    out = model(ids, labels=ids, use_cache=True)
    assert out[0] is out.loss is out["loss"] and out[1] is out.logits and len(out.to_tuple()) == 3
    loss, logits, cache = out
    assert len(cache) == 3 and loss.ndim == 0 and logits.shape == (1, 3, 9)
    assert isinstance(model(ids, return_dict=False), tuple) and model(ids)[0].shape == (1, 3, 9)
    assert Output().to_tuple() == () and model(ids).past_key_values is None
    assert torch.allclose(model(ids, logits_to_keep=1).logits, out.logits[:, -1:], atol=1e-6)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == 9 * 32


def test_shapes_that_do_not_fit() -> None:
    model = build_model(scaled("gpt2", width=32, depth=2, vocab_size=9, context=8))
    ids = torch.tensor([[1, 2, 3]])
    for wrong in (ids[0], ids.float(), ids[None]):
        with pytest.raises(UsageError, match="expected whole numbers of shape"):
            model(wrong)
    with pytest.raises(UsageError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(UsageError, match="labels"):
        model(ids, labels=ids[:, :2])
    with pytest.raises(UsageError, match="9 tokens is longer than the 8 positions"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    out = model(torch.zeros(1, 8, dtype=torch.int64), use_cache=True)
    with pytest.raises(UsageError, match="longer than the 8"):
        model(ids[:, :1], past_key_values=out.past_key_values)
    with pytest.raises(UsageError, match="documents"):
        model(ids, past_key_values=out.past_key_values, documents=torch.zeros(1, 3, dtype=torch.int64))

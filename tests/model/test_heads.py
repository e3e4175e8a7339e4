"""Losses, heads and what a model returns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from threefold.errors import NumericError, UsageError
from threefold.model import losses as room
from threefold.model.build import build_model, scaled
from threefold.model.heads import DenseHead, LanguageHead, Pooler, Transform
from threefold.model.losses import cross_entropy_each, token_losses
from threefold.model.norms import LayerNorm
from threefold.model.output import NAMES, Output

EXACT = 1e-13  # sums of float64 in another order


def inputs(n: int = 11, vocabulary: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (n,), generator=g)
    labels[::4] = -100
    return hidden, weight, labels


def some_bias(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_exact_in_any_chunks(chunk: int, biased: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_chunk", lambda _: chunk)
    hidden, weight, labels = inputs()
    bias = some_bias() if biased else None
    learned = [x for x in (hidden, weight, bias) if x is not None]
    total, losses = cross_entropy_each(hidden, weight, labels, bias, smoothing=smoothing)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    assert torch.allclose(total, expected, rtol=0, atol=EXACT)
    for ours, theirs in zip(torch.autograd.grad(total, learned), torch.autograd.grad(expected, learned), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    each = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(each, losses, rtol=0, atol=EXACT) and not losses.requires_grad and not losses[labels == -100].any()
    assert torch.autograd.gradcheck(
        lambda *x: cross_entropy_each(x[0], x[1], labels, x[2] if biased else None, smoothing=smoothing)[0] * 0.3, learned)
    with torch.no_grad():
        quiet, _ = cross_entropy_each(hidden, weight, labels, bias, smoothing=smoothing)
        assert torch.equal(quiet, total)


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("biased", [True, False])
def test_each_token_has_a_gradient_of_its_own(chunk: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_chunk", lambda _: chunk)
    hidden, weight, labels = inputs()
    labels, bias = labels.clamp(min=0), some_bias() if biased else None
    learned = [x for x in (hidden, weight, bias) if x is not None]
    shares = torch.randn(len(labels), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours, theirs = token_losses(hidden, weight, labels, bias), F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")
    assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    for a, b in zip(torch.autograd.grad(ours @ shares, learned), torch.autograd.grad(theirs @ shares, learned), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", ["bert", "qwen3", "t5"])
def test_tokens_without_a_label_do_not_go_through_the_head(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(scaled(family, width=32, depth=2, vocab_size=67, context=32), 0)
    ids = torch.randint(2, 67, (3, 8), generator=torch.Generator().manual_seed(0))
    usual, seen = LanguageHead.losses, []
    monkeypatch.setattr(LanguageHead, "losses", lambda self, states, *rest, **more: (seen.append(len(states)), usual(self, states, *rest, **more))[1])
    for labels in (ids, ids.where(ids % 3 == 0, -100)):
        total, rows = model.loss_rows(ids, labels)[:2]  # type: ignore[operator]
        assert seen[-1] == int((labels != -100).sum()) and torch.allclose(rows.sum(), total) and rows.shape == (3,)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_one_of_the_three_learns(which: int) -> None:
    hidden, weight, labels = inputs()
    parts = [x if i == which else x.detach() for i, x in enumerate((hidden, weight, some_bias()))]
    total, _ = cross_entropy_each(parts[0], parts[1], labels, parts[2])
    kept = total.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [i for i, x in enumerate(kept) if x is not None] == [which]  # a frozen side costs no gradient
    total.backward()
    assert [x.grad is not None for x in parts] == [i == which for i in range(3)]


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_frozen_side_changes_no_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_chunk", lambda _: chunk)
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
    masters = [x.detach().float().requires_grad_() for x in (weight, some_bias())]
    total, each = cross_entropy_each(hidden, masters[0], labels, masters[1], smoothing=0.1)
    assert total.dtype == each.dtype == torch.float32
    total.backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in masters)


def test_N13_logits_of_ten_thousand() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.tensor([[1e4], [-1e4]], dtype=dtype).requires_grad_()
        weight = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype).requires_grad_()
        for labels, smoothing in ((torch.tensor([0, 0]), 0.0), (torch.tensor([1, 2]), 0.3)):
            hidden.grad = None
            total, each = cross_entropy_each(hidden, weight, labels, smoothing=smoothing)
            total.backward()
            assert total.isfinite() and each.isfinite().all() and hidden.grad is not None and hidden.grad.isfinite().all()


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


def test_N07_labels_outside_the_vocabulary() -> None:
    hidden, weight, labels = inputs()
    labels[3] = 7
    with pytest.raises(UsageError, match=r"label 7 at \[3\] is outside the vocabulary of 7"):
        cross_entropy_each(hidden, weight, labels)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", ["gelu", "relu", None])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_language_head(own: bool, bias: bool, transform: str | None, scale: float) -> None:
    """(act(W x + c) normed, times the scale) E^T + b, and the losses of just these logits."""
    before = None if transform is None else Transform(5, 4, LayerNorm(4, 1e-5), activation=transform)
    head = LanguageHead(5 if before is None else 4, 7, own=own, bias=bias, scale=scale, transform=before).double()
    torch.manual_seed(0)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    embedding = torch.randn(7, 5 if before is None else 4, dtype=torch.float64).requires_grad_()
    hidden, _, labels = inputs()
    x = hidden
    if before is not None:
        x = {"gelu": F.gelu, "relu": F.relu}[str(transform)](x @ before.dense.weight.T + before.dense.bias)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * before.norm.weight + before.norm.bias
    logits = x @ (embedding if head.weight is None else head.weight).T * scale + (0 if head.bias is None else head.bias)
    assert (head.weight is None, head.bias is None) == (not own, not bias)
    assert torch.allclose(head(hidden, embedding), logits, rtol=0, atol=EXACT)
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=0.2)
    total, each = head.losses(hidden, embedding, labels, smoothing=0.2)
    assert torch.allclose(total, expected, rtol=0, atol=EXACT) and torch.allclose(each.sum(), expected, rtol=0, atol=EXACT)
    learned = (hidden, *head.parameters()) if own else (hidden, embedding, *head.parameters())
    for ours, theirs in zip(torch.autograd.grad(total, learned), torch.autograd.grad(expected, learned), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "tanh", "gelu", "relu"])
def test_a_dense_head_and_a_pooler(activation: str | None) -> None:
    head, pooler, (hidden, _, _) = DenseHead(5, 3, activation=activation, bias=True).double(), Pooler(5).double(), inputs()
    for p in (*head.parameters(), *pooler.parameters()):
        torch.nn.init.normal_(p)
    x = hidden
    if head.dense is not None:
        x = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}[str(activation)](x @ head.dense.weight.T + head.dense.bias)
    assert (head.dense is None) == (activation is None)
    assert torch.allclose(head(hidden), x @ head.out.weight.T + head.out.bias, rtol=0, atol=EXACT)
    pooled = torch.tanh(hidden[:1] @ pooler.dense.weight.T + pooler.dense.bias)
    assert torch.allclose(pooler(hidden[None]), pooled, rtol=0, atol=EXACT)


def test_an_output_answers_by_attribute_key_and_place() -> None:
    out = Output({"last_hidden_state": 7}, logits="l", loss=0.5, attentions=None)
    assert out.keys() == ["loss", "logits"] and out.to_tuple() == (0.5, "l") and len(out) == 2 and [*out] == [0.5, "l"]
    assert out.loss == out["loss"] == out[0] == 0.5 and out[-1] == "l" and out[:1] == (0.5,)
    assert out.last_hidden_state == out["last_hidden_state"] == 7  # aside: by name alone
    assert out.attentions is None and out["attentions"] is None
    assert "loss" in out and "attentions" not in out and out.items() == [("loss", 0.5), ("logits", "l")]
    assert out.get("loss") == 0.5 and out.get("attentions") is None and out.get("nothing", 3) == 3
    with pytest.raises(KeyError, match="nothing"):
        out["nothing"]
    for wrong in ("logit", "keys_"):
        with pytest.raises(AttributeError, match=f"no `{wrong}`"):
            getattr(out, wrong)
    with pytest.raises(IndexError):
        out[2]
    every = Output(**{name: n for n, name in enumerate(NAMES)})
    assert every.to_tuple() == tuple(range(len(NAMES))) and every.keys() == list(NAMES)
    assert Output().to_tuple() == ()


def test_an_output_answers_as_transformers_does() -> None:
    model = build_model(scaled("gpt2", width=32, depth=2, vocab_size=9))
    ids = torch.tensor([[1, 2, 3]])
    out = model(ids, labels=ids, use_cache=True)
    assert out[0] is out.loss is out["loss"] and out[1] is out.logits and len(out.to_tuple()) == 3
    loss, logits, cache = out
    assert len(cache) == 3 and loss.ndim == 0 and logits.shape == (1, 3, 9)
    assert isinstance(model(ids, return_dict=False), tuple) and model(ids)[0].shape == (1, 3, 9)
    assert model(ids).past_key_values is None
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

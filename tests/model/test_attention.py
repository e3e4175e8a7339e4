"""Every way through attention gives what the definition gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threefold.model import attention as room
from threefold.model.attention import Attention, Mask, attention, make_mask
from threefold.model.positions import Rotary

EXACT = 1e-12  # sums of float64 in another order


def plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """The definition, row by row."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(k.shape[2]) if allowed[b, t, s]]
                if seen:
                    scores = (k[b, h // group, seen] @ q[b, h, t]) * (scale or q.shape[-1] ** -0.5)
                    out[b, h, t] = scores.softmax(0) @ v[b, h // group, seen]
    return out


def tensors(
    batch: int,
    heads: int,
    shared: int,
    length: int,
    sources: int,
    width: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, h, n, width, generator=g, dtype=dtype)
        for h, n in ((heads, length), (shared, sources), (shared, sources))
    )  # type: ignore[return-value]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_against_the_definition(
    batch: int, shared: int, group: int, length: int, more: int, width: int, causal: bool, learning: bool, seed: int
) -> None:
    q, k, v = tensors(batch, shared * group, shared, length, length + more, width, seed)
    q.requires_grad_(learning)
    allowed = torch.ones(batch, length, length + more, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(more)
    assert torch.allclose(attention(q, k, v, causal=causal), plain(q, k, v, allowed), rtol=0, atol=EXACT)


@pytest.mark.parametrize("length", [64, 65, 130, 300])
@pytest.mark.parametrize("group", [1, 2])
def test_blocks_of_queries_change_nothing(length: int, group: int) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(1, 2 * group, 2, length, length, 4))
    d = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(5))
    out = attention(q, k, v, causal=True)
    expected, _ = room._composed(q, k, v, make_mask(length, length, like=q), 0.5)
    assert torch.allclose(out, expected, rtol=0, atol=EXACT)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), d), torch.autograd.grad(expected, (q, k, v), d), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, causal=True), out)
        assert torch.allclose(
            room._fused(q, k, v, make_mask(length, length, like=q), 0.5), expected, rtol=0, atol=EXACT
        )


def test_documents_and_masks() -> None:
    q, k, v = tensors(2, 4, 2, 7, 7, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
    same = documents[:, :, None] == documents[:, None, :]
    triangle = torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.allclose(
        attention(q, k, v, causal=True, documents=documents), plain(q, k, v, same & triangle), rtol=0, atol=EXACT
    )
    keep = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    assert torch.allclose(attention(q, k, v, mask=keep), plain(q, k, v, keep[:, 0]), rtol=0, atol=EXACT)
    added = torch.zeros(7, 7, dtype=torch.float64).masked_fill(~keep[0, 0], -math.inf)
    assert torch.allclose(
        attention(q, k, v, mask=added, causal=True),
        plain(q, k, v, (keep[:1, 0] & triangle).expand(2, 7, 7)),
        rtol=0,
        atol=EXACT,
    )
    assert torch.allclose(
        attention(q, k, v, scale=0.3), plain(q, k, v, torch.ones(2, 7, 7, dtype=torch.bool), 0.3), rtol=0, atol=EXACT
    )
    bias = torch.randn(7, 7, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    assert torch.allclose(attention(q, k, v, mask=bias), expected, rtol=0, atol=EXACT)


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """exp(score) / sum(exp(score)) over what may be seen, (B, H, T, S) as it stands; zeros where that is nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhte,bhse->bhts", q, k) * scale
    if bias is not None:
        allowed = allowed & (bias != -math.inf)
        scores = scores + bias.masked_fill(bias == -math.inf, 0)
    weights = scores.exp() * allowed
    return torch.einsum("bhts,bhse->bhte", weights / (weights.sum(-1, keepdim=True) + ~allowed.any(-1, keepdim=True)), v)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("way", ["explicit", "fused"])
def test_any_mask_against_the_definition(way: str, data: st.DataObject) -> None:
    batch, shared, group = (data.draw(st.integers(1, most)) for most in (2, 3, 3))
    heads, length = shared * group, data.draw(st.one_of(st.integers(1, 12), st.integers(60, 300)))
    packed = data.draw(st.booleans())
    sources = length if packed or data.draw(st.booleans()) else data.draw(st.integers(1, 300))
    causal, kind = data.draw(st.booleans()), data.draw(st.sampled_from(["none", "boolean", "added", "added and closed"]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = (t.requires_grad_() for t in tensors(batch, heads, shared, length, sources, 4, g.initial_seed()))
    allowed = torch.ones(batch, heads, length, sources, dtype=torch.bool)
    documents = mask = None
    if causal:
        allowed = allowed.tril(sources - length)
    if packed:
        documents = torch.randint(0, 2, (batch, length), generator=g).cumsum(1)
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    if kind != "none":
        shape = [n if data.draw(st.booleans()) else 1 for n in (batch, heads, length, sources)]
        while shape and shape[0] == 1 and data.draw(st.booleans()):  # axes of one may be left out in front
            del shape[0]
        closed = torch.rand(shape, generator=g) < 0.3
        mask = torch.randn(shape, generator=g, dtype=torch.float64).masked_fill_(closed & ("closed" in kind), -math.inf)
        if kind == "boolean":
            mask = ~closed
            allowed = allowed & mask
    learned = [q, k, v]
    if mask is not None and kind != "boolean":
        learned.append(mask.requires_grad_())
    expected = written_out(q, k, v, allowed, None if kind == "boolean" else mask, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        if way == "fused":
            patch.setattr(room, "KEPT_LIMIT", 0)
        out = attention(q, k, v, causal=causal, documents=documents, mask=mask)
        with torch.no_grad():
            quiet = attention(q, k, v, causal=causal, documents=documents, mask=mask)
    assert torch.allclose(out, expected, rtol=0, atol=EXACT) and torch.allclose(quiet, expected, rtol=0, atol=EXACT)
    d = torch.randn(out.shape, dtype=out.dtype, generator=g)
    for ours, theirs in zip(
        torch.autograd.grad(out, learned, d), torch.autograd.grad(expected, learned, d), strict=True
    ):
        assert ours.isfinite().all() and torch.allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_learns_alone(dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 4, 2, 5, 5, 4, dtype=dtype)
    bias = torch.zeros(4, 5, 5, requires_grad=True)  # as a relative position bias: for each head, in the masters' dtype
    attention(q, k, v, mask=bias).float().square().sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32 and bias.grad.any()


def test_a_module_hands_a_learned_bias_its_gradient() -> None:
    module, _ = modules(True, 2)
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    out, _ = module(x, None, Mask(False, bias))
    expected, _ = module(x, None, Mask(False, bias), with_probabilities=True)
    frozen, _ = module(x, None, Mask(False, bias.detach()))
    assert torch.allclose(out, expected, rtol=0, atol=EXACT) and torch.allclose(frozen, expected, rtol=0, atol=EXACT)
    ours, theirs = (torch.autograd.grad(o.square().sum(), bias)[0] for o in (out, expected))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [5, 300])
def test_a_module_takes_padding_for_all_queries_alike(length: int) -> None:
    module, _ = modules(True, 2)
    x = torch.randn(2, length, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keys = (torch.arange(length) < torch.tensor([[length], [3]])).long()
    mask = make_mask(length, length, like=x, causal=False, sources_BS=keys)
    out, expected = module(x, None, mask)[0], module(x, None, mask, with_probabilities=True)[0]
    assert torch.allclose(out, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("way", ["explicit", "fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_N10_a_row_that_may_see_nothing_gives_zeros(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(2, 2, 1, 5, 5, 4, dtype=dtype))
    if way == "fused":
        monkeypatch.setattr(room, "KEPT_LIMIT", 0)
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    allowed[0, 0, 2] = False
    allowed[1] = False
    if way == "composed":
        out, probabilities = room._composed(q, k, v, make_mask(5, 5, like=q, causal=False, allowed=allowed), 0.5)
        assert not probabilities[1].any()
    else:
        out = attention(q, k, v, mask=allowed)
    assert not out[0, :, 2].any() and not out[1].any() and out[0, :, 1].all()
    out.float().square().sum().backward()
    for t in (q, k, v):
        assert t.grad is not None and t.grad.isfinite().all() and not t.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_N13_extreme_scores_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 2, 2, 70, 70, 8, dtype=torch.float32)
    q, k, v = (q * 100).to(dtype), (k * 100).to(dtype), v.to(dtype).requires_grad_()
    out = attention(q, k, v, causal=True)
    out.sum().backward()
    assert out.isfinite().all() and v.grad is not None and v.grad.isfinite().all()


def test_gradcheck_of_the_public_function() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 1, 5, 7, 3))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, causal=True), (q, k, v), fast_mode=False)


def modules(qk_norm: bool, shared: int) -> tuple[Attention, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    module = Attention(
        12, 4, shared, 6, layer=0, bias=True, qk_norm_eps=1e-6 if qk_norm else None, dropout=0.0
    ).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.4)
    rotary = Rotary(6, 100.0, None, 64)

    def composed(x: Tensor) -> Tensor:
        tables = rotary(None, x.shape[1], x)
        out, _ = module(x, tables, make_mask(x.shape[1], x.shape[1], like=x), with_probabilities=True)
        return out  # type: ignore[no-any-return]
    return module, composed


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 6, 70])
def test_the_joint_function_equals_its_parts(qk_norm: bool, shared: int, length: int) -> None:
    module, composed = modules(qk_norm, shared)
    x = torch.randn(2, length, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tables = Rotary(6, 100.0, None, 64)(None, length, x)
    out, _ = module(x, tables, make_mask(length, length, like=x))
    expected = composed(x)
    assert torch.allclose(out, expected, rtol=0, atol=EXACT)
    d = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    wanted = (x, *module.parameters())
    for ours, theirs in zip(torch.autograd.grad(out, wanted, d), torch.autograd.grad(expected, wanted, d), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck_of_the_joint_function() -> None:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 4, 4 * 4, dtype=torch.float64, generator=g).requires_grad_()
    w1, w2 = (torch.rand(4, dtype=torch.float64, generator=g).add(0.5).requires_grad_() for _ in range(2))
    tables = Rotary(4, 100.0, None, 64)(None, 4, qkv)
    assert torch.autograd.gradcheck(
        lambda x, a, b: room._Mix.apply(x, a, b, 1e-6, *tables, None, 2, 1, True, 0.5), (qkv, w1, w2)
    )
    assert torch.autograd.gradcheck(
        lambda x: room._Mix.apply(x, None, None, 0.0, None, None, None, 2, 1, True, 0.5), (qkv,)
    )


def test_shapes_that_do_not_fit() -> None:
    q, k, v = tensors(1, 3, 2, 4, 4, 2)
    with pytest.raises(ValueError, match="multiple of K"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(q[:, :2, :2], k, v, documents=torch.zeros(1, 2, dtype=torch.int64))
    for shape in ((3, 4), (1, 1, 1, 1, 4), (3, 4, 4), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match="does not broadcast"):
            attention(q[:, :2], k, v, mask=torch.zeros(shape))

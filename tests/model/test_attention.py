"""Every way through attention gives what the definition gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threefold.model import attention as room
from threefold.model.attention import Attention, CrossAttention, attention
from threefold.model.cache import Cache
from threefold.model.mask import Mask, make_mask, triangle
from threefold.model.positions import Rotary

EXACT = 1e-12  # sums of float64 in another order
AnyAttention = TypeVar("AnyAttention", Attention, CrossAttention)


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
    each = (room.expanded(t, q.shape[1]) for t in (k, v))  # as on a GPU
    assert torch.allclose(torch.nn.functional.scaled_dot_product_attention(q, *each, bias), expected, rtol=0, atol=EXACT)


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


def filled(module: AnyAttention) -> AnyAttention:
    """In float64, with values that hide nothing."""
    torch.manual_seed(0)
    for p in module.double().parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.4)
    return module


def modules(qk_norm: bool, shared: int, scale: float = 0.4) -> tuple[Attention, Callable[[Tensor], Tensor]]:
    module = filled(Attention(
        12, 4, shared, 6, layer=0, bias=True, out_bias=False, scale=scale, window=0, qk_norm_eps=1e-6 if qk_norm else None,
        dropout=0.0))
    rotary = Rotary(6, 100.0, None, 64)

    def composed(x: Tensor) -> Tensor:
        tables = rotary(None, x.shape[1], x)
        out, _ = module(x, tables, make_mask(x.shape[1], x.shape[1], like=x), with_probabilities=True)
        return out  # type: ignore[no-any-return]
    return module, composed


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 6, 70])
@pytest.mark.parametrize("scale", [6**-0.5, 1.0])
def test_the_joint_function_equals_its_parts(qk_norm: bool, shared: int, length: int, scale: float) -> None:
    module, composed = modules(qk_norm, shared, scale)
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


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 400])
@pytest.mark.parametrize(("length", "sources"), [(9, 9), (1, 9), (4, 9), (300, 300)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_band_is_a_plain_mask(window: int, length: int, sources: int, causal: bool) -> None:
    """A query at place t sees places t - window + 1 to t, and those behind it where nothing hides the future."""
    q, k, v = (t.requires_grad_() for t in tensors(2, 4, 2, length, sources, 3))
    place = torch.arange(sources)
    behind = (place[None] - place[sources - length:, None]).expand(2, -1, -1)  # how far a key stands ahead of its query
    allowed = (behind > -window) & ((behind <= 0) | (not causal))
    out = room.attend(q, k, v, make_mask(length, sources, like=q, causal=causal, window=window), 0.5)
    expected = written_out(q, k, v, allowed[:, None], None, 0.5)
    assert torch.allclose(out, expected, rtol=0, atol=EXACT)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), (q, k, v)),
                            torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_a_mask_that_restricts_nothing_is_no_tensor() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert make_mask(5, 9, like=like) == Mask(True)
    assert make_mask(5, 9, like=like, window=9) == Mask(True)  # a band as wide as the text
    assert make_mask(5, 9, like=like, causal=False) == Mask(False)
    assert make_mask(5, 5, like=like, documents_BT=torch.zeros(1, 5)).dead is None  # each token sees itself


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_a_mask_and_a_bias_are_added(window: int, padded: bool) -> None:
    q, k, v = tensors(2, 4, 2, 5, 8, 3)
    keys = torch.ones(2, 8)
    keys[1, :6] = 0  # some queries see nothing at all
    mask = make_mask(5, 8, like=q, sources_BS=keys if padded else None, window=window)
    bias = torch.randn(1, 4, 5, 8, dtype=q.dtype, generator=torch.Generator().manual_seed(3)).requires_grad_()
    place = torch.arange(8)
    ahead = (place[None] - place[3:, None]).expand(2, -1, -1)
    allowed = (ahead <= 0) & (ahead > -(window or 8)) & ((keys != 0)[:, None] | (not padded))
    joined = mask.plus(bias, 5)
    assert joined.learned and not mask.learned
    assert torch.allclose(room.attend(q, k, v, joined, 0.5), written_out(q, k, v, allowed[:, None], bias, 0.5), rtol=0, atol=EXACT)


def test_a_triangle_ends_at_the_last_key() -> None:
    made = triangle(2, 4, torch.float64, torch.device("cpu"))
    assert made.tolist() == [[0.0, 0.0, 0.0, -math.inf], [0.0, 0.0, 0.0, 0.0]]


def crossing(shared: int) -> CrossAttention:
    return filled(CrossAttention(12, 4, shared, 6, layer=0, bias=True, out_bias=True, scale=0.3, dropout=0.0))


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("length", [1, 5, 80])
def test_attention_to_another_text(shared: int, length: int) -> None:
    module, g = crossing(shared), torch.Generator().manual_seed(1)
    x, memory = (torch.randn(2, n, 12, dtype=torch.float64, generator=g).requires_grad_() for n in (length, 7))
    keys = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    mask = make_mask(length, 7, like=x, causal=False, sources_BS=keys)
    q = (x @ module.q.weight.T + module.q.bias).view(2, length, 4, 6).transpose(1, 2)
    k, v = (memory @ module.kv.weight.T + module.kv.bias).view(2, 7, 2 * shared, 6).transpose(1, 2).split(shared, 1)
    allowed = (keys != 0)[:, None, None].expand(2, 1, length, 7)
    read = written_out(q, k, v, allowed, None, 0.3).transpose(1, 2).reshape(2, length, 24)
    expected = read @ module.out.weight.T + module.out.bias
    out, none = module(x, memory, mask)
    shown, probabilities = module(x, memory, mask, with_probabilities=True)
    assert none is None and probabilities.shape == (2, 4, length, 7) and not probabilities[1, ..., 4:].any()
    assert torch.allclose(out, expected, rtol=0, atol=EXACT) and torch.allclose(shown, expected, rtol=0, atol=EXACT)
    wanted, d = (x, memory, *module.parameters()), torch.randn(out.shape, dtype=out.dtype, generator=g)
    for ours, theirs in zip(torch.autograd.grad(out, wanted, d), torch.autograd.grad(expected, wanted, d), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_another_text_is_read_once() -> None:
    """With a cache, keys and values are those of the first call, whatever is handed in later."""
    module, g = crossing(2), torch.Generator().manual_seed(1)
    x, memory = (torch.randn(2, n, 12, dtype=torch.float64, generator=g) for n in (5, 7))
    mask, cache = make_mask(1, 7, like=x, causal=False), Cache()
    with torch.no_grad():
        whole, _ = module(x, memory, make_mask(5, 7, like=x, causal=False))
        steps = [module(x[:, t:t + 1], memory if t == 0 else memory * 0, mask, cache=cache)[0] for t in range(5)]
        turned, _ = module(x[[1, 0], :1], memory, mask, cache=cache.fork([1, 0]))
    assert torch.allclose(torch.cat(steps, 1), whole, rtol=0, atol=EXACT)
    assert torch.allclose(turned, whole[[1, 0], :1], rtol=0, atol=EXACT)


@pytest.mark.parametrize("way", ["explicit", "fused", "composed"])
@pytest.mark.parametrize(("length", "sources"), [(5, 3), (70, 3), (300, 1)])
def test_queries_before_every_key_see_nothing(way: str, length: int, sources: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 1, length, sources, 4))
    expected = written_out(q, k, v, torch.ones(1, 1, length, sources, dtype=torch.bool).tril(sources - length), None, 0.5)
    if way == "fused":
        monkeypatch.setattr(room, "KEPT_LIMIT", 0)
    out = room._composed(q, k, v, make_mask(length, sources, like=q), 0.5)[0] if way == "composed" else attention(q, k, v, causal=True)
    assert not out[:, :, :length - sources].any() and torch.allclose(out, expected, rtol=0, atol=EXACT)
    for ours in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert ours.isfinite().all()


def test_shapes_that_do_not_fit() -> None:
    q, k, v = tensors(1, 3, 2, 4, 4, 2)
    with pytest.raises(ValueError, match="multiple of K"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(q[:, :2, :2], k, v, documents=torch.zeros(1, 2, dtype=torch.int64))
    for shape in ((3, 4), (1, 1, 1, 1, 4), (3, 4, 4), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match="does not broadcast"):
            attention(q[:, :2], k, v, mask=torch.zeros(shape))


@pytest.mark.parametrize(("length", "sources"), [(9, 9), (300, 300), (1, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_probabilities_are_dropped_in_every_way_alike(length: int, sources: int, causal: bool) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(2, 4, 2, length, sources, 3))
    keys, mask = torch.tensor([5, -3]), make_mask(length, sources, like=q, causal=causal)
    out = room.attend(q, k, v, mask, 0.5, 0.3, keys)
    expected, _ = room._composed(q, k, v, mask, 0.5, 0.3, keys)
    assert torch.allclose(out, expected, rtol=0, atol=EXACT) and not torch.allclose(out, room.attend(q, k, v, mask, 0.5))
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), (q, k, v)),
                            torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)
    with torch.no_grad():
        assert torch.allclose(room.attend(q, k, v, mask, 0.5, 0.3, keys), expected, rtol=0, atol=EXACT)

"""Norms, positions, feed-forward, dropout and cache, each by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from threefold import seeds
from threefold.model.block import SITES
from threefold.model.cache import Cache
from threefold.model.dropout import dropout, fresh_keys, site_keys
from threefold.model.feedforward import FeedForward, _SwiGLU
from threefold.model.norms import LayerNorm, RMSNorm, _RMSNorm
from threefold.model.positions import Learned, RelativeBias, Rotary, Sinusoidal, frequencies, rotate, rotate_back
from threefold.model.stack import Types


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rms_norm_gradcheck_and_definition() -> None:
    x, w = randn(3, 4, 6).requires_grad_(), randn(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _RMSNorm.apply(a, b, 1e-5), (x, w))
    y = _RMSNorm.apply(x, w, 1e-5)
    assert torch.allclose(y, x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w, rtol=0, atol=1e-14)


def test_rms_norm_without_gradients_is_the_same_bits() -> None:
    norm = RMSNorm(16, 1e-6)
    torch.nn.init.normal_(norm.weight)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = randn(5, 16, dtype=torch.float32).to(dtype)
        with torch.no_grad():
            quiet = norm(x)
        assert quiet.dtype == dtype and torch.equal(quiet, norm(x))


def test_N13_norm_of_extremes_is_finite() -> None:
    norm = RMSNorm(8, 1e-6)
    torch.nn.init.ones_(norm.weight)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.full((2, 8), 3e4, dtype=dtype).requires_grad_()
        norm(x).sum().backward()
        assert norm(x).isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert norm(torch.zeros(1, 8)).isfinite().all()


def test_layer_norm_follows_the_dtype_of_the_activations() -> None:
    norm = LayerNorm(8, 1e-5)
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    assert norm(randn(2, 8, dtype=torch.float32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_its_definition(bias: bool) -> None:
    norm, x = LayerNorm(8, 1e-5, bias=bias).double(), randn(3, 8)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert (norm.bias is not None) == bias
    assert torch.allclose(norm(x), expected + (0 if norm.bias is None else norm.bias), rtol=0, atol=1e-14)


def test_rotation_is_an_isometry_and_relative() -> None:
    rotary = Rotary(8, 10000.0, None, 64)
    x, y = randn(1, 12, 8), randn(1, 12, 8, seed=1)
    cos, sin = rotary(None, 12, x)
    turned = rotate(x, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-13)
    assert torch.allclose(rotate_back(turned, cos, sin), x, rtol=0, atol=1e-14)
    far = rotary(torch.arange(100, 112)[None], 12, x)
    near = turned @ rotate(y, cos, sin).mT
    assert torch.allclose(near, rotate(x, *far) @ rotate(y, *far).mT, rtol=0, atol=1e-11)


def test_tables_are_kept_and_equal_to_those_of_given_positions() -> None:
    rotary, like = Rotary(6, 500.0, {"rope_type": "linear", "factor": 2.0}, 64), torch.zeros(1)
    kept = rotary(None, 9, like)
    assert rotary(None, 9, like)[0] is kept[0]
    given = rotary(torch.arange(9)[None], 9, like)
    assert torch.equal(kept[0], given[0]) and torch.equal(kept[1], given[1])
    for length in range(1, 30):
        rotary(None, length, like)
    assert len(rotary._kept) <= 8


def test_scaled_frequencies() -> None:
    plain, one = frequencies(16, 1e4, None, 512, torch.float64)
    assert one == 1.0 and plain[0] == 1
    linear, _ = frequencies(16, 1e4, {"rope_type": "linear", "factor": 4.0}, 512, torch.float64)
    assert torch.equal(linear, plain / 4)
    llama3, _ = frequencies(
        16,
        1e4,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        512,
        torch.float64,
    )
    assert llama3[0] == plain[0] and torch.allclose(llama3[-1], plain[-1] / 8) and (llama3 <= plain).all()
    yarn, factor = frequencies(16, 1e4, {"rope_type": "yarn", "factor": 4.0}, 512, torch.float64)
    assert math.isclose(factor, 0.1 * math.log(4) + 1) and (yarn <= plain).all() and (yarn >= plain / 4).all()


LONG = {"rope_type": "longrope", "short_factor": (1.0, 1.5, 2.0), "long_factor": (1.0, 3.0, 8.0), "original_max_position_embeddings": 16}


def test_a_long_text_turns_by_other_waves() -> None:
    """Up to the old context the short factors hold, beyond it the long ones, for every token of the text."""
    rotary, like = Rotary(6, 1e4, LONG, 64), torch.zeros(1, dtype=torch.float64)
    powers = torch.tensor([1e4 ** (2 * i / 6) for i in range(3)], dtype=torch.float64)
    factor = math.sqrt(1 + math.log(64 / 16) / math.log(16))
    for length, key in ((1, "short_factor"), (16, "short_factor"), (17, "long_factor"), (64, "long_factor")):
        angles = torch.arange(length, dtype=torch.float64)[:, None] / (torch.tensor(LONG[key], dtype=torch.float64) * powers)
        cos, sin = rotary(None, length, like)
        assert torch.allclose(cos[0], torch.cat([angles.cos(), angles.cos()], -1) * factor, rtol=0, atol=1e-14), length
        assert torch.allclose(sin[0], torch.cat([-angles.sin(), angles.sin()], -1) * factor, rtol=0, atol=1e-14)
        given = rotary(torch.arange(length)[None], length, like)
        assert torch.equal(cos, given[0]) and torch.equal(sin, given[1])
    late, whole = rotary(torch.tensor([[16]]), 1, like), rotary(None, 17, like)
    assert torch.equal(late[0], whole[0][:, 16:])  # one token, and the text behind it is long


def test_the_factor_of_a_longrope() -> None:
    for changes, context, expected in (({}, 16, 1.0), ({}, 64, math.sqrt(1.5)), ({"factor": 16.0}, 64, math.sqrt(2)),
                                       ({"attention_factor": 1.2}, 64, 1.2), ({"factor": 0.5}, 64, 1.0)):
        assert math.isclose(frequencies(6, 1e4, {**LONG, **changes}, context, torch.float64, 9)[1], expected)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_begin_behind_their_offset(offset: int) -> None:
    module, like = Learned(5, 4, offset), torch.zeros(1, dtype=torch.float32)
    torch.nn.init.normal_(module.weight)
    assert module.weight.shape == (5 + offset, 4) and module.count == 5
    assert torch.equal(module(None, 3, like), module.weight[offset:offset + 3][None])
    places = torch.tensor([[0, 4], [1, 0]])
    assert torch.equal(module(places, 2, like), module.weight[places + offset])
    assert module(None, 3, like.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [8, 7])
def test_waves_against_a_plain_loop(width: int) -> None:
    module, like, half = Sinusoidal(width), torch.zeros(1, dtype=torch.float64), (width + 1) // 2
    rows = []
    for place in range(40):
        angles = [place / 10000 ** (2 * i / width) for i in range(half)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles][:width // 2])
    expected = torch.tensor(rows, dtype=torch.float64).float().double()  # as published tables hold them
    assert torch.allclose(module(None, 40, like)[0], expected, rtol=0, atol=6e-8)  # a last bit of float32 may fall otherwise
    places = torch.tensor([[39, 0, 7]])
    assert torch.equal(module(places, 3, like)[0], module(None, 40, like)[0, places[0]])
    assert module(None, 3, like.bfloat16()).dtype == torch.bfloat16 and not list(module.parameters())


def plain_bucket(ahead: int, buckets: int, most: int, both_ways: bool) -> int:
    """The paper's, in whole numbers: a distance d is in the n-th wide bucket from where (d / near)^wide >= (most / near)^n."""
    first = buckets // 2 if both_ways and ahead > 0 else 0
    count = buckets // 2 if both_ways else buckets
    distance = abs(ahead) if both_ways else max(-ahead, 0)
    near = count // 2
    if distance < near:
        return first + distance
    wide = count - near
    n = max(n for n in range(wide + 1) if distance**wide * near**n >= near**wide * most**n)
    return first + near + min(n, wide - 1)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 12), (4, 100), (6, 7)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_against_a_plain_loop(buckets: int, most: int, both_ways: bool) -> None:
    module = RelativeBias(buckets, most, 3, both_ways=both_ways)
    torch.nn.init.normal_(module.weight)
    ahead = torch.arange(-300, 301)
    assert module.bucket(ahead).tolist() == [plain_bucket(a, buckets, most, both_ways) for a in ahead.tolist()]
    bias = module(3, 40, module.weight)
    assert bias.shape == (1, 3, 3, 40)
    for t in range(3):
        for s in range(40):
            row = plain_bucket(s - (37 + t), buckets, most, both_ways)  # queries stand at the end of the keys
            assert torch.equal(bias[0, :, t, s], module.weight[row])


def test_kinds_of_segments() -> None:
    module, like = Types(2, 4), torch.zeros(1)
    torch.nn.init.normal_(module.weight)
    kinds = torch.tensor([[0, 1, 1]])
    assert torch.equal(module(kinds, like), module.weight[kinds]) and torch.equal(module(None, like), module.weight[0])
    assert torch.equal(module(None, like), module(kinds * 0, like)[0, 0]) and module(None, like.half()).dtype == torch.float16


def test_swiglu_gradcheck_and_definition() -> None:
    x = randn(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(_SwiGLU.apply, (x,))
    assert torch.allclose(_SwiGLU.apply(x), F.silu(x[..., :4]) * x[..., 4:], rtol=0, atol=1e-15)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_with_and_without_gradients(activation: str, gated: bool) -> None:
    module = FeedForward(6, 10, activation=activation, gated=gated, bias=True).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = randn(2, 3, 6)
    with torch.no_grad():
        quiet = module(x)
    assert torch.allclose(module(x), quiet, rtol=0, atol=1e-12)


def test_dropout_is_a_function_of_key_and_place() -> None:
    x, keys = torch.ones(4, 50, 8), torch.tensor([seeds.key(0, "dropout", 1, i) for i in range(4)])
    y = dropout(x, 0.25, keys)
    assert torch.equal(y, dropout(x, 0.25, keys))
    assert torch.equal(y[1:3], dropout(x[1:3], 0.25, keys[1:3]))  # other micro-batches, the same masks
    assert torch.equal(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(dropout(x, 0.25, site_keys(keys, 1)), dropout(x, 0.25, site_keys(keys, 2)))
    assert dropout(x, 0.0, keys) is x and dropout(x, 0.5, None) is x


def test_every_layer_of_a_deep_model_has_its_own_masks() -> None:
    keys, sites = torch.tensor([0, 123456789, -1]), 2 * (SITES * 48 + 1)  # two stacks of 48 layers and an entrance
    each = [site_keys(keys, site) for site in range(sites)]
    assert len({key for row in each for key in row.tolist()}) == 3 * sites
    masks = {tuple((dropout(torch.ones(3, 64), 0.5, row) != 0).flatten().tolist()) for row in each}
    assert len(masks) == sites
    known = {0: -617921740455118770, 11: -3877753736267136580, 13: -3613900419581457774, 24: 7870356892497954025}
    assert {site: int(each[site][0]) for site in known} == known  # a run that resumes keeps its masks


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_should(p: float) -> None:
    y = dropout(torch.ones(8, 20_000), p, fresh_keys(8, torch.device("cpu")))
    kept = (y != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 6 * math.sqrt(p * (1 - p) / 160_000)
    pairs = ((y[:, 1:] != 0) == (y[:, :-1] != 0)).double().mean().item()  # neighbours are independent
    assert abs(pairs - (p * p + (1 - p) ** 2)) < 0.01


def test_cache_appends_grows_forks_and_trims() -> None:
    cache, rows = Cache(capacity=2), randn(2, 3, 11, 4)
    assert len(cache) == 0
    for start, stop in ((0, 1), (1, 5), (5, 11)):
        for layer in range(2):
            k, v = cache.append(layer, rows[:, :, start:stop] + layer, rows[:, :, start:stop] - layer)
            assert torch.equal(k, rows[:, :, :stop] + layer) and torch.equal(v, rows[:, :, :stop] - layer)
        assert len(cache) == cache.get_seq_length() == stop
    fork = cache.fork([1, 1, 0])
    cache.trim(4)
    k, _ = cache.append(0, torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    assert k.shape[2] == 5 and not k[:, :, 4].any()
    k, _ = fork.append(0, torch.zeros(3, 3, 1, 4), torch.zeros(3, 3, 1, 4))
    assert torch.equal(k[:, :, :11], rows[[1, 1, 0]])
    with pytest.raises(ValueError, match="trim"):
        fork.trim(99)


def test_cache_holds_what_an_encoder_has_read() -> None:
    cache, text = Cache(), randn(2, 3, 5, 4)
    k, v = cache.memory(0, lambda: (text, -text))
    assert k is text and torch.equal(v, -text)
    assert cache.memory(0, lambda: pytest.fail("it is read once")) == (k, v)
    assert torch.equal(cache.memory(1, lambda: (text + 1, text))[0], text + 1) and len(cache) == 0  # each layer its own
    fork = cache.fork([1, 1])
    assert torch.equal(fork.memory(0, lambda: pytest.fail("it is read once"))[0], text[[1, 1]])

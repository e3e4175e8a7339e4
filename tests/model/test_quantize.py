"""Weights in few bits: how near they are, what they take, and that what is beside them learns as beside the restored ones."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.parity.test_peft import ROWS, logits, made, stirred
from threefold.errors import ModelError, UsageError
from threefold.model import adapters
from threefold.model.linear import Linear
from threefold.model.lowrank import Shape
from threefold.model.quantize import BITS, Quantized, quantize, stored_bytes
from threefold.model.weights import save_model

each = pytest.mark.parametrize("name, task", ROWS, ids=[f"{name}-{task}" for name, task in ROWS])
few = pytest.mark.parametrize("bits", BITS)


def restored(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with plain weights of the values that the codes stand for."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, Quantized):
            module.weight = torch.nn.Parameter(module.restored(torch.float64), requires_grad=False)
            module.__class__ = Linear
    return plain


@each
@few
def test_adapters_learn_beside_codes_as_beside_the_weights_they_stand_for(name: str, task: str, bits: int) -> None:
    model = made(name, task, torch.float64)
    quantize(model, bits)
    adapters.attach(model, Shape(3, 6.0))
    stirred(model)
    plain = restored(model)
    found, expected = (_gradients(one) for one in (model, plain))
    assert found.keys() == expected.keys() and any(".side." in path for path in found)
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, expected[path], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-10, atol=1e-10)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from tests.parity.test_peft import ids_of

    model(**ids_of(model)).logits.square().sum().backward()
    return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


@few
@pytest.mark.parametrize("shape", [(5, 8), (16, 64), (3, 192), (1, 2), (7, 96)])
def test_no_weight_is_further_off_than_half_a_step(bits: int, shape: tuple[int, int]) -> None:
    model = made("qwen3", "causal")
    linear = next(m for path, m in model.named_modules() if isinstance(m, Linear) and ".blocks." in path)
    torch.manual_seed(0)
    values = torch.randn(shape) * torch.logspace(-4, 2, shape[0])[:, None]
    linear.weight = torch.nn.Parameter(values.clone())
    quantize(model, bits)
    assert isinstance(linear, Quantized)
    near = linear.restored(torch.float32)
    step = linear.scale if bits == 8 else linear.scale.repeat_interleave(shape[1] // linear.scale.shape[1], 1)
    assert bool(((near - values).abs() <= step * 0.5001 + 1e-9).all())
    if bits == 8:  # the largest of a row is met
        most = values.abs().argmax(1, keepdim=True)
        torch.testing.assert_close(near.gather(1, most), values.gather(1, most))


def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_is_refused() -> None:
    for bits in BITS:
        model = made("qwen3", "causal")
        linear = next(m for path, m in model.named_modules() if isinstance(m, Linear) and ".blocks." in path)
        with torch.no_grad():
            linear.weight[0] = 0
        quantize(model, bits)
        assert isinstance(linear, Quantized) and not linear.restored(torch.float32)[0].any()
        other = made("qwen3", "causal")
        with torch.no_grad():
            next(m for path, m in other.named_modules() if isinstance(m, Linear) and ".blocks." in path).weight[1, 1] = float("nan")
        with pytest.raises(ModelError, match="not finite"):
            quantize(other, bits)


@few
def test_it_takes_less_and_says_what_it_is(bits: int, tmp_path: object) -> None:
    model = made("qwen3", "causal")
    before, count = stored_bytes(model), model.num_parameters()
    inside = sum(m.weight.numel() for path, m in model.named_modules() if isinstance(m, Linear) and ".blocks." in path)
    error = quantize(model, bits)
    assert 0 < error < (0.02 if bits == 8 else 0.15)
    assert model.num_parameters() == count
    assert before - stored_bytes(model) > inside * (4 - bits / 8 - 8 / 32 - 0.2)
    with pytest.raises(UsageError, match="quantised weights cannot be saved"):
        save_model(model, str(tmp_path))
    adapters.attach(model, Shape(2, 4.0))
    with pytest.raises(UsageError, match="cannot be merged"):
        adapters.merge(model)
    with pytest.raises(UsageError, match="3 bits"):
        quantize(model, 3)

"""AdamW against torch's, Muon against the definition written down plainly, state against itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.faults.kit import tiny_model
from threefold.model.build import matrix_parts
from threefold.model.tensors import read_safetensors, write_safetensors
from threefold.training import optim
from threefold.training.optim import AdamW, Muon, Optimizer, clip_gradients, orthogonalise

EXACT = 1e-12  # in float64, of numbers around one, after a few steps


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- orthogonalise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (48, 8), (8, 48), (1, 5), (5, 1), (1, 1)])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever the scale; the interval is the one that the five rounds were made for."""
    for scale in (1e-3, 1.0, 1e4):
        out = orthogonalise((scale * random(1, *shape)).to(dtype))
        assert out.dtype == dtype and out.shape == (1, *shape)
        values = torch.linalg.svdvals(out[0].double())
        assert float(values.min()) > 0.3 and float(values.max()) < 1.3


def test_singular_vectors_are_kept() -> None:
    u, _, v = torch.linalg.svd(random(12, 6), full_matrices=False)
    given = u @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5], dtype=torch.float64)) @ v
    inner = u.mT @ orthogonalise(given[None])[0] @ v.mT
    assert float((inner - torch.diag(inner.diagonal())).abs().max()) < EXACT
    assert bool((inner.diagonal() > 0.6).all())


def test_zero_and_rank_one_matrices() -> None:
    assert not orthogonalise(torch.zeros(2, 4, 3)).any()
    assert not orthogonalise(torch.zeros(2, 3, 4, dtype=torch.float64)).any()
    one = orthogonalise(random(1, 9, 1) @ random(1, 1, 4))
    assert torch.linalg.svdvals(one[0])[1] < 1e-10 and one.isfinite().all()


def test_a_stack_is_its_parts() -> None:
    stack = random(5, 6, 9)
    assert torch.allclose(orthogonalise(stack), torch.cat([orthogonalise(m[None]) for m in stack]), rtol=0, atol=EXACT)
    assert torch.equal(orthogonalise(stack[:1]), -orthogonalise(-stack[:1]))


# -- Muon --------------------------------------------------------------------------------------------------------------


def plain_muon(
    weight: Tensor, gradients: list[Tensor], parts: tuple[int, ...], lr: float, decay: float, momentum: float
) -> Tensor:
    """Muon as its description says, one matrix at a time."""
    weight, buffer = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        nesterov = (1 - momentum) * gradient + momentum * buffer
        weight = weight * (1 - lr * decay)
        pieces = []
        for piece in torch.split(nesterov, list(parts)):
            x = piece if len(piece) <= piece.shape[1] else piece.mT
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x if len(piece) <= piece.shape[1] else x.mT
            pieces.append(x * max(1.0, len(piece) / piece.shape[1]) ** 0.5)
        weight = weight - lr * torch.cat(pieces)
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_what_its_description_says(decay: float) -> None:
    shapes = {"a": (24, 8), "b": (8, 24), "c": (8, 8), "d": (24, 8)}
    parts = {"a": (8, 8, 8), "d": (16, 8)}
    named = {name: nn.Parameter(random(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    before = {name: p.detach().clone() for name, p in named.items()}
    muon = Muon(named, parts, lr=0.05, weight_decay=decay)
    gradients = {name: [random(*shapes[name], seed=10 * i + n) for n in range(4)] for i, name in enumerate(shapes)}
    for n in range(4):
        for name, p in named.items():
            p.grad = gradients[name][n].clone()
        muon.step(0.5, 0.9)
    for name, p in named.items():
        expected = plain_muon(before[name], gradients[name], parts.get(name, (len(p),)), 0.025, decay, 0.9)
        assert torch.allclose(p, expected, rtol=0, atol=EXACT), name


@pytest.mark.slow  # `torch.optim.Muon` brings torch's compiler with it
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_torchs_where_the_settings_coincide() -> None:
    """torch computes in bfloat16 and its momentum is the same average: equal to that precision, for steps of 0.05."""
    for shape in ((16, 16), (32, 8), (8, 32)):
        ours, theirs = (
            nn.Parameter(random(*shape, dtype=torch.float32)),
            nn.Parameter(random(*shape, dtype=torch.float32)),
        )
        muon = Muon({"w": ours}, {}, lr=0.05, weight_decay=0.1)
        other = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True)
        for n in range(5):
            ours.grad = random(*shape, seed=n, dtype=torch.float32)
            theirs.grad = ours.grad.clone()
            muon.step(1.0, 0.95)
            other.step()  # type: ignore[no-untyped-call]
        assert float((ours - theirs).detach().abs().max()) < 0.05 * 5 * 0.02 * max(1.0, shape[0] / shape[1]) ** 0.5


# -- AdamW -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    named = {"matrix": nn.Parameter(random(5, 4)), "vector": nn.Parameter(random(7))}
    other = copy.deepcopy(named)
    ours = AdamW(named, lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
    theirs = torch.optim.AdamW(
        [{"params": [other["matrix"]], "weight_decay": decay}, {"params": [other["vector"]], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for n in range(20):
        factor = 1 / (1 + n)
        for name in named:
            named[name].grad = random(*named[name].shape, seed=n)
            other[name].grad = random(*named[name].shape, seed=n)
        for group in theirs.param_groups:
            group["lr"] = 0.01 * factor
        ours.step(factor)
        theirs.step()
    for name in named:
        assert torch.allclose(named[name], other[name], rtol=0, atol=EXACT)


# -- the two together --------------------------------------------------------------------------------------------------


def optimizer_of(model: nn.Module, *, pure: bool = False) -> Optimizer:
    return Optimizer(model, {} if pure else matrix_parts(model), lr=0.02, adamw_lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]


def some_steps(model: nn.Module, optimizer: Optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        for i, p in enumerate(model.parameters()):
            p.grad = random(*p.shape, seed=100 * step + i, dtype=torch.float32)
        optimizer.step(0.7, step)
        optimizer.zero_grad()


@pytest.mark.parametrize("pure", [False, True])
def test_state_goes_through_safetensors_bit_for_bit(tmp_path: pytest.TempPathFactory, pure: bool) -> None:
    path = tmp_path / "optimizer.safetensors"  # type: ignore[operator]
    model = tiny_model()
    optimizer = optimizer_of(model, pure=pure)
    some_steps(model, optimizer, 0, 3)
    write_safetensors(path, optimizer.state())
    other = copy.deepcopy(model)
    some_steps(model, optimizer, 3, 3)
    again = optimizer_of(other, pure=pure)
    again.load(read_safetensors(path))
    some_steps(other, again, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in optimizer.state().items())


def test_who_has_what() -> None:
    model = tiny_model()
    optimizer = optimizer_of(model)
    assert all("blocks" in name and p.ndim == 2 for name, p in optimizer.muon.named.items())
    assert {*optimizer.muon.named, *optimizer.adamw.named} == {name for name, _ in model.named_parameters()}
    assert optimizer.adamw.weight_decay == 0.0 and optimizer_of(model, pure=True).adamw.weight_decay == 0.1
    assert optimizer_of(model, pure=True).peak == 0.02 and len(optimizer.parameters) == len(list(model.parameters()))
    with pytest.raises(KeyError):
        optimizer.load(optimizer_of(model, pure=True).state())


def test_a_parameter_that_no_loss_reached_keeps_in_step() -> None:
    """It decays like the rest, and its state is that of a gradient of zero."""
    model, other = tiny_model(), tiny_model()
    ours, theirs = optimizer_of(model), optimizer_of(other)
    for m, o in ((model, ours), (other, theirs)):
        some_steps(m, o, 0, 1)
        for i, (name, p) in enumerate(m.named_parameters()):
            silent = name.endswith(("blocks.1.attention.qkv.weight", "norm.weight"))
            p.grad = (
                None
                if silent and m is model
                else torch.zeros_like(p)
                if silent
                else random(*p.shape, seed=i, dtype=torch.float32)
            )
        o.step(1.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_momentum_rises_to_its_end() -> None:
    values = [optim.momentum(step) for step in range(0, 5000, 50)]
    assert values[0] == pytest.approx(optim.FIRST_MOMENTUM) and values[-1] == optim.LAST_MOMENTUM
    assert values == sorted(values)


def test_clipping() -> None:
    parameters = [
        nn.Parameter(torch.zeros(3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)),
        nn.Parameter(torch.zeros(1)),
    ]

    def gradients(scale: float) -> None:
        parameters[0].grad = scale * torch.tensor([1.0, 2, 2], dtype=torch.float64)
        parameters[1].grad = scale * torch.full((2, 2), 2.0, dtype=torch.float64)

    def norm() -> float:
        return math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None))

    for scale, limit, after in ((1.0, 1.0, 1.0), (0.1, 1.0, 0.5), (1.0, 0.0, 5.0)):
        gradients(scale)
        assert float(clip_gradients(parameters, limit)) == pytest.approx(5 * scale)
        assert norm() == pytest.approx(after, rel=1e-5)
    for bad in (float("nan"), float("inf")):
        gradients(1.0)
        assert parameters[0].grad is not None
        parameters[0].grad[1] = bad
        assert not clip_gradients(parameters, 1.0).isfinite()

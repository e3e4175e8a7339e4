"""Laws of what is not computed: padding, what stands behind the last place that counts, all but the one place that is judged, and the
products of an adapter beside those of its base. None of it changes a result. A new family adds a row to FAMILIES and nothing here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.rows import CELLS, DECODERS, PAIRS, alone, labelled, near, random_model, some_ids
from threefold.model import adapters, padding
from threefold.model.linear import Linear
from threefold.model.lowrank import Shape
from threefold.model.padding import Layout, layout_of

DROPS = {"embd_pdrop": 0.2, "resid_pdrop": 0.2, "attention_dropout": 0.2}
LONG = (9, 3, 5, 1)  # tokens of the rows of a batch
judging = pytest.mark.parametrize("family", [family for family, task in CELLS if task == "classify"])
sides = pytest.mark.parametrize("side", ["left", "right"])


def mask_of(side: str) -> Tensor:
    """Which tokens of a batch are no padding."""
    place = torch.arange(max(LONG)).expand(len(LONG), -1)
    return (place < torch.tensor(LONG)[:, None] if side == "right" else place >= max(LONG) - torch.tensor(LONG)[:, None]).long()


def both_ways(monkeypatch: pytest.MonkeyPatch, found: Callable[[], tuple[Tensor, dict[str, Tensor]]]) -> int:
    """A result and its gradients are the same with and without a layout; how many there were."""
    made: list[Layout] = []

    def counted(*given: Any, **more: Any) -> Layout | None:
        layout = layout_of(*given, **more)
        made.extend([] if layout is None else [layout])
        return layout
    with monkeypatch.context() as patch:
        patch.setattr("threefold.model.transformer.layout_of", counted)
        spared, gradients = found()
    with monkeypatch.context() as patch:
        patch.setattr(padding, "at_hand", lambda x: False)
        whole, expected = found()
    assert near(spared, whole) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert bool((gradient - expected[name]).abs().max() <= 1e-10 * max(1.0, float(expected[name].abs().max()))), name
    return len(made)


def gradients_of(model: Any, result: Tensor) -> dict[str, Tensor]:
    """Of all parameters, of a sum in which every number counts otherwise."""
    model.zero_grad()
    (result * torch.arange(1.0, result.numel() + 1, dtype=result.dtype).view(result.shape).cos()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@alone
@sides
@pytest.mark.parametrize("drops", [{}, DROPS])
def test_states_of_tokens_do_not_need_those_of_padding(family: str, side: str, drops: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does dropout: a token's mask is that of its place in its row."""
    model, ids, mask = random_model(family, **drops), some_ids(len(LONG), max(LONG)), mask_of(side)
    model.train(bool(drops))

    def found() -> tuple[Tensor, dict[str, Tensor]]:
        states = model.hidden(ids, attention_mask=mask, dropout_keys=torch.arange(len(LONG)) * 77) * mask[..., None]
        return states.detach(), gradients_of(model, states)
    assert both_ways(monkeypatch, found) == 1


@pytest.mark.parametrize("family", [*DECODERS, *PAIRS])
@pytest.mark.parametrize("drops", [{}, DROPS])
def test_a_loss_does_not_need_what_stands_behind_its_last_label(family: str, drops: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(family, **drops).train(bool(drops)), some_ids(len(LONG), max(LONG))
    labels = ids.where(mask_of("right") != 0, -100)
    labels[0, 2] = -100  # a gap is no end
    read = {"attention_mask": mask_of("right")} if family in PAIRS else {}

    def found() -> tuple[Tensor, dict[str, Tensor]]:
        total, rows = model.loss_rows(ids, labels, dropout_keys=torch.arange(len(LONG)) * 77, **read)
        return rows.detach(), gradients_of(model, total)
    assert both_ways(monkeypatch, found) == (2 if family in PAIRS else 1)


@judging
@sides
def test_the_last_layer_works_out_the_one_place_that_is_judged(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are those of a pass that was asked for all states."""
    model, mask = random_model(family, task="classify"), mask_of(side)
    ids = labelled(model, some_ids(len(LONG), max(LONG)))["input_ids"]
    if family in PAIRS:  # which judge at the end of a text, and every text has one
        ids = ids.where(mask != 0, 0).scatter(1, (mask * torch.arange(max(LONG))).argmax(1)[:, None], 1)

    def found(**asked: Any) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
        def once() -> tuple[Tensor, dict[str, Tensor]]:
            logits = model(ids, attention_mask=mask, **asked).logits
            return logits.detach(), gradients_of(model, logits)
        return once
    assert both_ways(monkeypatch, found()) >= 1
    (spared, gradients), (whole, expected) = found()(), found(output_hidden_states=True)()
    assert near(spared, whole)
    assert all(near(gradients[name], expected[name], 1e-10) for name in gradients if expected[name].abs().max() > 1e-9)


def test_a_layout_moves_tokens_and_gradients() -> None:
    needed = torch.tensor([[True, True, False], [False, True, False]])
    layout, x = Layout(needed), torch.arange(6.0).view(2, 3, 1).requires_grad_()
    flat = layout.flat(x)
    assert flat.flatten().tolist() == [0, 1, 4]
    assert layout.restored(flat).flatten().tolist() == [0, 1, 0, 0, 4, 0]
    assert layout.apart(flat)[needed].flatten().tolist() == [0, 1, 4]
    (layout.apart(flat) * torch.arange(1.0, 7).view(2, 3, 1)).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 2, 0, 0, 5, 0]


@pytest.mark.parametrize(("share", "made"), [(0, False), (1, False), (8, True)])
def test_a_layout_is_made_where_it_gains_something(share: int, made: bool) -> None:
    mask = torch.ones(4, 8)
    mask[0, 8 - share:] = 0
    assert (layout_of(mask, mask, None, causal=False) is not None) == made
    assert (layout_of(mask, None, None, causal=True) is not None) == made


@alone
def test_an_adapter_in_the_weight_is_an_adapter_beside_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations have another dtype than the weights, the two become one product; the sum is rounded as the weight is."""
    model, ids = random_model(family, torch.float32), some_ids(2, 9)
    adapters.attach(model, Shape(3, 6.0))
    for name, p in model.named_parameters():
        if ".side." in name:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    model.compute_dtype = torch.float64

    def found() -> tuple[Tensor, dict[str, Tensor]]:
        states = model.hidden(ids)
        return states.detach(), gradients_of(model, states)
    (folded, gradients) = found()
    monkeypatch.setattr(Linear, "folds", False)
    (beside, expected) = found()
    assert not torch.equal(folded, beside) and near(folded, beside, 2e-6)
    assert gradients.keys() == expected.keys() and any(".side." in name for name in gradients)
    for name, gradient in gradients.items():
        assert near(gradient, expected[name], 1e-5), name

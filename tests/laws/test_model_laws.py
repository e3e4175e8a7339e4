"""Laws that hold for every family. A new family adds a row to FAMILIES and nothing here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from threefold.errors import UsageError
from threefold.model.build import build_model, scaled
from threefold.model.cache import Cache
from threefold.model.config import TransformerConfig
from threefold.model.families import FAMILIES
from threefold.model.language import CausalLM
from threefold.model.losses import cross_entropy_each
from threefold.model.tensors import read_safetensors
from threefold.model.weights import load_model, save_model

SUMS = 1e-12     # float64 sums in another order, relative to the largest logit
families = pytest.mark.parametrize("family", FAMILIES)


def small(family: str, **changes: object) -> TransformerConfig:
    config = scaled(family, width=32, depth=2, vocab_size=53, context=160)
    extra: dict[str, object] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "gpt2" else 2,
        "head_dim": 8,
        **changes,
    }
    return dataclasses.replace(config, **extra)  # type: ignore[arg-type]


def random_model(family: str, dtype: torch.dtype = torch.float64, **changes: object) -> CausalLM:
    """All parameters random, so that nothing hides behind zeros."""
    model = build_model(small(family, **changes), 0, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2 + (p.ndim == 1))
    return model.eval()


def some_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(53, (rows, length), generator=torch.Generator().manual_seed(seed))


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= SUMS * b.abs().max())


@families
@pytest.mark.parametrize("length", [9, 140])
@pytest.mark.parametrize("learning", [True, False])
def test_no_leak_from_the_future(family: str, length: int, learning: bool) -> None:
    model, ids = random_model(family), some_ids(2, length)
    with torch.set_grad_enabled(learning):
        before = model(ids).logits
        for cut in (1, length // 2, length - 1):
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 7) % 53
            after = model(changed).logits
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


@families
@pytest.mark.parametrize("learning", [True, False])
def test_packed_texts_do_not_see_each_other(family: str, learning: bool) -> None:
    model = random_model(family)
    a, b, c = some_ids(1, 5, 1), some_ids(1, 80, 2), some_ids(1, 1, 3)
    packed = torch.cat([a, b, c], 1)
    documents = torch.tensor([[0] * 5 + [1] * 80 + [2]])
    with torch.set_grad_enabled(learning):
        whole = model(packed, documents=documents).logits
        apart = torch.cat([model(x).logits for x in (a, b, c)], 1)
        assert near(whole, apart)
        changed = packed.clone()
        changed[:, :5] = (changed[:, :5] + 1) % 53
        assert torch.equal(model(changed, documents=documents).logits[:, 5:], whole[:, 5:])


@families
def test_gradients_of_packed_texts_are_those_of_each(family: str) -> None:
    model = random_model(family)
    a, b = some_ids(1, 6, 1), some_ids(1, 9, 2)
    documents = torch.tensor([[0] * 6 + [1] * 9])
    labels_a, labels_b = (torch.cat([x[:, 1:], torch.tensor([[-100]])], 1) for x in (a, b))
    model.loss_sum(torch.cat([a, b], 1), torch.cat([labels_a, labels_b], 1), documents=documents)[0].backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for x, y in ((a, labels_a), (b, labels_b)):
        model.loss_sum(x, y)[0].backward()
    for one, p in zip(whole, model.parameters(), strict=True):
        assert p.grad is not None and torch.allclose(one, p.grad, rtol=0, atol=1e-11)


@families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_N08_the_content_of_padding_changes_nothing_bitwise(family: str, side: str, dtype: torch.dtype) -> None:
    model, ids = random_model(family, dtype), some_ids(3, 12)
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 12)):
        mask[row, :n] = 0
    mask = mask.flip(1) if side == "right" else mask
    filled = torch.where(mask == 1, ids, (ids + 11) % 53)
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            a, b = model(ids, attention_mask=mask).logits, model(filled, attention_mask=mask).logits
        assert a.isfinite().all() and b.isfinite().all()
        assert torch.equal(a[mask == 1], b[mask == 1])


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_N11_the_length_of_padding_changes_nothing(family: str, side: str) -> None:
    model, ids = random_model(family), some_ids(1, 7)
    alone = model(ids).logits
    for n in (1, 6):
        padding, ones, zeros = torch.full((1, n), 3), torch.ones_like(ids), torch.zeros(1, n, dtype=torch.int64)
        order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
        out = model(order(padding, ids), attention_mask=order(zeros, ones)).logits
        assert near(out[:, n:] if side == "left" else out[:, :7], alone)


@families
def test_N11_cached_is_full(family: str) -> None:
    model, ids = random_model(family), some_ids(2, 150)
    with torch.no_grad():
        full = model(ids).logits
        for cuts in ([0, 70, 71, 72, 150], [0, 1, 2, 3, 100, 150]):
            cache = Cache(capacity=3)
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(cuts)]
            assert near(torch.cat(parts, 1), full)
        cache.trim(100)
        assert near(model(ids[:, 100:], past_key_values=cache.fork([0, 1])).logits, full[:, 100:])


@families
def test_N11_cached_with_padding_on_the_left(family: str) -> None:
    model, ids = random_model(family), some_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        cache = Cache()
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 6), (6, 7), (7, 10))
        ]
        out = torch.cat(parts, 1)
        assert near(out[mask == 1], full[mask == 1])
        assert near(model(ids[1:, 4:]).logits, full[1:, 4:])


@families
def test_a_row_does_not_know_its_batch(family: str) -> None:
    model, ids = random_model(family), some_ids(4, 20)
    whole = model(ids).logits
    for row in range(4):
        assert near(model(ids[row:row + 1]).logits, whole[row:row + 1])
    assert near(model(ids.flip(0)).logits.flip(0), whole)


@families
def test_N08_short_batches(family: str) -> None:
    model = random_model(family)
    assert model(some_ids(1, 1)).logits.shape == (1, 1, 53)
    assert model(some_ids(3, 1)).logits.isfinite().all()
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(UsageError, match="holds no tokens"):
            model(torch.zeros(shape, dtype=torch.int64))
    assert model(some_ids(2, 4), attention_mask=torch.zeros(2, 4)).logits.isfinite().all()


@families
def test_N07_an_id_outside_the_vocabulary(family: str) -> None:
    model, ids = random_model(family), some_ids(2, 6)
    for wrong in (53, -1, 10**12):
        ids[1, 4] = wrong
        with pytest.raises(UsageError, match=rf"id {wrong} at row 1, position 4 .* vocabulary of 53") as caught:
            model(ids)
        assert "tokenizer" in caught.value.hint
    with pytest.raises(UsageError, match="outside the vocabulary"):
        model(some_ids(2, 6), labels=torch.full((2, 6), 53))


@families
def test_N07_a_batch_is_checked_before_the_pass_in_one_transfer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transfer makes a GPU wait. `tolist` brings many numbers at once; `item`, `bool` and `int` bring one."""
    waits: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(str(op))
            return op(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (waits.append("tolist"), tolist(self))[1])
    model, ids = random_model(family), some_ids(2, 9)
    mask, labels, places = torch.ones_like(ids), ids.clone(), torch.arange(9).expand(2, 9)
    mask[0, :2], labels[0, :3] = 0, -100
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    for run in (
        lambda: model.loss_rows(ids, labels),
        lambda: model.loss_rows(ids, labels, places, documents),
        lambda: model.loss_rows(ids, labels, None, documents),
        lambda: model.hidden(ids, places, attention_mask=mask),
        lambda: model.hidden(ids, attention_mask=mask, cache=Cache()),
        lambda: model(ids, labels=labels, attention_mask=mask, position_ids=places, documents=documents),
    ):
        waits.clear()
        with Counting():
            run()
        assert waits == ["tolist"]
    with monkeypatch.context() as patch:  # what is wrong is said before anything is looked up
        patch.setattr(torch.nn.functional, "embedding", None)
        for wrong, words in (({"input_ids": ids + 53, "labels": labels}, "token id"), ({"input_ids": ids, "labels": labels + 53}, "label")):
            for call in (model.loss_rows, model):
                with pytest.raises(UsageError, match=f"{words} .* outside the vocabulary of 53"):
                    call(**wrong)


@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_bitwise(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(family, dtype, tie_word_embeddings=dtype == torch.float32)
    save_model(model, tmp_path / "a", None)
    again = load_model(tmp_path / "a")
    assert again.config == model.config and again.dtype == dtype and not again.notes
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    save_model(again, tmp_path / "b", None)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert read_safetensors(tmp_path / "a" / "model.safetensors")


@families
def test_gradients_against_differences(family: str) -> None:
    """A random direction through all parameters at once, in float64."""
    model, ids = random_model(family), some_ids(2, 8)
    labels = torch.roll(ids, -1, 1)
    labels[0, 3] = -100
    parameters = list(model.parameters())
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
        for i, p in enumerate(parameters)
    ]
    model.loss_sum(ids, labels)[0].backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(model.loss_sum(ids, labels)[0]))
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-6 * abs(slope)


@families
def test_the_ways_to_a_loss_agree(family: str) -> None:
    model, ids = random_model(family), some_ids(2, 9)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    total, count = model.loss_sum(ids, shifted)
    assert count == 16 and torch.allclose(total / count, model(ids, labels=ids).loss, rtol=0, atol=1e-12)
    hidden = model.hidden(ids)
    assert torch.equal(model.head(hidden), model(ids).logits)
    again, _ = cross_entropy_each(hidden.flatten(0, 1), model.head_weight, shifted.flatten())
    assert torch.equal(total, again)


@families
def test_dropout_does_not_depend_on_the_micro_batch(family: str) -> None:
    changes: dict[str, object] = {"attention_dropout": 0.3}
    if family == "gpt2":
        changes |= {"resid_pdrop": 0.2, "embd_pdrop": 0.1}
    model, ids = random_model(family, **changes).train(), some_ids(4, 9)
    keys = torch.arange(4) * 77
    whole = model(ids, dropout_keys=keys).logits
    parts = torch.cat([model(ids[a:b], dropout_keys=keys[a:b]).logits for a, b in ((0, 1), (1, 4))])
    assert near(parts, whole)
    assert not near(model(ids, dropout_keys=keys + 1).logits, whole)
    assert not torch.equal(model(ids).logits, model(ids).logits)  # without keys, torch's generator
    model.eval()
    assert torch.equal(model(ids, dropout_keys=keys).logits, model(ids).logits)


@families
def test_half_precision_is_near_and_masters_stay_wide(family: str) -> None:
    model, ids = random_model(family, torch.float32), some_ids(2, 70)
    wide = model.loss_sum(ids, ids)[0]
    model.compute_dtype = torch.bfloat16
    total, count = model.loss_sum(ids, ids)
    (total / count).backward()
    assert total.dtype == torch.float32 and abs(float((total / wide).detach()) - 1) < 0.03
    assert all(
        p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )
    assert model(ids).logits.dtype == torch.bfloat16


@families
def test_two_models_of_one_seed_are_one(family: str) -> None:
    config = small(family)
    a, b, c = build_model(config, 3), build_model(config, 3), build_model(config, 4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    deeper = dict(
        build_model(dataclasses.replace(config, num_hidden_layers=3, initializer_range=None), 3).named_parameters()
    )
    for name, p in build_model(dataclasses.replace(config, initializer_range=None), 3).named_parameters():
        assert torch.equal(p, deeper[name])  # one layer more changes no other


@families
@pytest.mark.parametrize("width", [64, 128, 512])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [65, 512, 4096])
def test_a_new_model_knows_nothing(family: str, width: int, tied: bool, vocab_size: int) -> None:
    """Its loss is that of guessing; far above, it would be sure of something wrong: of its own input, for instance."""
    config = scaled(family, width=width, depth=3, vocab_size=vocab_size, context=96)
    model = build_model(dataclasses.replace(config, tie_word_embeddings=tied), 0)
    ids = torch.randint(vocab_size, (2, 97), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        total, count = model.loss_sum(ids[:, :-1], ids[:, 1:])
    assert abs(float(total) / count - math.log(vocab_size)) < 0.3


@pytest.mark.slow  # importing the compiler alone takes two seconds
@families
def test_the_composed_form_can_be_traced(family: str) -> None:
    model, ids = random_model(family), some_ids(2, 9)
    expected = model(ids).logits
    torch.compiler.reset()
    compiled = torch.compile(lambda x: model.head(model.hidden(x)), backend="aot_eager", fullgraph=True)
    out = compiled(ids)
    assert near(out, expected)
    out.sum().backward()

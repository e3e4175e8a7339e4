"""Laws of what a token sees. A new family adds a row to FAMILIES and nothing here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.rows import (
    ENCODERS,
    PAIRS,
    SUMS,
    alone,
    answer,
    arguments,
    cells,
    ended,
    families,
    loss_of,
    near,
    other,
    random_model,
    some_ids,
    writers,
)
from threefold.errors import UsageError
from threefold.model.cache import Cache
from threefold.model.families import FAMILIES
from threefold.model.output import Output

sides = pytest.mark.parametrize("side", ["left", "right"])


@writers
@pytest.mark.parametrize("length", [9, 140])
@pytest.mark.parametrize("learning", [True, False])
def test_no_leak_from_the_future(family: str, length: int, learning: bool) -> None:
    model, ids, read = random_model(family), some_ids(2, length), some_ids(2, 12, 5)
    with torch.set_grad_enabled(learning):
        before = answer(model, ids, read=read)
        for cut in (1, length // 2, length - 1):
            after = answer(model, torch.cat([ids[:, :cut], other(ids[:, cut:])], 1), read=read)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert (before[:, cut:] != after[:, cut:]).any(-1).all()


@pytest.mark.parametrize("family", [*ENCODERS, *PAIRS])
@pytest.mark.parametrize("length", [9, 140])
def test_what_is_read_is_seen_from_everywhere(family: str, length: int) -> None:
    model, ids = random_model(family), some_ids(2, length)
    before = answer(model, some_ids(2, 6, 5), read=ids) if family in PAIRS else answer(model, ids)
    for place in (0, length // 2, length - 1):
        changed = ids.clone()
        changed[:, place] = other(changed[:, place])
        after = answer(model, some_ids(2, 6, 5), read=changed) if family in PAIRS else answer(model, changed)
        different = before != after
        assert (different.any(-1) if different.ndim == 3 else different).all()


@alone
@pytest.mark.parametrize("learning", [True, False])
def test_packed_texts_do_not_see_each_other(family: str, learning: bool) -> None:
    model = random_model(family)
    a, b, c = some_ids(1, 5, 1), some_ids(1, 80, 2), some_ids(1, 1, 3)
    packed, documents = torch.cat([a, b, c], 1), torch.tensor([[0] * 5 + [1] * 80 + [2]])
    with torch.set_grad_enabled(learning):
        whole = model.hidden(packed, documents=documents)
        assert near(whole, torch.cat([model.hidden(x) for x in (a, b, c)], 1))
        changed = torch.cat([other(a), b, other(c)], 1)
        assert torch.equal(model.hidden(changed, documents=documents)[:, 5:85], whole[:, 5:85])


@alone
def test_gradients_of_packed_texts_are_those_of_each(family: str) -> None:
    model = random_model(family)
    a, b = some_ids(1, 6, 1), some_ids(1, 9, 2)
    weights = torch.randn(1, 15, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (model.hidden(torch.cat([a, b], 1), documents=torch.tensor([[0] * 6 + [1] * 9])) * weights).sum().backward()
    body = dict(model.transformer.named_parameters())
    whole = {name: p.grad.clone() for name, p in body.items()}
    model.zero_grad()
    for x, part in ((a, weights[:, :6]), (b, weights[:, 6:])):
        (model.hidden(x) * part).sum().backward()
    assert all(near(whole[name], p.grad, 1e-11) for name, p in body.items())


@families
@sides
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_N08_the_content_of_padding_changes_nothing_bitwise(family: str, side: str, dtype: torch.dtype) -> None:
    """One row has none, one some, one nothing else; an encoder-decoder has them in what it reads and in what it writes."""
    model, ids = random_model(family, dtype), some_ids(3, 12)
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 12)):
        mask[row, :n] = 0
    mask = mask.flip(1) if side == "right" else mask
    filled = torch.where(mask == 1, ids, other(ids))
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            a, b = answer(model, ids, mask=mask), answer(model, filled, mask=mask)
        assert a.isfinite().all() and b.isfinite().all()
        assert torch.equal(a[mask == 1], b[mask == 1]) and not torch.equal(answer(model, filled)[1], answer(model, ids)[1])


@families
@sides
def test_N11_the_length_of_padding_changes_nothing(family: str, side: str) -> None:
    model, ids = random_model(family), some_ids(1, 7)
    expected = answer(model, ids)
    for n in (1, 6):
        padding, ones, zeros = torch.full((1, n), 3), torch.ones_like(ids), torch.zeros(1, n, dtype=torch.int64)
        order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
        out = answer(model, order(padding, ids), mask=order(zeros, ones))
        assert near(out[:, n:] if side == "left" else out[:, :7], expected)


@pytest.mark.parametrize("family", PAIRS)
@sides
def test_a_text_to_read_may_be_padded_alone(family: str, side: str) -> None:
    """The decoder's own text has no padding then, and nothing of what it writes changes."""
    model, read, ids = random_model(family), some_ids(1, 7), some_ids(1, 5, 2)
    expected = model(read, decoder_input_ids=ids).logits
    filled, mask = torch.cat([read, some_ids(1, 4, 3)], 1), torch.tensor([[1] * 7 + [0] * 4])
    if side == "left":
        filled, mask = filled.roll(4, 1), mask.roll(4, 1)
    assert near(model(filled, attention_mask=mask, decoder_input_ids=ids).logits, expected)
    assert not near(model(filled, decoder_input_ids=ids).logits, expected)


def stepper(model: Any, read: Tensor) -> Callable[..., Tensor]:
    """Logits of tokens behind a cache; what an encoder-decoder reads is read once."""
    if not model.config.is_encoder_decoder:
        return lambda ids, cache, **more: model(ids, past_key_values=cache, **more).logits
    encoded = Output(last_hidden_state=model(read, decoder_input_ids=read[:, :1]).encoder_last_hidden_state)
    return lambda ids, cache, attention_mask=None: model(
        decoder_input_ids=ids, encoder_outputs=encoded, past_key_values=cache, decoder_attention_mask=attention_mask).logits


@writers
def test_N11_cached_is_full(family: str) -> None:
    model, ids, read = random_model(family), some_ids(2, 150), some_ids(2, 12, 5)
    with torch.no_grad():
        step, full = stepper(model, read), answer(model, ids, read=read)
        for cuts in ([0, 70, 71, 72, 150], [0, 1, 2, 3, 100, 150]):
            cache = Cache(capacity=3)
            parts = [step(ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
            assert near(torch.cat(parts, 1), full)
        cache.trim(100)
        assert near(step(ids[:, 100:], cache.fork([0, 1])), full[:, 100:])
        turned = cache.fork([1, 0])  # rows change places, and with them the texts that were read
        assert near(step(ids[[1, 0], 100:], turned), full[[1, 0], 100:])


@writers
def test_N11_cached_with_padding_on_the_left(family: str) -> None:
    model, ids, read = random_model(family), some_ids(2, 10), some_ids(2, 12, 5)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        step, cache = stepper(model, read), Cache()
        parts = [step(ids[:, a:b], cache, attention_mask=mask[:, :b]) for a, b in ((0, 6), (6, 7), (7, 10))]
        out = torch.cat(parts, 1)
        assert near(out[0], answer(model, ids, read=read)[0])
        assert near(out[1:, 4:], answer(model, ids[1:, 4:], read=read[1:]))


@families
def test_a_row_does_not_know_its_batch(family: str) -> None:
    model, ids = random_model(family), some_ids(4, 20)
    whole = answer(model, ids)
    for row in range(4):
        assert near(answer(model, ids[row:row + 1]), whole[row:row + 1])
    assert near(answer(model, ids.flip(0)).flip(0), whole)


@families
def test_N08_short_batches(family: str) -> None:
    model = random_model(family)
    assert answer(model, some_ids(1, 1)).shape[:2] == (1, 1)
    assert answer(model, some_ids(3, 1)).isfinite().all()
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(UsageError, match="holds no tokens"):
            answer(model, torch.zeros(shape, dtype=torch.int64))
    assert answer(model, some_ids(2, 4), mask=torch.zeros(2, 4)).isfinite().all()


@cells
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_N10_a_text_that_is_all_padding_attends_to_nothing(family: str, task: str, dtype: torch.dtype) -> None:
    """Zeros and no NaN: in its attention on every side, in what comes out, in the loss and in every gradient."""
    model, ids = random_model(family, dtype, task), some_ids(3, 12)
    if model.task == "classify" and family == "t5":
        ids = ended(ids)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1] = 0
    with torch.no_grad():
        out = model(**arguments(model, ids, mask=mask), output_attentions=True)
    names = ["attentions", "decoder_attentions", "cross_attentions", "encoder_attentions"]
    if model.task == "classify" and family == "t5":
        names.remove("decoder_attentions")  # there the decoder is given the text without a mask, as in transformers
    shown = [layer for name in names for layer in getattr(out, name) or ()]
    assert len(shown) >= 2
    for layer in shown:
        assert not layer[1].any() and layer.isfinite().all()
        assert near(layer[2].sum(-1), torch.ones_like(layer[2, ..., 0]), 0.02 if dtype == torch.bfloat16 else SUMS)
    loss = loss_of(model, ids, mask)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if "classify" in row.heads])
def test_N11_a_judgement_does_not_depend_on_padding(family: str) -> None:
    """Wherever the head reads: at the last token, at the end of the text; at its first token padding cannot stand before it."""
    model, ids = random_model(family, task="classify"), some_ids(2, 7)
    ids = ended(ids) if family == "t5" else ids
    expected = model(ids).logits
    for side in ("right", "left") if model.reads == "last" else ("right",):
        for n in (1, 6):
            order = (lambda a, b: torch.cat([b, a], 1)) if side == "left" else (lambda a, b: torch.cat([a, b], 1))
            mask = order(torch.ones_like(ids), torch.zeros(2, n, dtype=torch.int64))
            a, b = (model(order(ids, filling), attention_mask=mask).logits for filling in (some_ids(2, n, 3) // 2 + 2, some_ids(2, n, 4) // 2 + 2))
            assert torch.equal(a, b) and near(a, expected)


@cells
def test_a_text_without_padding_needs_no_mask(family: str, task: str) -> None:
    model, ids = random_model(family, task=task), some_ids(2, 9)
    ids = ended(ids) if task == "classify" else ids
    with torch.no_grad():
        a, b = (model(**arguments(model, ids, mask=mask)) for mask in (None, torch.ones_like(ids)))
    assert a.keys() == b.keys()
    for key in a.keys():  # noqa: SIM118 (an output counts its places)
        assert torch.equal(a[key], b[key]), key

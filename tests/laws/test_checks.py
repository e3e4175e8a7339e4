"""Laws of what is refused before a pass, and of what the looking costs. A new family adds a row to FAMILIES and nothing here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.laws.rows import CELLS, DECODERS, PAIRS, VOCABULARY, arguments, cells, families, labelled, random_model, some_ids
from threefold.errors import NumericError, UsageError
from threefold.model.cache import Cache

CLASSES = {"classify": 3, "tag": 3, "replaced": 2}  # of `random_model`; a token was replaced or not
judges = pytest.mark.parametrize(("family", "task"), [cell for cell in CELLS if cell[1] in CLASSES])
speakers = pytest.mark.parametrize(("family", "task"), [cell for cell in CELLS if cell[1] in ("causal", "masked", "pretraining", "seq2seq")])


@families
def test_N07_an_id_outside_the_vocabulary(family: str) -> None:
    model, good = random_model(family), some_ids(2, 6)
    for wrong in (VOCABULARY, -1, 10**12):
        ids = good.clone()
        ids[1, 4] = wrong
        batches: list[dict[str, Tensor]] = [{"input_ids": ids}]
        if family in PAIRS:
            batches = [{"input_ids": ids, "decoder_input_ids": good}, {"input_ids": good, "decoder_input_ids": ids}]
        for batch in batches:
            with pytest.raises(UsageError, match=rf"id {wrong} at row 1, position 4 .* vocabulary of 53") as caught:
                model(**batch)
            assert "tokenizer" in caught.value.hint


@speakers
def test_N07_a_label_outside_the_vocabulary(family: str, task: str) -> None:
    model, good = random_model(family, task=task), some_ids(2, 6)
    for wrong in (VOCABULARY, -1):
        labels = good.clone()
        labels[1, 4] = wrong
        for call in (model, model.loss_rows):
            with pytest.raises(UsageError, match=rf"label {wrong} at \[1, 4\] is outside the vocabulary of 53") as caught:
                call(good, labels=labels)
            assert "tokenizer" in caught.value.hint
    if task == "seq2seq":  # where what is written so far is given too, or what was read
        for more in ({"input_ids": good, "decoder_input_ids": good}, {"encoder_outputs": model(good, labels=good)}):
            if "encoder_outputs" in more:
                more = {"encoder_outputs": type(more["encoder_outputs"])(last_hidden_state=more["encoder_outputs"].encoder_last_hidden_state)}
            with pytest.raises(UsageError, match=r"label -1 at \[1, 4\] is outside the vocabulary of 53"):
                model(**more, labels=labels)


@judges
def test_N07_a_label_outside_the_classes(family: str, task: str) -> None:
    model = random_model(family, task=task)
    good, count = labelled(model, some_ids(2, 6)), CLASSES[task]
    assert model(**good).loss.isfinite()
    for wrong in (count, -1, 10**12):
        labels = good["labels"].clone()
        labels.view(-1)[-1] = wrong
        place = r"\[1\]" if task == "classify" else r"\[1, 5\]"
        words = rf"label {wrong} at {place} is none of the {count} classes \(0 to {count - 1}, or -100 to ignore\)"
        with pytest.raises(UsageError, match=words) as caught:
            model(**{**good, "labels": labels})
        assert "counted from 0" in caught.value.hint
    for shape in ((3,), (2, 5)):
        with pytest.raises(UsageError, match="`labels` has shape"):
            model(**{**good, "labels": torch.zeros(shape, dtype=torch.int64)})


def test_N07_pairs_either_follow_or_do_not() -> None:
    model = random_model("bert", task="pretraining")
    good = labelled(model, some_ids(2, 6))
    for wrong in (2, -1):
        with pytest.raises(UsageError, match=rf"label {wrong} at \[1\] is none of the 2 classes"):
            model(**{**good, "next_sentence_label": torch.tensor([0, wrong])})
    with pytest.raises(UsageError, match=r"`next_sentence_label` has shape \(3,\), expected one number for each of 2 texts"):
        model(**{**good, "next_sentence_label": torch.zeros(3, dtype=torch.int64)})


@pytest.mark.parametrize("family", [name for name, task in CELLS if task == "classify"])
def test_values_and_several_classes_need_numbers_of_their_shape(family: str) -> None:
    model = random_model(family, task="classify")
    ids = labelled(model, some_ids(2, 6))["input_ids"]
    assert model(ids, labels=torch.tensor([[1.0, 0, 1], [0, 0, 1]])).loss.isfinite()
    with pytest.raises(UsageError, match=r"`labels` has shape \(2,\), expected \(2, 3\)"):
        model(ids, labels=torch.tensor([1.0, 0.0]))


@cells
def test_N05_nothing_to_learn_from(family: str, task: str) -> None:
    """Never a loss of NaN, or of zero."""
    model = random_model(family, task=task)
    if task in ("body", "encoder"):
        assert model(**arguments(model, some_ids(2, 6))).loss is None
        return
    given = labelled(model, some_ids(2, 6))
    with pytest.raises(NumericError, match="nothing to learn from: all labels of the 2 rows are -100"):
        model(**{**given, "labels": torch.full_like(given["labels"], -100)})


# -- what it costs -----------------------------------------------------------------------------------------------------

WAITS = ("aten::_local_scalar_dense", "aten::nonzero")  # `item`, `bool`, `int`; a mask as an index


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All that would make a GPU wait inside, because the CPU wants numbers; `tolist` brings many of them at once."""
    waits: list[str] = []
    tolist = torch.Tensor.tolist
    with monkeypatch.context() as patch, torch.autograd.profiler.profile() as seen:
        patch.setattr(torch.Tensor, "tolist", lambda self: (waits.append("tolist"), tolist(self))[1])
        yield waits
    waits += [event.name for event in seen.function_events if event.name in WAITS]


def test_the_counting_sees_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6)
    for ask in (lambda: x.tolist(), lambda: bool(x.any()), lambda: int(x.sum()), lambda: x.sum().item(), lambda: x[x > 2], lambda: x.nonzero(),
                lambda: x.masked_select(x > 2), lambda: x.clone().__setitem__(x > 2, x[3:].clone())):
        with counted(monkeypatch) as waits:
            ask()
        assert len(waits) == 1
    with counted(monkeypatch) as waits:
        x[torch.tensor([1, 2])], x.where(x > 2, 0), x.masked_fill(x > 2, 0), x.argsort()[:3]
    assert waits == []


@cells
def test_N07_a_batch_is_checked_before_the_pass_in_one_transfer(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there is no other one in a step, back through the model included. What is read and what is written are two batches,
    unless one is made of the labels."""
    for module in ("mask", "padding"):  # as on a device whose numbers are not at hand
        monkeypatch.setattr(f"threefold.model.{module}.at_hand", lambda x: False)
    model, ids = random_model(family, task=task), some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    runs: list[Callable[[], object]] = []
    if task not in ("body", "encoder"):
        given = labelled(model, ids)
        whole = {**given, "attention_mask": torch.ones_like(ids)}
        runs += [lambda: model(**given).loss.backward(), lambda: model(**whole), lambda: model(**given, attention_mask=mask).loss.backward()]
    if hasattr(model, "loss_rows"):
        labels, more = given["labels"], {} if task == "causal" else {"attention_mask": mask}
        runs += [lambda: model.loss_rows(ids, labels)[0].backward(), lambda: model.loss_rows(ids, labels, **more)[0].backward()]
    if family not in PAIRS:
        places, documents = torch.arange(9).expand(2, 9), torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
        runs += [lambda: model.hidden(ids, places, attention_mask=mask), lambda: model.hidden(ids, documents=documents)]
        if hasattr(model, "loss_rows"):
            runs += [lambda: model.loss_rows(ids, labels, places, documents), lambda: model.loss_rows(ids, labels, None, documents)]
    if family in DECODERS:
        runs += [lambda: model.hidden(ids, attention_mask=mask, cache=Cache())]
    assert runs or task in ("body", "encoder")
    for run in runs:
        with counted(monkeypatch) as waits:
            run()
        assert waits[:1] == ["tolist"] and (len(waits) == 1 or task == "replaced")  # whose loss takes the places that count
    sides = 2 if family in PAIRS and task in ("seq2seq", "body") else 1
    given = labelled(model, ids) if task == "classify" else {"input_ids": ids}
    with counted(monkeypatch) as waits:
        model(**arguments(model, given["input_ids"], mask=mask))
    assert waits == ["tolist"] * sides


@cells
def test_N07_what_is_wrong_is_said_before_anything_is_looked_up(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(family, task=task), some_ids(2, 9)
    given = arguments(model, ids) if task in ("body", "encoder") else labelled(model, ids)
    monkeypatch.setattr(torch.nn.functional, "embedding", None)
    cases = [({**given, "input_ids": given["input_ids"] + 53}, "token id .* outside the vocabulary of 53")]
    if task not in ("body", "encoder"):
        cases.append(({**given, "labels": given["labels"] + 53}, "label .* is (outside the vocabulary of 53|none of the [23] classes)"))
    for wrong, words in cases:
        with pytest.raises(UsageError, match=words):
            model(**wrong)
        if hasattr(model, "loss_rows"):
            with pytest.raises(UsageError, match=words):
                model.loss_rows(wrong["input_ids"], wrong["labels"])

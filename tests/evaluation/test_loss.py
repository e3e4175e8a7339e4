"""Loss and bits per byte by the one definition, against transformers and windows cut by other code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from threefold.data import windows
from threefold.data.windows import document_windows
from threefold.errors import DataError, NumericError, UsageError
from threefold.evaluation.loss import evaluate, evaluate_batches, evaluating
from threefold.model.build import build_model, sized
from threefold.model.language import CausalLM
from threefold.model.weights import load_model

CONTEXT = 32
AGREEMENT = 1e-4  # nats per token, the contract with other readers of a model directory


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return build_model(sized("llama", "nano", vocab_size=300, context=CONTEXT), seed=1).eval()


def documents(seed: int = 0, count: int = 9, longest: int = 150, vocabulary: int = 300) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, size=n) for n in rng.integers(2, longest, size=count)]


def by_hand(model: torch.nn.Module, texts: list[np.ndarray], context: int) -> tuple[float, int]:
    """Summed loss in nats and count: one window at a time, with torch's own cross-entropy."""
    total, count = 0.0, 0
    for ids in texts:
        position = 0
        while position < len(ids) - 1:
            window = torch.tensor(np.array(ids[position:position + context + 1], dtype=np.int64))
            with torch.no_grad():
                logits = model(input_ids=window[None, :-1]).logits[0].double()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
            position += context
    return total, count


def test_every_id_but_the_first_is_predicted_once(model: CausalLM) -> None:
    texts = documents()
    result = evaluate(model, texts)
    total, count = by_hand(model, texts, CONTEXT)
    assert result["tokens"] == count == sum(len(ids) - 1 for ids in texts)
    assert result["loss"] == pytest.approx(total / count, abs=2e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_any_amount_of_text_is_judged_in_groups(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, taken = documents(), list[int]()
    whole = evaluate(model, texts)
    monkeypatch.setattr(windows, "GROUP", 100)

    def coming() -> Iterator[np.ndarray]:
        for number, text in enumerate(texts):
            taken.append(number)
            yield text

    parts = evaluate(model, coming())
    assert parts["tokens"] == whole["tokens"] and parts["loss"] == pytest.approx(whole["loss"], abs=2e-6)
    batches, taken[:] = windows.document_windows(coming(), CONTEXT), []
    next(batches)
    assert len(taken) < len(texts), "what has not been asked for has not been read"


@pytest.mark.parametrize("batch_tokens", [1, 40, 1000, 10**6])
def test_the_batch_changes_nothing(model: CausalLM, batch_tokens: int) -> None:
    texts = documents(3)
    assert evaluate(model, texts, batch_tokens=batch_tokens)["loss"] == pytest.approx(
        evaluate(model, texts)["loss"], abs=2e-6
    )


def test_bits_per_byte_divide_by_the_bytes_of_the_predicted_ids(model: CausalLM) -> None:
    token_bytes = [None, None] + [b"x" * (1 + i % 5) for i in range(298)]
    texts = [np.array([0, 5, 6, 7, 1]), np.array([0, 9, 9, 1])]
    result = evaluate(model, texts, token_bytes=token_bytes)
    size = sum(len(token_bytes[i] or b"") for ids in texts for i in ids[1:])
    assert result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 7 / math.log(2) / size)
    assert evaluate(model, texts)["bits_per_byte"] is None


def test_a_shorter_context_may_be_asked_for_and_a_longer_not(model: CausalLM) -> None:
    texts = documents()
    total, count = by_hand(model, texts, 8)
    assert evaluate(model, texts, 8)["loss"] == pytest.approx(total / count, abs=2e-6)
    for context in (0, CONTEXT + 1):
        with pytest.raises(UsageError, match=f"context of {context} .* model's is 32"):
            evaluate(model, texts, context)


def test_the_model_is_left_as_it_was_found(model: CausalLM) -> None:
    other = build_model(sized("gpt2", "nano", vocab_size=300, context=CONTEXT)).train()
    other.compute_dtype = torch.bfloat16
    with evaluating(other):
        assert not other.training and other.compute_dtype is None and torch.is_inference_mode_enabled()
    assert other.training and other.compute_dtype is torch.bfloat16 and not torch.is_inference_mode_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(other, exact=False):
        assert other.compute_dtype is torch.bfloat16
        1 / 0  # noqa: B018
    assert other.training


def test_half_precision_is_not_used_unless_asked_for(model: CausalLM) -> None:
    texts = documents()
    exact = evaluate(model, texts)["loss"]
    model.compute_dtype = torch.bfloat16
    try:
        assert evaluate(model, texts)["loss"] == exact
        near = evaluate(model, texts, exact=False)["loss"]
    finally:
        model.compute_dtype = None
    assert near != exact and near == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("texts", [[], [np.array([3])], [np.array([], dtype=np.int64), np.array([1])]])
def test_N08_nothing_to_predict_is_an_error(model: CausalLM, texts: list[np.ndarray]) -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate(model, texts)


def test_N08_two_ids_are_enough(model: CausalLM) -> None:
    assert evaluate(model, [np.array([1, 2])])["tokens"] == 1


def test_N01_a_loss_that_is_not_finite_is_an_error() -> None:
    broken = build_model(sized("gpt2", "nano", vocab_size=300, context=CONTEXT))
    with torch.no_grad():
        broken.transformer.embed.weight[5] = float("nan")
    with pytest.raises(NumericError, match="nan"):
        evaluate(broken, [np.array([5, 5, 5])])


def test_batches_can_be_given(model: CausalLM) -> None:
    texts = documents()
    assert evaluate_batches(model, document_windows(texts, CONTEXT)) == evaluate_batches(
        model, list(document_windows(texts, CONTEXT))
    )


def test_a_published_model_has_the_loss_that_transformers_gives_it(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("stories260K/hf")
    ours, theirs = load_model(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (folder.parent / "expected_greedy.txt").read_text()
    texts = [
        np.array([*tokenizer.encode(text), 2]),
        np.array([1, *tokenizer.encode("A dog ran.", add_special_tokens=False), 2]),
    ]
    total, count = by_hand(theirs, texts, 100)
    assert evaluate(ours, texts, 100)["loss"] == pytest.approx(total / count, abs=AGREEMENT / 10)

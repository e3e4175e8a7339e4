"""Beam search: transformers' texts, in transformers' order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.conftest import Pair
from tests.generation.test_arguments import padded
from threefold.generation.arguments import generate_ids

ROWS = [[11, 12, 13, 14, 15, 16, 7], [20, 7], [31, 32, 33, 7], [40, 41, 42, 43, 44, 7]]
ENDS = list(range(50, 62))  # many ids end a text, so that beams close at different lengths
OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 2, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0},
    {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 2.0, "eos_token_id": 7},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "repetition_penalty": 1.2},
    {"num_beams": 3, "bad_words_ids": [[i] for i in range(60, 119)], "forced_eos_token_id": 7, "forced_bos_token_id": 50},
    {"num_beams": 4, "bad_words_ids": [[i] for i in range(60, 119)], "renormalize_logits": True, "num_return_sequences": 4},
    {"num_beams": 2, "eos_token_id": list(range(8, 116)), "num_return_sequences": 2},  # most ids end a text
    {"num_beams": 2, "eos_token_id": list(range(8, 116)), "early_stopping": "never", "length_penalty": 3.0, "max_new_tokens": 30},
    {"num_beams": 2, "eos_token_id": list(range(30, 60)), "early_stopping": "never", "length_penalty": 1.0, "max_new_tokens": 30},
    {"num_beams": 2, "max_new_tokens": 1, "num_return_sequences": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_an_encoder_decoders_texts_equal_transformers(reading_pair: Pair, options: dict[str, Any]) -> None:
    given = {"max_new_tokens": 14, "eos_token_id": ENDS, **options}
    ids_BS, mask_BS = padded(ROWS, 3, left=False)
    expected = reading_pair.theirs.generate(ids_BS, attention_mask=mask_BS, do_sample=False, **given)
    assert torch.equal(generate_ids(reading_pair.ours, ids_BS, mask_BS, pad_token_id=3, **given), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_a_decoders_texts_equal_transformers(pair: Pair, options: dict[str, Any]) -> None:
    given = {"max_new_tokens": 14, "eos_token_id": ENDS, "pad_token_id": 3, **options}
    for row in ([11, 12, 13], [20, 21], [31]):
        expected = pair.theirs.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), do_sample=False, **given)
        assert torch.equal(generate_ids(pair.ours, [row], **given), expected)


def test_more_beams_find_likelier_texts(pair: Pair) -> None:
    def chance(ids: torch.Tensor) -> float:
        with torch.inference_mode():
            logits = pair.ours(ids).logits[0, :-1].log_softmax(-1)
        return float(logits[torch.arange(len(logits)), ids[0, 1:]][1:].sum())

    prompt = torch.tensor([[11, 12]])
    texts = [generate_ids(pair.ours, prompt, num_beams=n, max_new_tokens=6, eos_token_id=None, length_penalty=0.0) for n in (1, 100)]
    assert chance(texts[1]) >= chance(texts[0])
    assert not torch.equal(texts[0], texts[1])


def test_a_model_in_training_searches_without_dropout_and_goes_on_training(reading_pair: Pair) -> None:
    given = {"num_beams": 3, "max_new_tokens": 5, "pad_token_id": 3}
    quiet = generate_ids(reading_pair.ours, [[11, 7]], **given)
    assert torch.equal(generate_ids(reading_pair.ours.train(), [[11, 7]], **given), quiet) and reading_pair.ours.training
    reading_pair.ours.eval()

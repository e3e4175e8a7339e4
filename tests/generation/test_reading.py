"""Encoder-decoders through the one engine: transformers' greedy ids, and a batch is its rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.generation.conftest import Pair
from tests.generation.test_arguments import padded
from tests.generation.test_engine import GREEDY, prompts, run
from threefold.errors import UsageError
from threefold.generation.arguments import generate_ids
from threefold.generation.engine import Decoding, Request, complete, generate, stream
from threefold.generation.sampling import SamplingSettings
from threefold.model.build import build_model, sized
from threefold.model.language import Seq2SeqLM
from threefold.text.tokenizer import Tokenizer

ROWS = [[11, 12, 13, 14, 15, 16, 7], [20, 7], [31, 32, 33, 7], [40, 41, 42, 43, 44, 7]]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 25},
        {"max_length": 30},
        {},
        {"max_new_tokens": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 20, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 20, "eos_token_id": [7, 60, 61, 62, 63, 64, 65]},
        {"max_new_tokens": 12, "decoder_start_token_id": 9},
        {"max_new_tokens": 12, "forced_bos_token_id": 50, "forced_eos_token_id": 7, "min_new_tokens": 12},
    ],
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_greedy_ids_equal_transformers(reading_pair: Pair, options: dict[str, Any]) -> None:
    ids_BS, mask_BS = padded(ROWS, 3, left=False)
    expected = reading_pair.theirs.generate(ids_BS, attention_mask=mask_BS, do_sample=False, **options)
    ours = generate_ids(reading_pair.ours, ids_BS, mask_BS, pad_token_id=3, **options)
    assert torch.equal(ours, expected)
    assert len({tuple(row) for row in ours.tolist()}) > 1  # what is read makes the difference
    for row, ids in zip(expected.tolist(), ROWS, strict=True):  # a row alone is the row in company
        alone = generate_ids(reading_pair.ours, [ids], pad_token_id=3, **options)[0].tolist()
        assert alone == row[:len(alone)] and set(row[len(alone):]) <= {3}


def test_padding_is_known_by_its_id_and_may_stand_on_either_side(reading_pair: Pair) -> None:
    """transformers 4 knew it so for these models too; version 5 reads the padding where no mask is given."""
    ids_BS, mask_BS = padded(ROWS, 3, left=False)
    expected = reading_pair.theirs.generate(ids_BS, attention_mask=mask_BS, do_sample=False, max_new_tokens=12)
    assert torch.equal(generate_ids(reading_pair.ours, ids_BS, pad_token_id=3, max_new_tokens=12), expected)
    left = padded(ROWS, 50, left=True)
    assert torch.equal(generate_ids(reading_pair.ours, *left, pad_token_id=3, max_new_tokens=12), expected)


def test_cached_steps_give_the_tokens_of_full_passes(reading_pair: Pair) -> None:
    ids, written = torch.tensor([ROWS[0]]), [3]
    for _ in range(15):
        with torch.inference_mode():
            logits = reading_pair.ours(ids, decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    assert run(reading_pair.ours, [Request(tuple(ROWS[0]), 15, GREEDY)]) == [written[1:]]


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(seed=3), SamplingSettings(top_k=5, repetition_penalty=1.3, seed=4)])
def test_a_request_gives_the_same_alone_and_in_company(reading_pair: Pair, settings: SamplingSettings) -> None:
    requests = [Request(p, 5 + 7 * (i % 4), settings, eos=frozenset({7, 9, 11}), row=i) for i, p in enumerate(prompts(9))]
    alone = [run(reading_pair.ours, [request])[0] for request in requests]
    assert run(reading_pair.ours, requests) == alone
    order = np.random.default_rng(1).permutation(9).tolist()
    assert run(reading_pair.ours, [requests[i] for i in order]) == [alone[i] for i in order]


def test_several_sequences_a_prompt_begin_with_the_start(reading_pair: Pair) -> None:
    out = generate_ids(reading_pair.ours, [[11, 7], [13, 7]], do_sample=True, num_return_sequences=3, max_new_tokens=4, seed=1, pad_token_id=3)
    assert out.shape == (6, 5) and out[:, 0].tolist() == [3] * 6


def test_lengths_are_those_of_each_side(reading_pair: Pair) -> None:
    if reading_pair.ours.config.position_embedding_type == "relative":  # distances have no end
        assert len(run(reading_pair.ours, [Request((9,) * 600, 520, GREEDY)])[0]) == 520
        return
    assert len(run(reading_pair.ours, [Request((9,) * 64, 63, GREEDY)])[0]) == 63
    with pytest.raises(UsageError, match="65 tokens is to be read .* context is 64"):
        Decoding(reading_pair.ours, [Request((9,) * 65, 1, GREEDY)])
    with pytest.raises(UsageError, match="64 new ones"):
        Decoding(reading_pair.ours, [Request((9,), 64, GREEDY)])
    with pytest.raises(UsageError, match="no token"):
        Decoding(reading_pair.ours, [Request((), 3, GREEDY)])


def test_text_is_streamed_as_it_is_returned(byte_tokenizer: Tokenizer) -> None:
    model = build_model(sized("t5", "nano", vocab_size=257), seed=3).eval()
    assert isinstance(model, Seq2SeqLM)
    texts = generate(model, byte_tokenizer, ["ab", "a longer one"], temperature=0, max_new_tokens=20)
    assert ["".join(stream(model, byte_tokenizer, t, temperature=0, max_new_tokens=20)) for t in ("ab", "a longer one")] == texts
    done = complete(model, byte_tokenizer, "ab", temperature=0, max_new_tokens=20)[0]
    assert done.prompt_tokens == len(byte_tokenizer.encode_document("ab")) and done.text == texts[0]


def test_a_model_that_writes_nothing_says_so() -> None:
    model = build_model(sized("bert", "nano", vocab_size=60), seed=0)
    with pytest.raises(UsageError, match="loaded for `masked`, and that writes no text"):
        Decoding(model, [Request((1,), 1)])  # type: ignore[arg-type]

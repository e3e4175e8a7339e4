"""The engine: cached steps equal full passes, company and place change nothing, nothing is cut in silence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.generation.conftest import Pair
from threefold.errors import NumericError, UsageError
from threefold.generation.engine import Decoding, Request, generate, stream
from threefold.generation.sampling import SamplingSettings
from threefold.model.build import build_model, sized
from threefold.model.language import CausalLM
from threefold.text.tokenizer import Tokenizer

ROUNDING = 2e-6  # of the largest logit, as in the laws of parity
GREEDY = SamplingSettings(temperature=0)


def prompts(count: int, seed: int = 0, longest: int = 14) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(8, 120, size=rng.integers(1, longest)).tolist()) for _ in range(count)]


def run(model: CausalLM, requests: list[Request]) -> list[list[int]]:
    decoding = Decoding(model, requests)
    while decoding.step():
        pass
    return decoding.tokens


def test_N11_greedy_tokens_differ_from_full_passes_at_rounding_ties_alone(pair: Pair) -> None:
    """One step after each of 300 prompts, batched and padded, against a full pass of each alone. Where they differ, the
    two best logits are nearer to each other than rounding: those are counted, and are rare."""
    ties = 0
    for ids, chosen in zip(many := prompts(300, seed=5), run(pair.ours, [Request(p, 1, GREEDY, row=i) for i, p in enumerate(many)]), strict=True):
        with torch.inference_mode():
            logits = pair.ours(torch.tensor([ids])).logits[0, -1]
        best = int(logits.argmax())
        if chosen != [best]:
            ties += 1
            assert float(logits[best] - logits[chosen[0]]) <= ROUNDING * float(logits.abs().max())
    assert ties <= 3


def test_N11_cached_steps_give_the_greedy_tokens_of_full_passes(pair: Pair) -> None:
    for prompt in prompts(3):
        ids = list(prompt)
        for _ in range(30):
            with torch.inference_mode():
                ids.append(int(pair.ours(torch.tensor([ids])).logits[0, -1].argmax()))
        assert run(pair.ours, [Request(prompt, 30, GREEDY)]) == [ids[len(prompt):]]


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        SamplingSettings(seed=3),
        SamplingSettings(top_k=5, repetition_penalty=1.3, seed=4),
        SamplingSettings(top_p=0.8, temperature=1.5),
    ],
)
def test_N11_a_request_gives_the_same_alone_and_in_company(pair: Pair, settings: SamplingSettings) -> None:
    requests = [
        Request(p, 5 + 7 * (i % 4), settings, eos=frozenset({7, 9, 11}), row=i) for i, p in enumerate(prompts(9))
    ]
    alone = [run(pair.ours, [request])[0] for request in requests]
    assert run(pair.ours, requests) == alone
    order = np.random.default_rng(1).permutation(9).tolist()
    assert run(pair.ours, [requests[i] for i in order]) == [alone[i] for i in order]


def test_requests_with_different_settings_share_a_batch(pair: Pair) -> None:
    many = [
        GREEDY,
        SamplingSettings(seed=1),
        SamplingSettings(top_k=3),
        SamplingSettings(temperature=0, repetition_penalty=1.5),
        SamplingSettings(min_p=0.1),
    ]
    requests = [Request(p, 12, settings, row=i) for i, (p, settings) in enumerate(zip(prompts(5), many, strict=True))]
    assert run(pair.ours, requests) == [run(pair.ours, [request])[0] for request in requests]


def test_sampling_is_a_function_of_seed_and_row(pair: Pair) -> None:
    prompt = prompts(1)[0]
    texts = {
        (seed, row): tuple(run(pair.ours, [Request(prompt, 20, SamplingSettings(seed=seed), row=row)])[0])
        for seed in (0, 1)
        for row in (0, 1)
    }
    assert len(set(texts.values())) == 4
    assert texts[0, 0] == tuple(run(pair.ours, [Request(prompt, 20, SamplingSettings(seed=0), row=0)])[0])


def test_a_request_ends_at_its_own_end_and_says_why(pair: Pair) -> None:
    prompt = prompts(1)[0]
    tokens = run(pair.ours, [Request(prompt, 20, GREEDY)])[0]
    decoding = Decoding(
        pair.ours,
        [
            Request(prompt, 20, GREEDY, eos=frozenset({tokens[4]})),
            Request(prompt, 9, GREEDY),
            Request(prompt, 0, GREEDY),
        ],
    )
    while decoding.step():
        pass
    first = tokens.index(tokens[4]) + 1
    assert decoding.tokens == [tokens[:first], tokens[:9], []]
    assert decoding.finished == ["stop", "length", "length"]


def test_a_request_can_be_taken_out(pair: Pair) -> None:
    requests = [Request(p, 10, GREEDY) for p in prompts(3)]
    decoding = Decoding(pair.ours, requests)
    decoding.step()
    decoding.finish(1)
    assert sorted(decoding.step()) == [0, 2]
    decoding.finish(0)
    decoding.finish(2)
    assert decoding.step() == {} and not decoding.running


def test_finished_rows_do_not_run_out_of_positions(pair: Pair) -> None:
    long, short = (9,) * 50, (9, 10)
    assert run(pair.ours, [Request(long, 2, GREEDY), Request(short, 62, GREEDY), Request(short, 60, GREEDY)]) == [
        run(pair.ours, [r])[0]
        for r in (Request(long, 2, GREEDY), Request(short, 62, GREEDY), Request(short, 60, GREEDY))
    ]


@pytest.mark.parametrize(
    ("length", "new", "fits"),
    [(64, 0, True), (63, 1, True), (1, 63, True), (64, 1, False), (65, 0, False), (1, 10**9, False)],
)
def test_V02_what_does_not_fit_is_refused_with_both_numbers(pair: Pair, length: int, new: int, fits: bool) -> None:
    request = Request((9,) * length, new, GREEDY)
    if fits:
        assert len(run(pair.ours, [request])[0]) == new
    else:
        with pytest.raises(
            UsageError,
            match=f"prompt of {length} tokens and {new} new ones need {length + new} positions.* context is 64",
        ):
            Decoding(pair.ours, [request])


def test_V02_an_empty_prompt_is_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="no token"):
        Decoding(pair.ours, [Request((), 5, GREEDY)])


def test_N07_an_id_outside_the_vocabulary_is_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="120"):
        run(pair.ours, [Request((5, 120), 1, GREEDY)])


def test_N13_weights_with_nan_are_a_numeric_error(pair: Pair) -> None:
    weight = next(pair.ours.parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(NumericError, match="row 0"):
            run(pair.ours, [Request((9,), 3, GREEDY)])
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_model_in_training_generates_without_dropout_and_goes_on_training(byte_tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(sized("gpt2", "nano", vocab_size=257, context=32), resid_pdrop=0.5, embd_pdrop=0.5)
    model, codec = build_model(config, seed=3), byte_tokenizer
    quiet = generate(model.eval(), codec, ["ab", ""], temperature=0, max_new_tokens=20)
    assert generate(model.train(), codec, ["ab", ""], temperature=0, max_new_tokens=20) == quiet
    assert model.training and all(module.training for module in model.modules())
    assert "".join(stream(model, codec, "ab", temperature=0, max_new_tokens=20)) == quiet[0]

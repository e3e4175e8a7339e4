"""Sampling: filters equal transformers', draws depend on (seed, row, token) alone, bad logits are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from threefold.errors import ConfigError, NumericError
from threefold.generation import sampling
from threefold.generation.sampling import SamplingSettings, draw, sample, uniforms, warp


def random_logits(
    seed: int, rows: int = 5, vocabulary: int = 97, scale: float = 4.0, ties: bool = False
) -> torch.Tensor:
    logits_BV = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    return logits_BV.round() if ties else logits_BV


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("ours", "other"), [
    (lambda x: sampling.apply_temperature(x, 0.7), theirs.TemperatureLogitsWarper(0.7)),
    (lambda x: sampling.keep_top_k(x, 5), theirs.TopKLogitsWarper(5)),
    (lambda x: sampling.keep_top_k(x, 1), theirs.TopKLogitsWarper(1)),
    (lambda x: sampling.keep_top_k(x, 500), theirs.TopKLogitsWarper(500)),
    (lambda x: sampling.keep_top_p(x, 0.9), theirs.TopPLogitsWarper(0.9)),
    (lambda x: sampling.keep_top_p(x, 0.01), theirs.TopPLogitsWarper(0.01)),
    (lambda x: sampling.keep_min_p(x, 0.05), theirs.MinPLogitsWarper(0.05)),
    (lambda x: sampling.keep_min_p(x, 1.0), theirs.MinPLogitsWarper(1.0)),
])
def test_each_filter_equals_transformers_bit_for_bit(ours, other, seed, ties):  # type: ignore[no-untyped-def]
    logits_BV = random_logits(seed, ties=ties)
    assert torch.equal(ours(logits_BV), other(None, logits_BV))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits_BV = random_logits(1)
    ids_BT = torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(2))
    seen_BV = torch.zeros(5, 97, dtype=torch.bool).scatter_(1, ids_BT, True)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids_BT, logits_BV.clone())
    assert torch.equal(sampling.penalise_repetition(logits_BV, seen_BV, penalty), expected)


def test_filters_in_order_equal_transformers_list() -> None:
    logits_BV = random_logits(3)
    chain = theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(0.8), theirs.TopKLogitsWarper(20),
                                        theirs.TopPLogitsWarper(0.85), theirs.MinPLogitsWarper(0.1)])
    own = SamplingSettings(temperature=0.8, top_k=20, top_p=0.85, min_p=0.1)
    assert torch.equal(warp(logits_BV, own), chain(None, logits_BV))


@pytest.mark.parametrize(
    "own",
    [
        SamplingSettings(top_k=50),
        SamplingSettings(top_k=3, temperature=0.3),
        SamplingSettings(top_p=0.9),
        SamplingSettings(top_p=0.2, temperature=1.7),
        SamplingSettings(top_k=40, top_p=0.8, min_p=0.02),
        SamplingSettings(top_p=0.7, min_p=0.1),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
def test_the_short_list_changes_nothing(own: SamplingSettings, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = random_logits(4, rows=64, vocabulary=6000, scale=scale)
    uniform_B = torch.from_numpy(uniforms(7, 0, 64))
    fast = sample(logits_BV, own, uniform_B)
    monkeypatch.setattr(sampling, "_short_list", lambda *_: None)
    assert torch.equal(fast, sample(logits_BV, own, uniform_B))


def test_the_short_list_is_used() -> None:
    assert sampling._short_list(random_logits(4, vocabulary=6000, scale=12.0), SamplingSettings(top_p=0.9)) is not None
    assert sampling._short_list(random_logits(4, vocabulary=6000), SamplingSettings(top_k=9)) is not None
    assert sampling._short_list(random_logits(4, vocabulary=6000, ties=True), SamplingSettings(top_k=900)) is None


def test_draws_follow_the_probabilities() -> None:
    probs_V = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    ids = draw(probs_V.log().expand(20_000, -1), torch.from_numpy(uniforms(3, 0, 20_000)))
    share = np.bincount(ids.numpy(), minlength=5) / 20_000
    assert share[2] == 0
    assert np.abs(share - probs_V.numpy()).max() < 4 * 0.5 / np.sqrt(20_000)  # four standard errors


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.floats(0, 1, exclude_max=True), st.integers(0, 29))
@settings(max_examples=60, deadline=None)
def test_a_draw_never_takes_an_excluded_token(values: list[float], uniform: float, excluded: int) -> None:
    logits_BV = torch.tensor([values])
    if len(values) > 1:
        logits_BV[0, excluded % len(values)] = -torch.inf
    chosen = int(draw(logits_BV, torch.tensor([uniform], dtype=torch.float64)))
    assert torch.isfinite(logits_BV[0, chosen])


def test_the_last_uniform_below_one_takes_a_possible_token() -> None:
    logits_BV = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    assert int(draw(logits_BV, torch.tensor([1 - 2**-53], dtype=torch.float64))) == 1


def test_the_number_behind_a_token_is_a_function_of_seed_row_and_index() -> None:
    whole = uniforms(5, 2, 50)
    assert np.array_equal(uniforms(5, 2, 10, start=13), whole[13:23])
    assert not np.array_equal(whole, uniforms(5, 3, 50))
    assert not np.array_equal(whole, uniforms(6, 2, 50))


def test_rows_do_not_influence_each_other() -> None:
    logits_BV, uniform_B = random_logits(9, rows=6), torch.from_numpy(uniforms(1, 1, 6))
    seen_BV = torch.rand(6, 97, generator=torch.Generator().manual_seed(1)) < 0.1
    each = [SamplingSettings(temperature=0), SamplingSettings(top_k=4), SamplingSettings(top_p=0.5, seed=3),
            SamplingSettings(repetition_penalty=1.4), SamplingSettings(top_k=4, seed=9), SamplingSettings(min_p=0.2)]
    together = sample(logits_BV, each, uniform_B, seen_BV)
    alone = [sample(logits_BV[i:i + 1], each[i], uniform_B[i:i + 1], seen_BV[i:i + 1]) for i in range(6)]
    assert together.tolist() == [int(one) for one in alone]


def test_temperature_zero_is_the_largest_logit() -> None:
    logits_BV = random_logits(11)
    assert torch.equal(sample(logits_BV, SamplingSettings(temperature=0)), logits_BV.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "own",
    [
        SamplingSettings(),
        SamplingSettings(temperature=1e-4),
        SamplingSettings(temperature=1000, top_p=0.3),
        SamplingSettings(top_k=2, min_p=0.5, repetition_penalty=100),
    ],
)
def test_N13_extreme_logits_give_a_token(dtype: torch.dtype, own: SamplingSettings) -> None:
    logits_BV = torch.tensor([[1e4, -1e4, 0.0, -1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4]], dtype=dtype)
    seen_BV = torch.zeros(3, 4, dtype=torch.bool)
    ids = sample(logits_BV, own, torch.tensor([0.0, 0.5, 0.999]), seen_BV)
    assert all(0 <= i < 4 for i in ids.tolist())
    if own.temperature <= 1:
        assert ids[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_largest_numbers_of_a_type_give_a_token(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    logits_BV = torch.tensor([[top, -top, 0.0, top / 2]], dtype=dtype)
    for own in (
        SamplingSettings(),
        SamplingSettings(temperature=1e-4),
        SamplingSettings(top_p=0.5),
        SamplingSettings(min_p=0.1),
    ):
        assert int(sample(logits_BV, own, torch.tensor([0.99]))) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("own", [SamplingSettings(), SamplingSettings(temperature=0)])
def test_N13_nan_and_infinity_are_refused(bad: float, own: SamplingSettings) -> None:
    logits_BV = random_logits(2)
    logits_BV[3, 17] = bad
    with pytest.raises(NumericError, match=r"row 3 .*1 (NaN|infinite)|row 3 .*0 NaN and 1 infinite"):
        sample(logits_BV, own, torch.zeros(5))


def test_N13_a_row_without_a_choice_is_refused_and_excluded_tokens_are_not() -> None:
    logits_BV = random_logits(2)
    logits_BV[0, :90] = -torch.inf
    assert int(sample(logits_BV, SamplingSettings(), torch.zeros(5))[0]) >= 90
    logits_BV[0] = -torch.inf
    with pytest.raises(NumericError, match="row 0"):
        sample(logits_BV, SamplingSettings(), torch.zeros(5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e308),
        ("temperature", 1e-9),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**40),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("seed", 0.5),
        ("seed", 2**70),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{field}` is "):
        SamplingSettings(**{field: value})  # type: ignore[arg-type]


def test_settings_name_every_problem() -> None:
    with pytest.raises(ConfigError) as error:
        SamplingSettings(temperature=-1, top_k=-1, top_p=2, min_p=-1, repetition_penalty=0, seed=0.1)  # type: ignore[arg-type]
    assert all(
        f"`{name}`" in str(error.value)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    )

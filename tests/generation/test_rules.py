"""What may come next: each rule is transformers' processor of the same argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.conftest import Pair
from threefold.errors import UsageError
from threefold.generation.arguments import generate_ids
from threefold.generation.rules import Rules, rules_of

PROMPT = torch.tensor([[11, 12, 13, 14]])


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 2, "eos_token_id": [5, 6]},
        {"forced_eos_token_id": 99, "max_new_tokens": 6},
        {"forced_eos_token_id": [99, 98], "max_new_tokens": 6},
        {"min_new_tokens": 9, "eos_token_id": list(range(20, 90))},
        {"min_length": 11, "eos_token_id": list(range(20, 90))},
        {"min_length": 50, "min_new_tokens": 9, "eos_token_id": list(range(20, 90))},
        {"suppress_tokens": list(range(40, 110))},
        {"renormalize_logits": True, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_greedy_ids_equal_transformers(pair: Pair, options: dict[str, Any]) -> None:
    given = {"max_new_tokens": 50, "pad_token_id": 3, "eos_token_id": 5, **options}
    expected = pair.theirs.generate(PROMPT, do_sample=False, **given)
    assert torch.equal(generate_ids(pair.ours, PROMPT, **given), expected)
    plain = pair.theirs.generate(PROMPT, do_sample=False, max_new_tokens=given["max_new_tokens"], pad_token_id=3, eos_token_id=given["eos_token_id"])
    assert not torch.equal(plain, expected)  # the rule had something to do


def test_runs_that_are_forbidden_are_not_written(pair: Pair) -> None:
    free = generate_ids(pair.ours, PROMPT, max_new_tokens=12, pad_token_id=3)[0, 4:].tolist()
    words = [free[:1], free[2:4], [14, *free[:2]], [7]]  # ends are never forbidden
    expected = pair.theirs.generate(PROMPT, do_sample=False, max_new_tokens=12, pad_token_id=3, bad_words_ids=words)
    ours = generate_ids(pair.ours, PROMPT, max_new_tokens=12, pad_token_id=3, bad_words_ids=words)
    assert torch.equal(ours, expected) and free[0] not in ours[0, 4:].tolist()


def test_a_longer_run_is_forbidden_at_its_last_id() -> None:
    logits = torch.zeros(10)
    rules = Rules(forbidden=((1, 2, 3),))
    assert rules.apply(logits, [5, 1, 2], 1, 9, frozenset()).isinf().nonzero().flatten().tolist() == [3]
    assert rules.apply(logits, [5, 2, 1], 1, 9, frozenset()) is logits
    assert rules.apply(logits, [2], 1, 9, frozenset()) is logits


def test_rows_follow_their_own_rules_in_company(pair: Pair) -> None:
    rows = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18], [20, 21, 22, 23]])
    options: dict[str, Any] = {"no_repeat_ngram_size": 2, "max_new_tokens": 20, "pad_token_id": 3, "eos_token_id": list(range(60, 70))}
    batch = generate_ids(pair.ours, rows, **options)
    assert torch.equal(batch, pair.theirs.generate(rows, attention_mask=torch.ones_like(rows), do_sample=False, **options))


@pytest.mark.parametrize(
    "options",
    [{"min_length": -1}, {"min_new_tokens": 2.5}, {"no_repeat_ngram_size": True}, {"bad_words_ids": [3]}, {"bad_words_ids": [[]]},
     {"forced_bos_token_id": "a"}, {"forced_eos_token_id": 1.5}],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)) if "forced" not in next(iter(options)) else "forced id"):
        rules_of(options, 3)

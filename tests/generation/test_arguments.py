"""`model.generate`: transformers' names, transformers' greedy ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.generation.conftest import Pair
from threefold.errors import UsageError
from threefold.generation.arguments import generate_ids
from threefold.model.weights import load_model


def padded(rows: list[list[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(r)) + r if left else r + [pad] * (width - len(r)) for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


ROWS = [[11, 12, 13, 14, 15, 16], [20], [31, 32, 33], [40, 41, 42, 43, 44]]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 25},
        {"max_length": 30},
        {},
        {"max_new_tokens": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 20, "eos_token_id": [5, 60, 61, 62]},
        {"max_new_tokens": 20, "do_sample": False, "num_beams": 1, "use_cache": True},
    ],
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_N11_greedy_ids_equal_transformers(pair: Pair, options: dict[str, Any]) -> None:
    ids_BT, mask_BT = padded(ROWS, 3, left=True)
    expected = pair.theirs.generate(ids_BT, attention_mask=mask_BT, pad_token_id=3, **options)
    if "repetition_penalty" in options:  # transformers also penalises the padding of a row, so rows are compared alone
        for row in ROWS:
            alone = torch.tensor([row])
            assert torch.equal(
                generate_ids(pair.ours, alone, pad_token_id=3, **options),
                pair.theirs.generate(alone, pad_token_id=3, **options),
            )
    else:
        assert torch.equal(generate_ids(pair.ours, ids_BT, mask_BT, pad_token_id=3, **options), expected)


def test_N11_padding_on_either_side_gives_the_same(pair: Pair) -> None:
    left, right = (
        generate_ids(pair.ours, *padded(ROWS, 3, left=side), max_new_tokens=12, pad_token_id=3)
        for side in (True, False)
    )
    assert torch.equal(left[:, -12:], right[:, -12:])


def test_N08_the_content_of_padding_changes_nothing(pair: Pair) -> None:
    outputs = [
        generate_ids(pair.ours, *padded(ROWS, pad, left=True), max_new_tokens=12, pad_token_id=3)[:, -12:]
        for pad in (3, 50, 119)
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_padding_is_known_by_its_id_as_in_transformers(pair: Pair) -> None:
    ids_BT, _ = padded(ROWS, 3, left=True)
    assert torch.equal(
        generate_ids(pair.ours, ids_BT, pad_token_id=3, max_new_tokens=9),
        pair.theirs.generate(ids_BT, pad_token_id=3, max_new_tokens=9),
    )


def test_without_ids_it_begins_with_bos(pair: Pair) -> None:
    assert torch.equal(
        generate_ids(pair.ours, max_new_tokens=9), pair.theirs.generate(max_new_tokens=9, pad_token_id=7)
    )


def test_generation_config_gives_defaults_and_arguments_win(pair: Pair) -> None:
    ids_BT = torch.tensor([[11, 12]])
    defaults = {
        "max_new_tokens": 5,
        "do_sample": True,
        "temperature": 0.5,
        "transformers_version": "5.0",
        "num_beams": 1,
    }
    assert generate_ids(pair.ours, ids_BT, defaults=defaults).shape == (1, 7)
    greedy = generate_ids(pair.ours, ids_BT, max_new_tokens=5)
    assert torch.equal(generate_ids(pair.ours, ids_BT, defaults=defaults, do_sample=False), greedy)


def test_sampling_follows_the_seed_and_torchs_own(pair: Pair) -> None:
    ids_BT = torch.tensor([[11, 12]]).repeat(4, 1)

    def drawn(**options: Any) -> list[list[int]]:
        return generate_ids(pair.ours, ids_BT, do_sample=True, max_new_tokens=12, **options).tolist()  # type: ignore[no-any-return]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert len({tuple(row) for row in drawn(seed=1)}) == 4
    torch.manual_seed(5)
    first = drawn()
    assert drawn() != first
    torch.manual_seed(5)
    assert drawn() == first


def test_several_sequences_a_prompt(pair: Pair) -> None:
    ids_BT = torch.tensor([[11, 12], [13, 14]])
    out = generate_ids(pair.ours, ids_BT, do_sample=True, num_return_sequences=3, max_new_tokens=4, seed=1)
    assert out[:, :2].tolist() == [[11, 12]] * 3 + [[13, 14]] * 3
    with pytest.raises(UsageError, match="num_return_sequences"):
        generate_ids(pair.ours, ids_BT, num_return_sequences=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_token": 3}, "`max_new_token` is not a known argument"),
        ({"num_beams": 4, "do_sample": True}, "`num_beams` is 4, with `do_sample` True"),
        ({"num_beams": 2, "num_return_sequences": 3}, "`num_return_sequences` 3"),
        ({"num_beams": 0}, "`num_beams` is 0"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping"),
        ({"num_beam_groups": 2}, "`num_beam_groups` is 2, which is not supported"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"temperature": -1, "do_sample": True}, "temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_length": 2}, "leaves no room"),
        ({"max_new_tokens": 63}, "2 tokens and 63 new ones need 65"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": [11, 12]}, "shape"),
        ({"input_ids": torch.rand(1, 2)}, "float32"),
        ({"defaults": {"penalty_alpha": 0.5}}, "generation_config.json: `penalty_alpha` is 0.5"),
        ({"defaults": {"no_such": 5}}, "generation_config.json: `no_such`"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(pair: Pair, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate_ids(pair.ours, **{"input_ids": torch.tensor([[11, 12]]), **options})


def test_an_argument_overrides_what_generation_config_asks_for_in_vain(pair: Pair) -> None:
    assert generate_ids(pair.ours, [[11, 12]], defaults={"penalty_alpha": 0.5}, penalty_alpha=0.0, max_new_tokens=2).shape == (1, 4)


def test_gaps_in_a_mask_are_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="gaps"):
        generate_ids(pair.ours, torch.tensor([[11, 12, 13, 14, 15]]), torch.tensor([[1, 0, 1, 0, 1]]))


def test_a_published_model_generates_as_in_transformers(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("stories260K/hf")
    ours, theirs = load_model(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    defaults = json.loads((folder / "generation_config.json").read_text())
    ids_BT = torch.tensor([[1, 403, 407], [1, 281, 306]])
    assert torch.equal(
        generate_ids(ours, ids_BT, max_new_tokens=60, defaults=defaults),
        theirs.generate(ids_BT, max_new_tokens=60, do_sample=False),
    )

"""Texts that outgrow the waves they began with (longrope): what is kept of them no longer counts, and the tokens are transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.generation.conftest import Pair
from tests.generation.test_arguments import padded
from tests.parity.theirs import ROWS, their_model
from threefold.generation.arguments import generate_ids
from threefold.generation.engine import Decoding, Request, run_step
from threefold.model.weights import load_model

BORDER = 8  # the longest text with the first waves


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = their_model(ROWS["phi3-long"], "causal", eos_token_id=None, pad_token_id=0)
    folder = tmp_path_factory.mktemp("long")
    theirs.save_pretrained(folder)
    return Pair(theirs, load_model(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [1, 5, BORDER - 1, BORDER, BORDER + 1, BORDER + 4])
def test_tokens_across_the_border_equal_transformers(beams: int, length: int, long: Pair) -> None:
    ids = torch.arange(10, 10 + length)[None]
    given = {"max_new_tokens": 14, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    expected = long.theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **given)
    assert torch.equal(generate_ids(long.ours, ids, **given), expected)


def test_a_text_is_the_same_in_any_company(long: Pair) -> None:
    """Rows that are far beyond the border, cross it at different steps, or never come there."""
    prompts, most = [tuple(range(20, 20 + n)) for n in (14, 7, 3, 5)], [9, 12, 3, 7]
    alone = []
    for prompt, new in zip(prompts, most, strict=True):
        decoding = Decoding(long.ours, [Request(prompt, new)])
        while run_step(decoding):
            pass
        alone.append(decoding.tokens[0])
    together = Decoding(long.ours, [Request(prompt, new) for prompt, new in zip(prompts, most, strict=True)])
    while run_step(together):
        pass
    assert together.tokens == alone


def test_a_short_row_keeps_its_waves_beside_a_long_one(long: Pair) -> None:
    rows = [[11, 12, 13, 14], list(range(30, 42))]
    for left in (True, False):
        ids, mask = padded(rows, 0, left=left)
        with torch.no_grad():
            together = long.ours(ids, attention_mask=mask).logits
            for number, row in enumerate(rows):
                alone = long.ours(torch.tensor([row])).logits[0]
                assert (together[number][mask[number] == 1] - alone).abs().max() <= 2e-6 * alone.abs().max()


def test_what_we_write_is_what_transformers_4_reads(long: Pair, tmp_path: Path) -> None:
    """Three words under `rope_scaling`, and the old context beside them."""
    import json

    from threefold.model.weights import save_model

    save_model(long.ours, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["rope_scaling"]) == {"type", "long_factor", "short_factor"} and written["original_max_position_embeddings"] == BORDER
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert load_model(tmp_path).config == long.ours.config

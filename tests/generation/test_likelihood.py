"""How likely a text is: transformers' own losses, probabilities that add up to one, and the same in any company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.test_tasks import BERT_NAMES, bert, gpt2, t5, wordpiece, written_out
from threefold.auto import load
from threefold.errors import UsageError
from threefold.generation.likelihood import text_log_probs, written_log_probs

__all__ = ["bert", "gpt2", "t5"]
pytestmark = pytest.mark.filterwarnings("ignore")

PLACES = [("The hen crossed", " the road", "."), ("The hen", " crossed it", " after her."), ("The hen", " naïve", ""),
          ("Why did you cross? The hen said", " nothing", ". 333!")]
NEAR = 1e-5
FAMILIES = ("causal", "seq2seq", "masked", "pretraining", "replaced")


@pytest.fixture(scope="module")
def folders(gpt2: Path, t5: Path, bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    electra = written_out(tmp_path_factory.mktemp("electra"), "electra", "replaced", wordpiece(), BERT_NAMES)
    return {"causal": gpt2, "seq2seq": t5, "masked": bert("masked"), "pretraining": bert("pretraining"), "replaced": electra}


def test_a_decoder_gives_what_transformers_gives(gpt2: Path) -> None:
    model, tokenizer = load(gpt2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    for (before, text, _), logs in zip(PLACES, text_log_probs(model, tokenizer, PLACES), strict=True):
        ids = tokenizer.encode(before + text)
        labels = [*[-100] * (len(ids) - len(logs)), *ids[-len(logs):]]
        assert tokenizer.decode(ids[-len(logs):]) == text
        loss = theirs(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert np.mean(logs) == pytest.approx(-float(loss), abs=NEAR)


def test_an_encoder_decoder_gives_what_transformers_gives(t5: Path) -> None:
    model, tokenizer = load(t5)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5)
    for (before, text, _), logs in zip(PLACES, text_log_probs(model, tokenizer, PLACES), strict=True):
        said = tokenizer.encode(text.strip(), add_special_tokens=False)
        loss = theirs(torch.tensor([tokenizer.encode(before)]), labels=torch.tensor([said])).loss
        assert len(logs) == len(said) and np.mean(logs) == pytest.approx(-float(loss), abs=NEAR)


@pytest.mark.parametrize("family", ["masked", "pretraining"])
def test_a_masked_model_hides_the_rest_of_a_text_too(family: str, folders: dict[str, Path]) -> None:
    """One pass of transformers' model for each token, by hand."""
    model, tokenizer = load(folders[family])
    kind = transformers.AutoModelForMaskedLM if family == "masked" else transformers.AutoModelForPreTraining
    theirs = kind.from_pretrained(folders[family]).eval()
    for (before, text, after), logs in zip(PLACES, text_log_probs(model, tokenizer, PLACES), strict=True):
        head, ids = tokenizer.encode(before)[:-1], tokenizer.encode(before + text + after)
        count = len(tokenizer.encode(text, add_special_tokens=False))
        assert len(logs) == count and ids[:len(head)] == head
        for number, log in enumerate(logs):
            at, end = len(head) + number, len(head) + count
            hidden = [*ids[:at], *[tokenizer.mask_token_id] * (end - at), *ids[end:]]
            out = theirs(torch.tensor([hidden]))
            logits = out.logits if family == "masked" else out.prediction_logits
            assert log == pytest.approx(float(logits[0, at].log_softmax(-1)[ids[at]]), abs=NEAR)


def test_a_discriminator_says_what_stands_there_by_right(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["replaced"])
    theirs = transformers.ElectraForPreTraining.from_pretrained(folders["replaced"]).eval()
    for (before, text, after), logs in zip(PLACES, text_log_probs(model, tokenizer, PLACES), strict=True):
        start = len(tokenizer.encode(before)) - 1
        kept = 1 - theirs(**tokenizer(before + text + after, return_tensors="pt")).logits[0, start:start + len(logs)].sigmoid()
        np.testing.assert_allclose(np.exp(logs), kept.detach().numpy(), atol=NEAR)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_as_likely_alone_as_in_company(family: str, folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders[family])
    many = [(f"{before} {'very ' * (n % 5)}", text.strip(), after) for n in range(9) for before, text, after in PLACES]
    together = text_log_probs(model, tokenizer, many)
    for place, logs in zip(many, together, strict=True):
        np.testing.assert_allclose(text_log_probs(model, tokenizer, [place])[0], logs, atol=NEAR)


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_all_that_may_follow_adds_up_to_one(family: str, folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders[family])
    before = tuple(tokenizer.encode("The hen"))
    logs = written_log_probs(model, [(before, (token,)) for token in range(model.config.vocab_size)])
    assert float(np.exp([log for (log,) in logs]).sum()) == pytest.approx(1, abs=1e-4)
    two = written_log_probs(model, [(before, (5, 7)), (before, (5,)), ((*before, 5), (7,))])
    if family == "causal":  # the chain rule: for the other, what is read is no beginning
        assert two[0] == pytest.approx([*two[1], *two[2]], abs=NEAR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("place", "words"), [(("The hen", "", "."), "no token"), (("the hen " * 300, " crossed", "."), "context|takes")])
def test_what_cannot_be_scored_is_told(family: str, place: tuple[str, str, str], words: str, folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders[family])
    if family == "seq2seq" and place[1]:
        assert len(text_log_probs(model, tokenizer, [place])[0]) > 0  # its positions are distances, which have no end
        return
    with pytest.raises(UsageError, match=words):
        text_log_probs(model, tokenizer, [place])


def test_a_body_has_no_probabilities(bert: Callable[..., Path], tmp_path: Path) -> None:
    found: Any = load(bert("body"))
    with pytest.raises(UsageError, match="loaded for `body` has no probabilities"):
        text_log_probs(*found, PLACES)

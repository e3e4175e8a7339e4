"""Ids to text as they come: whole characters, no part of a stop string, and joined the tokenizer's own text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from threefold.auto import load
from threefold.errors import UsageError
from threefold.generation.engine import complete, generate, stream
from threefold.generation.pieces import TextPieces, begin
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer


@pytest.mark.parametrize("text", ["plain", "한국어 🙂 é", "a\u0301 e", "🏳️‍🌈"])
def test_a_piece_never_ends_inside_a_character(text: str, byte_tokenizer: Tokenizer) -> None:
    pieces = TextPieces(byte_tokenizer, begin(byte_tokenizer, ""))
    out = [pieces.feed(i) for i in byte_tokenizer.encode(text)]
    assert "".join(out) + pieces.finish() == text
    assert "\ufffd" not in "".join(out) and all(len(piece) <= 1 for piece in out)


@pytest.mark.parametrize("data", [b"\xff", b"ab\xe2\x82", b"\xe2a", b"\xf0\x9f\x99", b"\xed\xa0\x80x"])
def test_bytes_that_are_no_text_are_replaced_as_by_any_decoder(data: bytes, byte_tokenizer: Tokenizer) -> None:
    pieces = TextPieces(byte_tokenizer, begin(byte_tokenizer, "x"))
    ids = {value: i for i, value in enumerate(byte_tokenizer.token_bytes())}
    assert "".join(pieces.feed(ids[bytes([b])]) for b in data) + pieces.finish() == data.decode(errors="replace")


def test_special_and_unused_ids_have_no_text(byte_tokenizer: Tokenizer) -> None:
    pieces = TextPieces(byte_tokenizer, begin(byte_tokenizer, ""))
    assert byte_tokenizer.eos_id is not None
    assert pieces.feed(byte_tokenizer.eos_id) == pieces.feed(5000) == pieces.finish() == ""


def test_a_stop_string_ends_the_text_however_it_is_cut(byte_tokenizer: Tokenizer) -> None:
    pieces = TextPieces(byte_tokenizer, begin(byte_tokenizer, ""), "é끝")
    out = "".join(pieces.feed(i) for i in byte_tokenizer.encode("caféx é끝 more"))
    assert out == "caféx " and pieces.stopped and pieces.finish() == ""


def test_V02_an_empty_prompt_is_bos_or_an_error_with_a_hint(byte_tokenizer: Tokenizer) -> None:
    assert begin(byte_tokenizer, "") == (byte_tokenizer.bos_id,)
    with pytest.raises(UsageError) as error:
        begin(Tokenizer(byte_tokenizer.spec), "")
    assert "empty" in str(error.value) and error.value.hint


@pytest.mark.parametrize("before", ["A\n", "A", "좋은", "좋은 아침 안녕하세요여러분모두", "\n", "cat 좋", "###\n\n\n"])
@pytest.mark.parametrize("behind", ["Once there", " there", "은 날", "\n좋다", "\n"])
def test_what_follows_a_prompt_holds_nothing_of_it(before: str, behind: str, shared_data: Callable[[str], Path]) -> None:
    """A vocabulary that falls back to bytes: a run of them at the end of a prompt is text only with what follows."""
    tokenizer = PretrainedTokenizer.load(shared_data("stories260K/hf"))
    prompt, whole = begin(tokenizer, before), begin(tokenizer, before + behind)
    assert whole[:len(prompt)] == prompt
    pieces = TextPieces(tokenizer, prompt)
    assert "".join(pieces.feed(i) for i in whole[len(prompt):]) + pieces.finish() == behind
    assert TextPieces(tokenizer, prompt).finish() == ""


# -- on a published model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(request: pytest.FixtureRequest) -> tuple[object, PretrainedTokenizer, str]:
    shared_data: Callable[[str], Path] = request.getfixturevalue("shared_data")
    model, tokenizer = load(shared_data("stories260K/hf"))
    return model, tokenizer, shared_data("stories260K/expected_greedy.txt").read_text()


def test_the_published_greedy_text_comes_out(published) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer, expected = published
    text = generate(model, tokenizer, "", temperature=0, max_new_tokens=256)[0]
    assert text.startswith(expected.rstrip("\n")) and len(expected) > 500


def test_the_stream_joined_is_the_text(published) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer, _ = published
    for prompt in ("", "Once upon a", "The dog"):
        pieces = list(stream(model, tokenizer, prompt, temperature=0.9, seed=4, max_new_tokens=50, stop=["he", "."]))
        assert (
            "".join(pieces)
            == generate(model, tokenizer, [prompt], temperature=0.9, seed=4, max_new_tokens=50, stop=["he", "."])[0]
        )
        assert all(pieces) and not any(stop in "".join(pieces) for stop in ("he", "."))


def test_the_text_is_the_tokenizers_own(published) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer, _ = published
    for prompt in ("", "Once upon a time"):
        done = complete(model, tokenizer, prompt, temperature=0, max_new_tokens=40)[0]
        whole = tokenizer.decode([*tokenizer.encode(prompt), *done.ids], skip_special_tokens=True)
        assert whole == prompt + done.text
        assert done.prompt_tokens == len(tokenizer.encode(prompt)) and done.finish_reason == "length"


def test_batches_change_nothing(published) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer, _ = published
    prompts = ["Once", "", "The big red dog and the cat", "Lily", "Once"]
    texts = generate(model, tokenizer, prompts, temperature=0.8, top_p=0.9, seed=2, max_new_tokens=30)
    assert texts == generate(
        model, tokenizer, prompts, temperature=0.8, top_p=0.9, seed=2, max_new_tokens=30, batch_size=2
    )
    assert texts[0] != texts[4]  # the same prompt in another row is another draw
    assert texts == generate(model, tokenizer.core, prompts, temperature=0.8, top_p=0.9, seed=2, max_new_tokens=30)


def test_a_stop_string_is_the_reason(published) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer, _ = published
    done = complete(model, tokenizer, "", temperature=0, stop=".")[0]
    assert done.finish_reason == "stop" and done.text == "Once upon a time, there was a little girl named Lily"


def test_V02_prompts_that_do_not_fit_are_refused_before_anything_runs(published) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer, _ = published
    long = "once upon a time " * 200
    with pytest.raises(UsageError, match=r"prompt of \d{3,} tokens and 5 new ones .* context is 512"):
        generate(model, tokenizer, ["ok", long], max_new_tokens=5)
    with pytest.raises(UsageError, match="context is 512"):
        stream(model, tokenizer, long)
    with pytest.raises(UsageError, match="`temprature` is not a known argument"):
        generate(model, tokenizer, "x", temprature=1)

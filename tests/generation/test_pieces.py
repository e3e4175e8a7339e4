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


class Bytes:
    """A tokenizer of bytes: id 0 begins and ends a text, 1 + b is the byte b."""

    bos_id: int | None = 0
    eos_id: int | None = 0

    def encode_prompt(self, text: str) -> list[int]:
        return [1 + b for b in text.encode()]

    def token_bytes(self) -> list[bytes | None]:
        return [None, *(bytes([b]) for b in range(256))]

    def decode(self, ids: object, skip_special_tokens: bool = True) -> str:
        return bytes(i - 1 for i in ids if i).decode(errors="replace")  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["plain", "한국어 🙂 é", "a\u0301 e", "🏳️‍🌈"])
def test_a_piece_never_ends_inside_a_character(text: str) -> None:
    codec = Bytes()
    pieces = TextPieces(codec, codec.token_bytes(), [0])
    out = [pieces.feed(i) for i in codec.encode_prompt(text)]
    assert "".join(out) + pieces.finish() == text
    assert "\ufffd" not in "".join(out) and all(len(piece) <= 1 for piece in out)


@pytest.mark.parametrize("data", [b"\xff", b"ab\xe2\x82", b"\xe2a", b"\xf0\x9f\x99", b"\xed\xa0\x80x"])
def test_bytes_that_are_no_text_are_replaced_as_by_any_decoder(data: bytes) -> None:
    codec = Bytes()
    pieces = TextPieces(codec, codec.token_bytes(), [0])
    assert "".join(pieces.feed(1 + b) for b in data) + pieces.finish() == data.decode(errors="replace")


def test_special_and_unused_ids_have_no_text() -> None:
    codec = Bytes()
    pieces = TextPieces(codec, codec.token_bytes(), [0])
    assert pieces.feed(0) == pieces.feed(5000) == pieces.finish() == ""


def test_a_stop_string_ends_the_text_however_it_is_cut() -> None:
    codec = Bytes()
    pieces = TextPieces(codec, codec.token_bytes(), [0], "é끝")
    out = "".join(pieces.feed(i) for i in codec.encode_prompt("caféx é끝 more"))
    assert out == "caféx " and pieces.stopped and pieces.finish() == ""


def test_V02_an_empty_prompt_is_bos_or_an_error_with_a_hint() -> None:
    codec = Bytes()
    assert begin(codec, "") == (0,)
    codec.bos_id = None
    with pytest.raises(UsageError) as error:
        begin(codec, "")
    assert "empty" in str(error.value) and error.value.hint


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

"""The tokenizer itself: frames, special tokens, bulk and speed, saving and loading, bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.helpers import CODE, ENGLISH, EVERY_KIND, KOREAN, SAMPLES, small, texts
from threefold.errors import TokenizerError
from threefold.text import plain
from threefold.text.tokenizer import Tokenizer

SPECIAL = "<|endoftext|> <pad></s><unk> [CLS] [SEP] [MASK] <|unk|>"


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back(kind: str, text: str) -> None:
    assert small(kind).decode(small(kind).encode(text)) == text


@given(text=st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
@settings(deadline=None)
def test_any_text_but_the_sign_for_a_space_comes_back_from_unigram(text: str) -> None:
    assert small("unigram").decode(small("unigram").encode(text)) == text


@given(data=st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes_are_decoded_as_the_library_does(data: bytes) -> None:
    tokenizer = small("byte")
    ids = list(data)
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_fast_paths_give_what_the_library_gives(kind: str) -> None:
    tokenizer = small(kind)
    for text in (*SAMPLES.values(), KOREAN, CODE[:3000]):
        if not any(token in text for token in tokenizer.roles.values()):
            assert tokenizer.encode(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids, text
        ids = [*tokenizer.encode_document(text).tolist(), 5, 3]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer.backend.decode(
                ids, skip_special_tokens=skip
            )


# ------------------------------------------------------------------------------------------ frames, special tokens


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_D11_a_document_has_one_beginning_and_one_end(kind: str) -> None:
    tokenizer = small(kind)
    for text in ("some text", "", SPECIAL):
        ids = tokenizer.encode_document(text)
        assert ids.dtype == np.int32
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert ids.tolist() == [*first, *tokenizer.encode(text), tokenizer.eos_id]
        assert sum(number in (tokenizer.bos_id, tokenizer.eos_id) for number in ids.tolist()) == len(first) + 1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_prompt_is_opened_as_transformers_opens_a_text(kind: str, tmp_path: Path) -> None:
    from threefold.text.pretrained import PretrainedTokenizer

    tokenizer = small(kind)
    tokenizer.save(tmp_path)
    same = PretrainedTokenizer.load(tmp_path)
    assert tokenizer.opening == ((tokenizer.token_id("cls"),) if kind == "wordpiece" else ())
    for text in ("some text", " two  spaces", KOREAN, SPECIAL):
        ids = tokenizer.encode_prompt(text)
        assert ids == [*tokenizer.opening, *tokenizer.encode(text)] == same.encode_prompt(text)
        if text != SPECIAL:
            framed = same.encode(text)
            assert framed[: len(ids)] == ids and set(framed[len(ids) :]) <= tokenizer.special_ids
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # nothing is there to be continued but a beginning
    assert tokenizer.encode_prompt("") == same.encode_prompt("") == begin


def test_the_frame_of_each_kind() -> None:
    for kind in ("bpe", "byte", "char"):
        assert small(kind).bos_token == small(kind).eos_token == small(kind).pad_token == "<|endoftext|>"
    assert (small("wordpiece").bos_token, small("wordpiece").eos_token) == ("[CLS]", "[SEP]")
    assert (small("unigram").bos_token, small("unigram").eos_token) == (None, "</s>")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_text_never_becomes_a_special_token_unless_asked(kind: str) -> None:
    tokenizer = small(kind)
    ids = tokenizer.encode(SPECIAL)
    assert not (set(ids) & tokenizer.special_ids) - {tokenizer.unk_id}
    if kind in ("bpe", "byte", "unigram"):
        assert tokenizer.decode(ids) == SPECIAL
    mark = tokenizer.eos_token
    assert tokenizer.encode(f"a{mark}b", special=True).count(tokenizer.encode_document("")[-1]) == 1


@pytest.mark.parametrize(
    "path", ["gpt2_bpe", "bert_wordpiece", "sentencepiece_test/test_model.model", "t5_test_spm/sentencepiece.model"]
)
def test_text_never_becomes_a_special_token_of_a_published_tokenizer(
    shared_data: Callable[[str], Path], path: str
) -> None:
    tokenizer = Tokenizer.load(shared_data(f"tokenizers/{path}"))
    for token in (piece for number in tokenizer.special_ids if (piece := tokenizer.piece(number))):
        for text in (token, f" {token} ", f"a{token}b", token * 3):
            assert not (set(tokenizer.encode(text)) & tokenizer.special_ids) - {tokenizer.unk_id}, text


def test_a_special_token_that_merges_could_reach_is_out_of_reach(tmp_path: Path) -> None:
    vocab = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}
    spec = {
        "added_tokens": [
            {
                "id": 4,
                "content": "<s>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["<", "s"], ["<s", ">"]], "ignore_merges": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<s>") == [3, 2]
    assert tokenizer.encode("<s>", special=True) == [4]


def test_a_tokenizer_without_an_end_cannot_frame(shared_data: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(shared_data("tokenizers/gpt1_bpe"))
    with pytest.raises(TokenizerError, match="no end-of-text token") as caught:
        tokenizer.encode_document("x")
    assert "eos_token" in caught.value.hint


def test_what_a_directory_declares_is_what_frames(tmp_path: Path) -> None:
    small("bpe").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for declared, frame in (
        ({"bos_token": None}, (None, "<|endoftext|>")),
        ({"bos_token": {"content": "<|endoftext|>"}}, ("<|endoftext|>",) * 2),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **declared}))
        tokenizer = Tokenizer.load(tmp_path)
        assert (tokenizer.bos_token, tokenizer.eos_token) == frame
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).bos_token == "<|endoftext|>"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert Tokenizer.load(tmp_path).bos_token is None
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="should hold an object"):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------ bulk


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_many_documents_are_encoded_as_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "BATCH", 2000)
    tokenizer = small(kind)
    documents = [*SAMPLES.values(), *KOREAN.split("\n"), CODE[:5000], "", CODE[5000:6000]]
    found = tokenizer.encode_documents(documents)
    assert [ids.tolist() for ids in found] == [tokenizer.encode_document(text).tolist() for text in documents]
    assert [ids.tolist() for ids in tokenizer.iter_documents(iter(documents))] == [ids.tolist() for ids in found]


@pytest.mark.parametrize("kind", ["bpe", "qwen2", "wordpiece", "unigram"])
def test_a_long_document_in_parts_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train("bpe", texts(), 700, pattern="qwen2") if kind == "qwen2" else small(kind)
    text = "\n\n".join(
        [CODE, KOREAN, ENGLISH, "don\n't it's\n's \n\n\n x\n", KOREAN.replace(" ", "\n"), "1\n2\n\n a.\n\n"]
    )
    whole = tokenizer.encode(text)
    monkeypatch.setattr(plain, "LONG", 60)
    monkeypatch.setattr("threefold.text.tokenizer.LONG", 60)
    parts = list(plain.cut(text))
    assert "".join(parts) == text and len(parts) > 100
    assert tokenizer.encode(text) == whole


def test_a_long_document_reaches_the_library_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(small("bpe").spec, small("bpe").roles)
    text = (CODE + KOREAN + "\n") * 4
    whole, encoder, seen = tokenizer.encode(text), tokenizer._plain, []

    class Watched:
        def encode_batch_fast(self, batch: list[str], **options: bool) -> object:
            seen.append(sum(map(len, batch)))
            return encoder.encode_batch_fast(batch, **options)

    monkeypatch.setattr("threefold.text.tokenizer.LONG", 2000)
    monkeypatch.setattr(plain, "LONG", 2000)
    monkeypatch.setattr(plain, "BATCH", 10_000)
    monkeypatch.setitem(tokenizer.__dict__, "_plain", Watched())
    assert tokenizer.encode(text) == whole
    assert [ids.tolist() for ids in tokenizer._encode_all(["a", text, "", text, "b"])] == [
        tokenizer.encode("a"), whole, [], whole, tokenizer.encode("b")]
    assert len(seen) > 10 and max(seen) < 13_000 < len(text)


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_million_characters_take_a_moment(kind: str) -> None:
    tokenizer = small(kind)
    text = (ENGLISH + KOREAN) * 2000
    text = text[:1_115_394]
    tokenizer.encode_document("warm")
    best = min(_seconds(lambda: tokenizer.encode_document(text)) for _ in range(3))
    assert best < 0.1


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


# ------------------------------------------------------------------------------------------ bytes, saving, errors


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_bytes_of_tokens_make_up_the_text(kind: str) -> None:
    tokenizer = small(kind)
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size and all(table[number] is None for number in tokenizer.special_ids)
    for text in ("It was the best of times", *([KOREAN, "x\n\ty"] if kind in ("bpe", "byte", "unigram") else [])):
        data = b"".join(table[number] or b"" for number in tokenizer.encode(text))
        assert data.decode() == (" " + text if kind in ("unigram", "wordpiece") else text)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_is_saved_is_what_is_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = small(kind)
    tokenizer.save(tmp_path / "new" / "folder", context=256)
    again = Tokenizer.load(tmp_path / "new" / "folder")
    assert (again.fingerprint, again.kind, again.roles, again.json) == (
        tokenizer.fingerprint,
        kind,
        tokenizer.roles,
        tokenizer.json,
    )
    assert again.encode(KOREAN) == tokenizer.encode(KOREAN)
    config = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == 256
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (
        tmp_path / "new" / "folder" / "tokenizer.json"
    ).read_bytes()


def test_a_chat_template_travels(tmp_path: Path) -> None:
    small("bpe").save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").config["chat_template"] == "{{ messages }}"


def test_fingerprints_tell_tokenizers_apart() -> None:
    prints = {small(kind).fingerprint for kind in EVERY_KIND}
    assert len(prints) == len(EVERY_KIND) and all(len(found) == 64 for found in prints)


def test_further_parts_and_their_tokens() -> None:
    tokenizer = Tokenizer.train("bpe", texts(), 400, roles={"mask": "<mask>"})
    assert tokenizer.mask_id == 399 and tokenizer.mask_token == "<mask>" and tokenizer.unk_id is None


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_D06_a_lone_surrogate_is_an_error_with_its_place(kind: str) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 3") as caught:
        small(kind).encode("abc\ud800")
    assert "normalise" in caught.value.hint
    with pytest.raises(TokenizerError, match="a text is a string"):
        small(kind).encode(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_is_no_id_is_an_error_and_what_is_beyond_has_no_text(kind: str) -> None:
    tokenizer = small(kind)
    for wrong in ([1, -100], [[1, 2]], [0.5], ["a"]):
        with pytest.raises(TokenizerError, match="ids are whole numbers"):
            tokenizer.decode(wrong)  # type: ignore[arg-type]
    ids = tokenizer.encode("it was")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == tokenizer.decode(ids)
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids) and tokenizer.decode([]) == ""


def test_importing_is_quick_and_brings_no_sentencepiece() -> None:
    import subprocess
    import sys

    code = (
        "import sys, threefold.text.tokenizer; "
        "print(sorted({'sentencepiece', 'torch', 'transformers', 'pyarrow', 'zstandard'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

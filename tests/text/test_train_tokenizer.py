"""Training: the same file in every process, a ceiling that holds, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.text.helpers import CODE, ENGLISH, EVERY_KIND, KOREAN, SAMPLES, small, texts
from threefold.errors import TokenizerError, UsageError
from threefold.text import train_tokenizer
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer
from threefold.text.train_tokenizer import sample

LOSSLESS = ["bpe", "unigram", "byte"]

_TRAIN = """
import hashlib
from tests.text.helpers import EVERY_KIND, texts
from threefold.text.tokenizer import Tokenizer
for kind in EVERY_KIND:
    print(kind, hashlib.sha256(Tokenizer.train(kind, texts(), 900, special=["<mask>"]).json.encode()).hexdigest())
"""


def test_D09_training_gives_the_same_file_in_every_process() -> None:
    settings = (
        {"PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false"},
        {"PYTHONHASHSEED": "2", "TOKENIZERS_PARALLELISM": "true"},
    )
    root = Path(__file__).resolve().parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _TRAIN], env={**os.environ, **extra}, stdout=subprocess.PIPE, text=True, cwd=root
        )
        for extra in settings
    ]
    first, second = (process.communicate()[0] for process in running)
    assert first == second and first.count("\n") == len(EVERY_KIND)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_order_of_documents_does_not_matter_much_and_ids_are_dense(kind: str) -> None:
    tokenizer = small(kind)
    assert sorted(tokenizer._vocab.values()) == list(range(tokenizer.vocab_size))


@pytest.mark.parametrize(
    "kind, size", [("bpe", 600), ("wordpiece", 400), ("unigram", 600), ("char", 60), ("byte", 257)]
)
def test_the_size_is_a_ceiling_special_tokens_counted(kind: str, size: int) -> None:
    tokenizer = Tokenizer.train(kind, texts(), size + 2, special=["<a>", "<b>"])
    assert tokenizer.vocab_size == size + 2
    assert [tokenizer.piece(size), tokenizer.piece(size + 1)] == ["<a>", "<b>"]
    assert not any("fewer" in note for note in tokenizer.notes)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
def test_a_small_corpus_gives_fewer_pieces_with_a_note(kind: str) -> None:
    tokenizer = Tokenizer.train(kind, ["so it was and so it is, so it was"] * 3, 5000)
    assert tokenizer.vocab_size < 400
    assert tokenizer.notes == [f"the text yields {tokenizer.vocab_size:,} pieces, fewer than the 5,000 allowed"]
    assert tokenizer.decode(tokenizer.encode("so it was")) == "so it was"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
@pytest.mark.parametrize("text", ["a", "한", "\n", " a ", "🚀", "a\tb"])
def test_a_corpus_of_one_sign_is_enough(kind: str, text: str) -> None:
    if text.isspace():
        if kind != "char":
            with pytest.raises(TokenizerError, match="no text"):
                Tokenizer.train(kind, [text], 1000)
        return
    tokenizer = Tokenizer.train(kind, [text], 1000)
    assert tokenizer.decode(tokenizer.encode(text)).strip() == (
        text.strip() if kind != "wordpiece" else text.strip().replace("\t", " ")
    )


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
def test_no_text_is_an_error(kind: str) -> None:
    for nothing in ([], [""], ["", ""]):
        with pytest.raises(TokenizerError, match="no text"):
            Tokenizer.train(kind, nothing, 1000)


def test_settings_that_do_not_hold_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown kind") as caught:
        Tokenizer.train("unigrm", ["a"])
    assert "unigram" in caught.value.hint
    for kind, least in (("bpe", 257), ("byte", 257), ("unigram", 259)):
        with pytest.raises(UsageError, match=f"at least {least}") as caught:
            Tokenizer.train(kind, texts(), 100)
        assert f"--vocab-size {least}" in caught.value.hint
    with pytest.raises(UsageError, match="unknown pattern"):
        Tokenizer.train("bpe", ["a"], pattern="gpt5")
    with pytest.raises(UsageError, match="shorter than two characters"):
        Tokenizer.train("bpe", ["a"], special=["e"])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
def test_a_learnt_piece_is_never_a_special_token(kind: str) -> None:
    special = ["was", "ing", "the", " the", "Ġthe", "▁the", "영화"]
    tokenizer = Tokenizer.train(kind, texts(), 800, special=special)
    assert {tokenizer._vocab[token] for token in special} <= tokenizer.special_ids
    text = f"{ENGLISH} {KOREAN} the was ing"
    unknown = {tokenizer.unk_id}
    assert not (set(tokenizer.encode(text)) & tokenizer.special_ids) - unknown
    if kind in LOSSLESS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_korean_syllables_are_whole_in_bpe() -> None:
    """A piece that is not text is the beginning of one character, never the end of one and the beginning of another."""
    for number, data in enumerate(small("bpe").token_bytes()):
        if data is not None and len(data) > 1:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                assert error.start == 0 and error.reason == "unexpected end of data", (number, data)


def test_wordpiece_keeps_korean_and_case_unless_asked() -> None:
    tokenizer = Tokenizer.train("wordpiece", texts(), 1500)
    assert tokenizer.decode(tokenizer.encode("영화가 정말 재미있었어요")) == "영화가 정말 재미있었어요"
    assert tokenizer.encode("It") != tokenizer.encode("it")
    lower = Tokenizer.train("wordpiece", texts(), 700, lowercase=True)
    assert lower.encode("It") == lower.encode("it")
    assert lower.decode(lower.encode("영화가")) == "영화가"


def test_the_characters_of_a_char_tokenizer_are_the_corpus() -> None:
    tokenizer = Tokenizer.train("char", ["hello\r\n", "hé"], 100)
    assert [tokenizer.piece(i) for i in range(tokenizer.vocab_size)] == [
        "<|endoftext|>",
        "<|unk|>",
        *sorted("\nhelloé"[:-2] and set("\nheloé")),
    ]
    assert tokenizer.decode(tokenizer.encode("xhxé")) == "hé"
    few = Tokenizer.train("char", ["aaabbc"], 4)
    assert few.vocab_size == 4 and few.encode("abc")[2] == few.unk_id
    assert "1 rare characters of 3" in few.notes[0]


def test_what_a_user_should_know_is_in_the_notes() -> None:
    few = Tokenizer.train("char", [ENGLISH], 8)
    assert len(few.notes) == 1 and "rare characters" in few.notes[0]
    assert PretrainedTokenizer(few).notes == few.notes
    assert "fewer than the 5,000 allowed" in PretrainedTokenizer(Tokenizer.train("bpe", ["aaab"], 5000)).notes[0]


def test_the_sample_is_bounded_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tokenizer, "BLOCK", 500)
    documents = [CODE[i : i + 5000] for i in range(0, len(CODE), 5000)]
    everything = sample(documents, 10**9)
    assert "".join(everything) == "".join(documents)
    part = sample(documents, 4000)
    assert 2500 < sum(map(len, part)) <= 4000
    assert part == [block for block in everything if block in set(part)]
    assert sample(iter(documents), 4000) == part
    assert sorted(sample(documents[::-1], 4000)) == sorted(part)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("name", SAMPLES)
def test_text_comes_back(kind: str, name: str) -> None:
    tokenizer = small(kind)
    assert tokenizer.decode(tokenizer.encode(SAMPLES[name])) == SAMPLES[name]


@pytest.mark.parametrize("pattern", ["gpt2", "qwen2"])
def test_bpe_cuts_words_as_the_published_models_do(pattern: str) -> None:
    tokenizer = Tokenizer.train("bpe", texts(), 500, pattern=pattern)
    pre = tokenizer.spec["pre_tokenizer"]
    if pattern == "gpt2":
        assert pre == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    else:
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        assert pre["pretokenizers"][0]["pattern"]["Regex"] == PRETOKENIZE_REGEX
    for text in SAMPLES.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_korean_is_as_short_as_in_sentencepiece(shared_data: Callable[[str], Path]) -> None:
    """At the same size with nothing lost: bpe, like GPT-2's, has no space in front of a text, and is compared so."""
    import io

    import sentencepiece

    from threefold.text.sources import read_documents

    reviews = [document.text for document in read_documents(shared_data("nsmc/ratings_test.txt"), {"text": "document"})]
    train, test = reviews[:20_000], reviews[-3000:]
    for kind, space in (("bpe", False), ("unigram", True)):
        ours = Tokenizer.train(kind, train, 4000)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(train),
            model_writer=model,
            model_type=kind,
            vocab_size=4000,
            byte_fallback=True,
            num_threads=1,
            minloglevel=4,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=space,
        )
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        assert sum(len(ours.encode(text)) for text in test) <= sum(map(len, theirs.encode(test)))

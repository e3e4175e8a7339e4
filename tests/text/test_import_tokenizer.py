"""Tokenizers of others give the ids that their own programs give."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.text.helpers import CODE, ENGLISH, KOREAN, SAMPLES
from threefold.errors import TokenizerError
from threefold.text.tokenizer import Tokenizer

SharedData = Callable[[str], Path]


def expected(shared_data: SharedData, name: str) -> list[tuple[str, list[int]]]:
    folder = shared_data("tokenizers/expected")
    inputs = (folder / f"ggml-vocab-{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return [(text, [int(number) for number in ids.split()]) for text, ids in zip(inputs, outputs, strict=True)]


@pytest.mark.parametrize(
    "name, path",
    [
        ("gpt-2", "gpt2_bpe"),
        ("gpt-2", "gpt2_bpe/gpt2_tokenizer.json"),
        ("gpt-2", "gpt2_bpe/vocab.bpe"),
        ("gpt-2", "gpt2_bpe/encoder.json"),
        ("bert-bge", "bert_wordpiece"),
        ("bert-bge", "bert_wordpiece/vocab.txt"),
    ],
)
def test_the_published_ids(shared_data: SharedData, name: str, path: str) -> None:
    tokenizer = Tokenizer.load(shared_data(f"tokenizers/{path}"))
    for text, ids in expected(shared_data, name):
        assert tokenizer.encode(text) == ids, text


def test_what_the_files_say_of_special_tokens(shared_data: SharedData) -> None:
    gpt2 = Tokenizer.load(shared_data("tokenizers/gpt2_bpe"))
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.pad_id) == (50257, 50256, 50256, None)
    bert = Tokenizer.load(shared_data("tokenizers/bert_wordpiece"))
    assert (bert.bos_token, bert.eos_token, bert.pad_token, bert.mask_id) == ("[CLS]", "[SEP]", "[PAD]", 103)
    assert bert.encode_document("hello").tolist() == [101, 7592, 102]
    t5 = Tokenizer.load(shared_data("tokenizers/t5_test_spm/sentencepiece.model"))
    assert (t5.bos_id, t5.eos_id, t5.pad_id, t5.unk_id) == (None, 1, 0, 2)
    llama = Tokenizer.load(shared_data("stories260K/hf"))
    assert (llama.bos_id, llama.eos_id, llama.vocab_size) == (1, 2, 512)
    assert llama.encode_document("Once upon a time").tolist() == [1, 403, 407, 261, 378, 2]
    gpt1 = Tokenizer.load(shared_data("tokenizers/gpt1_bpe"))
    assert gpt1.tokenize("Hello, World!") == ["hello</w>", ",</w>", "world</w>", "!</w>"]
    assert gpt1.decode(gpt1.encode("Hello, World!")) == "hello , world !"


@pytest.mark.parametrize(
    "name",
    [
        "sentencepiece_test/test_model.model",
        "sentencepiece_test/test_ja_model.model",
        "t5_test_spm/sentencepiece.model",
    ],
)
def test_published_sentencepiece_models_give_sentencepieces_ids(shared_data: SharedData, name: str) -> None:
    path = shared_data(f"tokenizers/{name}")
    ours, theirs = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    whole = shared_data("tokenizers/sentencepiece_test/botchan.txt").read_bytes().decode()
    odd = [
        *SAMPLES.values(),
        "  two  spaces \t tab ",
        "ｶﾞｷﾞ　①②③ﬁ",
        "e\u0301 \u1112\u1161\u11ab",
        "吾輩は猫である。名前はまだ無い。",
        "\n x\n",
    ]
    for text in [*whole.split("\n")[::4], *odd, whole]:
        assert ours.encode(text) == theirs.encode(text), text[:200]
    assert ours.vocab_size == theirs.get_piece_size()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True},
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"split_digits": True, "allow_whitespace_only_pieces": True, "byte_fallback": True},
    ],
    ids=["default", "bytes", "lossless", "no space in front", "code"],
)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_new_sentencepiece_models_give_sentencepieces_ids(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    lines = [*KOREAN.split("\n"), *ENGLISH.split("\n"), *CODE.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=4,
        **options,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    ours, theirs = Tokenizer.load(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    differing = []
    for text in [*lines, *SAMPLES.values(), "  two  spaces  ", "뷁 🚀🚀", "\u2581 x"]:
        a, b = ours.encode(text), theirs.encode(text)
        if a != b:  # two ways of the same score: SentencePiece adds in float32, the library in float64
            differing.append(text)
            assert kind == "unigram" and sorted(a) == sorted(b), text
    assert len(differing) <= len(lines) // 50
    text = "영화 정말 배우들"
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_a_sentencepiece_file_is_read_as_its_own_library_reads_it(shared_data: SharedData) -> None:
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", exc_type=ImportError)
    path = shared_data("tokenizers/t5_test_spm/sentencepiece.model")
    proto = model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    spec = Tokenizer.load(path).spec
    assert [(piece, score) for piece, score in spec["model"]["vocab"]] == [
        (found.piece, found.score) for found in proto.pieces
    ]


@pytest.mark.slow
def test_cl100k_gives_tiktokens_ids(shared_data: SharedData) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    import base64

    from threefold.text.guard import CL100K_PATTERN

    path = shared_data("tokenizers/tiktoken_cl100k/cl100k_base.tiktoken")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in path.read_bytes().splitlines()}
    theirs = tiktoken.Encoding(
        "cl100k", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 100257}
    )
    ours = Tokenizer.load(path)
    for text in (*SAMPLES.values(), CODE, KOREAN, ENGLISH):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos_id, ours.vocab_size) == (100257, 100277)


def test_random_text_gives_sentencepieces_ids(shared_data: SharedData) -> None:
    path = shared_data("tokenizers/sentencepiece_test/test_model.model")
    ours, theirs = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    rng = random.Random(0)
    pool = [
        chr(code)
        for a, b in ((32, 127), (0xA0, 0x250), (0x3041, 0x3100), (0xAC00, 0xAD00), (0xFF01, 0xFFA0), (0x1F300, 0x1F400))
        for code in range(a, b)
    ] + list(" \t\n") * 40
    for _ in range(500):
        text = unicodedata.normalize("NFC", "".join(rng.choice(pool) for _ in range(rng.randint(0, 14))))
        assert ours.encode(text) == theirs.encode(text), ascii(text)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.model", b"not a protocol buffer", "not a SentencePiece model"),
        ("tokenizer.model", b"", "0 pieces"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "not a SentencePiece model"),
        ("vocab.txt", b"a\nb\n", "no `\\[UNK\\]`"),
        ("vocab.txt", b"[UNK]\na\na\n", "stands twice"),
        ("vocab.txt", b"[UNK]\n\xff\n", "not UTF-8"),
        ("x.tiktoken", b"YQ== 0\n", "which no known encoding has"),
        ("x.tiktoken", b"??? x\n", "not a piece in base64"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.hint


def test_a_published_model_cut_off_anywhere_is_refused_or_read_without_harm(
    shared_data: SharedData, tmp_path: Path
) -> None:
    data = shared_data("tokenizers/t5_test_spm/sentencepiece.model").read_bytes()
    for size in (1, 10, 100, 400, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        with pytest.raises(TokenizerError):
            Tokenizer.load(tmp_path)


def test_merges_that_do_not_belong_to_the_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nb c\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt:3: `b c`"):
        Tokenizer.load(tmp_path)


def test_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(TokenizerError, match="holds no tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in caught.value.hint

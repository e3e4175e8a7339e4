"""A directory of each family, in the files that it is published with, gives transformers' ids, and so does what is saved.

What a family's row does not say alike, and why, stands in tests/text/test_families.py.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.text import published
from tests.text.helpers import CODE, ENGLISH, KOREAN, SAMPLES
from threefold.errors import TokenizerError
from threefold.text import sentencepiece_model
from threefold.text.pretrained import NAMED, PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Row:
    """How a directory is made, and which class of transformers opens it. `python` classes are not of the library: they know
    no offsets, and give what was cut off in another form."""

    kind: str
    make: Callable[[Path], None]
    data: dict[str, str]  # published files, by the names under which a directory has them
    python: bool


def _row(kind: str, name: str, data: dict[str, str] | None = None, python: bool = False, **changes: Any) -> Row:
    return Row(f"{kind}Tokenizer", lambda folder: getattr(published, name)(folder, **changes), data or {}, python)


MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
ROWS: dict[str, Row] = {
    "bert": _row("Bert", "bert"),
    "bert-cased": _row("Bert", "bert", lowercase=False, strip_accents=None),
    "bert-by-type": _row("Bert", "bert", tokenizer_class=...),
    "electra": _row("Bert", "bert", named="Electra"),
    "gpt2": _row("GPT2", "gpt2"),
    "gpt2-options": _row("GPT2", "gpt2", tokenizer_class="GPT2Tokenizer", add_prefix_space=True, add_bos_token=True),
    "gpt2-bos": _row("GPT2", "gpt2", tokenizer_class="GPT2Tokenizer", add_bos_token=True,
                     bos_token={"__type": "AddedToken", **MASK, "content": "<|endoftext|>", "lstrip": False}),
    "roberta": _row("Roberta", "roberta"),
    "roberta-mask": _row("Roberta", "roberta", add_prefix_space=True, mask_token={"__type": "AddedToken", **MASK}),
    "gpt1": _row("OpenAIGPT", "gpt1"),
    "biogpt": _row("BioGpt", "biogpt", python=True),
    "t5": _row("T5", "t5"),
    "t5-few": _row("T5", "t5", extra_ids=5, additional_special_tokens=published.sentinels(5)),
    "t5-silent": _row("T5", "t5", **dict.fromkeys(("extra_ids", "additional_special_tokens", "eos_token", "unk_token"), ...)),
    "llama": _row("Llama", "llama"),
    "llama-new": _row("Llama", "llama", legacy=False, add_bos_token=False, add_eos_token=True),
    "marian": _row("Marian", "marian", python=True),
    "bert-published": _row("Bert", "bert", {"bert_wordpiece/vocab.txt": "vocab.txt"}),
    "gpt2-published": _row("GPT2", "gpt2", {"gpt2_bpe/encoder.json": "vocab.json", "gpt2_bpe/vocab.bpe": "merges.txt"}),
    "gpt1-published": _row("OpenAIGPT", "gpt1", {"gpt1_bpe/encoder_bpe_40000.json": "vocab.json",
                                                 "gpt1_bpe/vocab_40000.bpe": "merges.txt"}),
    "t5-published": _row("T5", "t5", {"t5_test_spm/sentencepiece.model": "spiece.model"}),
}
TEXTS = {
    **SAMPLES,
    "lines": ENGLISH,
    "more korean": KOREAN,
    "more code": CODE[:1500],
    "medical": published.MEDICAL,
    "emoji joined": "👨‍👩‍👧‍👦🏳️‍🌈 👍🏽✌️ 1️⃣ 🇰🇷🇺🇳",
    "lone marks": "\u0301a \u0301\u200d e\u0301\u0302\u0303 \u093f क\u094d ◌\u0308",
    "control": "a\x00b\x01c\x07 \x1b[0m d\x7fe\x85f\u2028g\u2029h",
    "replacement": "\ufffd\ufffd a\ufffdb \ufffe \uffff \ufdd0 x\ufdd3y",
    "line ends": "one\r\ntwo\rthree\n\nfour\x0bfive\x0csix\r\r\n",
    "long word": "antidisestablishment" * 40 + " " + "한" * 300,
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe\u00adf\u2060g",
    "wide": "Ｆｕｌｌ　ｗｉｄｔｈ ①②③ ﬁ ½ Ⅷ ㎏ ｶﾞｷﾞ",
    "decomposed": "\u1112\u1161\u11ab\u1100\u116e\u11a8 cafe\u0301 A\u030a",
    "rtl": "שלום עולם السلام عليكم \u202eabc\u202c",
    "quotes": "\"It's\" 'a' the boys' rock'n'roll ``x'' '' \'\'\' 5's '90s",
    "numbers": "1,000,000 5,,5 3.14 1e-9 No. 5 a,b,c 12:30 U.S.A. e.g. Ph.D. x.",
    "signs for spaces": "▁a ▁▁b c▁d _e",
    "framed": "<s>a</s> b <pad>c<mask> [MASK]d [SEP] e <extra_id_0>f<extra_id_4> <unk>g",
    "languages": ">>de<< It was the best. >>ko<< x",
    "a wrong language": ">>xx<<it was",
}
PAIRS = [("it was the age of wisdom", "영화가 정말"), ("", "a"), ("Two  spaces.", "def f(x):\n\treturn x"), ("🚀", "é")]
LONG = ("it was the best of times, it was the worst of times", "it was the season of Light 영화가 정말")
names = pytest.mark.parametrize("name", ROWS)
fast_names = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.python])


def opened(folder: Path) -> Any:
    """A directory as transformers opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends packages
        return transformers.AutoTokenizer.from_pretrained(folder)


Directory = Callable[[str], Path]
Both = tuple[PretrainedTokenizer, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, shared_data: Directory) -> Directory:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        row = ROWS[name]
        sources = {shared_data(f"tokenizers/{source}"): target for source, target in row.data.items()}
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            row.make(folder)
            for source, target in sources.items():
                shutil.copyfile(source, folder / target)
        return made[name]

    return make


@pytest.fixture(scope="module")
def pair() -> dict[str, Both]:
    return {}


@pytest.fixture
def both(name: str, directory: Directory, pair: dict[str, Both]) -> Iterator[Both]:
    folder = directory(name)
    if name not in pair:
        pair[name] = PretrainedTokenizer.load(folder), opened(folder)
    ours, theirs = pair[name]
    assert type(theirs).__name__ == ROWS[name].kind and not ours.notes
    padded = theirs.pad_token
    yield ours, theirs
    for tokenizer in pair[name]:
        tokenizer.truncation_side, tokenizer.pad_token = "right", padded


def agree(ours: PretrainedTokenizer, theirs: Any) -> None:
    """Ids with and without a frame, pieces and decoded texts."""
    for label, text in TEXTS.items():
        for framed in (False, True):
            ids = theirs.encode(text, add_special_tokens=framed)
            assert ours.encode(text, add_special_tokens=framed) == ids, label
            for skip in (False, True):
                decoded = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == decoded, label
                pieces = theirs.convert_ids_to_tokens(ids, skip_special_tokens=skip)
                assert ours.convert_ids_to_tokens(ids, skip_special_tokens=skip) == pieces, label
            assert ours.convert_tokens_to_ids(ours.convert_ids_to_tokens(ids)) == ids, label


@names
def test_ids_pieces_and_texts(name: str, both: Both) -> None:
    ours, theirs = both
    agree(ours, theirs)
    assert ours(list(TEXTS.values()))["input_ids"] == theirs(list(TEXTS.values()))["input_ids"]
    for label, text in TEXTS.items():
        if ROWS[name].python:  # these show the text of an unknown piece
            assert ours.convert_tokens_to_ids(ours.tokenize(text)) == theirs.convert_tokens_to_ids(theirs.tokenize(text)), label
        else:
            assert ours.tokenize(text) == theirs.tokenize(text), label


@names
def test_pairs_types_and_masks(name: str, both: Both) -> None:
    ours, theirs = both
    for first, second in [*PAIRS, LONG]:
        for framed in (False, True):
            options = {"add_special_tokens": framed, "return_special_tokens_mask": True}
            # The class of Marian counts the end among the first text's types; without a frame neither tells texts apart.
            types = {"return_token_type_ids": not ROWS[name].python or (framed and name != "marian")}
            assert dict(ours(first, second, **options, **types)) == dict(theirs(first, second, **options, **types))
    assert dict(ours("a b")) == dict(theirs("a b"))
    firsts, seconds = ([pair[i] for pair in [*PAIRS, ("a", ""), ("", "")]] for i in (0, 1))
    assert dict(ours(firsts, seconds)) == dict(theirs(firsts, seconds))


@names
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_truncation(name: str, both: Both, strategy: str, side: str) -> None:
    ours, theirs = both
    ours.truncation_side = theirs.truncation_side = side
    for length in (9, 12, 16, 17, 40, 64):
        single: dict[str, Any] = {"truncation": "only_first" if strategy == "only_second" else strategy, "max_length": length}
        found = ours(LONG[0], **single)
        assert dict(found) == dict(theirs(LONG[0], **single)) and len(found["input_ids"]) <= length
        pair = {**single, "truncation": strategy}
        frame, first, second = (len(theirs.encode(*texts)) for texts in (("", ""), (LONG[0],), (LONG[1],)))
        kept = {"only_first": second, "only_second": first}.get(strategy, 0)
        odd = ROWS[name].python and strategy == "longest_first" and (length - frame) % 2  # shared out otherwise there
        if length > kept + frame and not odd:  # the text that is not cut must leave room
            found = ours(*LONG, **pair)
            assert dict(found) == dict(theirs(*LONG, **pair)) and len(found["input_ids"]) <= length
    assert dict(ours(LONG[0], truncation=True, max_length=1000)) == dict(theirs(LONG[0], truncation=True, max_length=1000))


@fast_names
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_cut_off_comes_in_windows_that_overlap(name: str, both: Both, side: str) -> None:
    ours, theirs = both
    ours.truncation_side = theirs.truncation_side = side
    if theirs.pad_token is None:
        ours.pad_token = theirs.pad_token = theirs.unk_token
    asked: dict[str, Any] = {"truncation": "only_first", "max_length": 12, "return_overflowing_tokens": True}
    for stride in (0, 3):
        for text in (LONG[0], "a", "", [LONG[0], "a", LONG[1]]):
            for more in ({}, {"padding": True, "return_offsets_mapping": True, "return_length": True}):
                assert dict(ours(text, **asked, **more, stride=stride)) == dict(theirs(text, **asked, **more, stride=stride))
    pair: dict[str, Any] = {**asked, "truncation": "only_second", "max_length": len(theirs.encode(LONG[0])) + 6, "stride": 2}
    windows = ours(*LONG, **pair)
    assert dict(windows) == dict(theirs(*LONG, **pair)) and len(windows["input_ids"]) > 1


@names
@pytest.mark.parametrize("side", ["right", "left", None])
def test_padding(name: str, both: Both, side: str | None) -> None:
    ours, theirs = both
    assert (ours.padding_side, ours.pad_token) == (theirs.padding_side, theirs.pad_token)
    if theirs.pad_token is None:
        ours.pad_token = theirs.pad_token = theirs.unk_token
    texts = ["it was", "it was the age of wisdom", "", "한"]
    for options in (
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 30},
        {"padding": True, "truncation": True, "max_length": 4},
        {"padding": True, "return_special_tokens_mask": True, "return_token_type_ids": True},
    ):
        asked: dict[str, Any] = {**options, **({"padding_side": side} if side else {})}
        assert dict(ours(texts, **asked)) == dict(theirs(texts, **asked))
        tensors = ours(texts, **asked, return_tensors="pt")
        assert all(torch.equal(value, tensors[key]) for key, value in theirs(texts, **asked, return_tensors="pt").items())


@fast_names
def test_offsets(name: str, both: Both) -> None:
    ours, theirs = both
    for label, text in TEXTS.items():
        found = ours(text, return_offsets_mapping=True)
        assert dict(found) == dict(theirs(text, return_offsets_mapping=True)), label
    for first, second in PAIRS:
        assert ours(first, second, return_offsets_mapping=True) == theirs(first, second, return_offsets_mapping=True).data


@names
def test_names_numbers_and_sides(name: str, both: Both) -> None:
    ours, theirs = both
    for attribute in (*NAMED, *(f"{part}_id" for part in NAMED), "vocab_size", "special_tokens_map", "padding_side",
                      "truncation_side", "model_max_length", "model_input_names"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert set(ours.all_special_tokens) == set(theirs.all_special_tokens)
    assert ours.convert_ids_to_tokens(range(len(ours))) == theirs.convert_ids_to_tokens(list(range(len(theirs))))
    core = ours.core
    assert core.vocab_size == len(theirs)
    for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert core.token_id(part) == getattr(theirs, f"{part}_token_id")


@names
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_what_is_saved_opens_here_and_there(name: str, way: str, directory: Directory, both: Both, tmp_path: Path) -> None:
    ours, theirs = both
    (ours.core.save if way == "save" else ours.save_pretrained)(tmp_path / "saved")
    shutil.copyfile(directory(name) / "config.json", tmp_path / "saved" / "config.json")
    here, there = PretrainedTokenizer.load(tmp_path / "saved"), opened(tmp_path / "saved")
    agree(here, theirs)
    for label, text in TEXTS.items():
        for framed in (False, True):
            ids = theirs.encode(text, add_special_tokens=framed)
            assert there.encode(text, add_special_tokens=framed) == ids, label
            for skip in (False, True):
                assert there.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), label
    for attribute in (*NAMED, *(f"{part}_id" for part in NAMED), "padding_side", "model_max_length", "model_input_names"):
        assert getattr(here, attribute) == getattr(there, attribute) == getattr(theirs, attribute), attribute
    assert set(here.all_special_ids) == set(there.all_special_ids) == set(theirs.all_special_ids)
    assert len(here) == len(there) == len(theirs)
    assert dict(here("it was", "a")) == dict(there("it was", "a"))


@names
def test_the_core_alone_gives_the_ids_of_text(name: str, both: Both, directory: Directory) -> None:
    ours, theirs = both
    core = Tokenizer.load(directory(name))
    for label, text in TEXTS.items():
        if not any(token in text for token in [*theirs.all_special_tokens, "<0x"]):
            assert core.encode(text) == theirs.encode(text, add_special_tokens=False), label
            assert core.encode_prompt(text) == ours.encode_prompt(text), label
        assert core.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), label
    assert not set(core.encode(TEXTS["framed"])) & set(core.special_ids) - {cast(int, core.unk_id)}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.python and name != "llama"])  # whose legacy file it makes anew
def test_what_transformers_saves_opens_here(name: str, directory: Directory, both: Both, tmp_path: Path) -> None:
    _, theirs = both
    theirs.save_pretrained(tmp_path)
    shutil.copyfile(directory(name) / "config.json", tmp_path / "config.json")
    agree(PretrainedTokenizer.load(tmp_path), opened(tmp_path))


@names
def test_text_is_cleaned_where_that_damages_nothing(name: str, both: Both) -> None:
    ours, theirs = both
    if ROWS[name].python:
        return  # these have rules of their own
    ids = theirs.encode("x . y ,z do n't", add_special_tokens=False)
    for clean in (True, False, None):
        assert ours.decode(ids, clean_up_tokenization_spaces=clean) == theirs.decode(ids, clean_up_tokenization_spaces=clean)


def test_a_mask_keeps_the_space_that_tokenizer_json_lets_it_take(directory: Directory, tmp_path: Path) -> None:
    """RoBERTa as it is published: its tokenizer.json alone knows that `<mask>` takes the space before it."""
    opened(directory("roberta-mask")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": "<mask>"}))
    ours, theirs = PretrainedTokenizer.load(tmp_path), opened(tmp_path)
    text = "it is <mask>."
    assert ours.encode(text) == theirs.encode(text) and ours.tokenize(text) == theirs.tokenize(text)
    ours.save_pretrained(tmp_path / "again")
    assert PretrainedTokenizer.load(tmp_path / "again").encode(text) == theirs.encode(text)


def test_classes_that_read_a_file_in_their_own_way_are_announced(directory: Directory, tmp_path: Path) -> None:
    shutil.copyfile(directory("bert") / "vocab.txt", tmp_path / "vocab.txt")
    for kind, known in (("BertJapaneseTokenizer", False), ("KoBertTokenizer", False), ("BertTokenizerFast", True), ("DistilBertTokenizer", True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        assert any(kind in note for note in PretrainedTokenizer.load(tmp_path).notes) != known


def test_S08_a_piece_of_any_length_does_not_keep_the_reader_busy(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_model, "MAX_PIECE", 3)
    with pytest.raises(TokenizerError, match="characters; at most 3 are read"):
        PretrainedTokenizer.load(directory("t5"))

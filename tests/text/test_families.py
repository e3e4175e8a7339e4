"""What a family's tokenizer has of its own: how it is told from another, where it cannot follow transformers, translations.

The laws that hold for all of them alike stand in tests/parity/test_tokenizers.py.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.text import published
from tests.text.helpers import KOREAN, SAMPLES
from threefold.errors import TokenizerError, UsageError
from threefold.text import import_marian
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.streaming import StreamDecoder
from threefold.text.tokenizer import Tokenizer

Made = Callable[..., Path]
ENDS = ["Das Buch ist grün.", "Die Straße war über den Fluss.", "영화가 정말 재미있었어요", "", " zwei  Leerzeichen ", "🚀 ß</s>x"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("bert")` -> a directory, the same one for all tests that change nothing in it."""
    known: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in known:
            known[family] = tmp_path_factory.mktemp(family)
            getattr(published, family)(known[family])
        return known[family]

    return make


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a directory with changes to its tokenizer_config.json; `...` takes a key out."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "tokenizer_config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def opened(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(folder)


# ---- what a directory says of its family -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta", "gpt1", "biogpt", "t5", "llama"])
def test_files_without_a_word_about_their_family(made: Made, family: str, tmp_path: Path) -> None:
    """The vocabulary shows it. What a class takes for granted beyond ids, such as sentinels, is not there."""
    folder = shutil.copytree(made(family), tmp_path / "bare", ignore=shutil.ignore_patterns("*config.json"))
    bare, known = PretrainedTokenizer.load(folder), PretrainedTokenizer.load(made(family))
    for text in [*SAMPLES.values(), KOREAN]:
        # The class of Llama puts no space in front of one, and breaks ties between runs of spaces otherwise.
        if "<" not in text and "  " not in text and (family != "llama" or text[:1] != " "):
            assert bare.encode(text) == known.encode(text), text
    for part in {"gpt2": ["eos"], "gpt1": ["unk"], "llama": ["bos", "eos"], "t5": ["eos", "pad"]}.get(family, ["pad", "unk"]):
        assert bare.core.token_id(part) == known.core.token_id(part) is not None


def test_config_json_alone_tells_the_family(made: Made, tmp_path: Path) -> None:
    folder = copied(made("roberta"), tmp_path, tokenizer_class=...)
    assert PretrainedTokenizer.load(folder).encode("it was", "a") == opened(folder).encode("it was", "a")
    (folder / "config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"config\.json` should hold an object"):
        PretrainedTokenizer.load(folder)


def test_a_token_that_is_declared_as_null_is_none(made: Made, tmp_path: Path) -> None:
    folder = copied(made("gpt2"), tmp_path, tokenizer_class="GPT2Tokenizer", bos_token=None)
    ours, theirs = PretrainedTokenizer.load(folder), opened(folder)
    assert ours.bos_token is theirs.bos_token is None and ours.core.bos_id is None
    assert ours.eos_token_id == theirs.eos_token_id is not None


def test_names_that_a_class_takes_for_granted_are_there_beside_a_tokenizer_json_too(made: Made, tmp_path: Path) -> None:
    """As gpt2 is published: tokenizer.json, and a tokenizer_config.json that knows a length only."""
    PretrainedTokenizer.load(made("gpt2")).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    shutil.copyfile(made("gpt2") / "config.json", tmp_path / "config.json")
    ours, theirs = PretrainedTokenizer.load(tmp_path), opened(tmp_path)
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.eos_token == "<|endoftext|>"


def test_added_tokens_keep_their_ids_and_their_ways(made: Made, tmp_path: Path) -> None:
    folder = copied(made("biogpt"), tmp_path, pad_token="<fill>")
    size = len(PretrainedTokenizer.load(made("biogpt")))
    (folder / "added_tokens.json").write_text(json.dumps({"<gene>": size, "<fill>": size + 1}))
    ours, theirs = PretrainedTokenizer.load(folder), opened(folder)
    for text in ("a <gene> b<gene>", "<fill>x", "the patients"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.pad_token_id, len(ours)) == (theirs.pad_token_id, len(theirs)) == (size + 1, size + 2)
    ours.core.save(tmp_path / "saved")
    assert opened(tmp_path / "saved").encode("<fill>a <gene> b") == theirs.encode("<fill>a <gene> b")
    (folder / "added_tokens.json").write_text(json.dumps({"<gene>": size + 7}))
    with pytest.raises(TokenizerError, match=rf"`<gene>` has the id {size + 7}; {size:,} is the next one free") as caught:
        PretrainedTokenizer.load(folder)
    assert "added_tokens.json" in caught.value.hint


def test_a_description_beside_a_spelling_counts(made: Made, tmp_path: Path) -> None:
    folder = copied(made("roberta"), tmp_path, mask_token="<mask>")
    described = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": described}))
    ours, theirs = PretrainedTokenizer.load(folder), opened(folder)
    assert ours.encode("it <mask> was") == theirs.encode("it <mask> was") == ours.encode("it<mask> was")


def test_llamas_merges_are_ranked_as_its_class_ranks_them(made: Made) -> None:
    ours, theirs = Tokenizer.load(made("llama")), opened(made("llama"))
    merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    assert ours.spec["model"]["merges"] == merges
    assert Tokenizer.load(made("llama") / "tokenizer.model").spec["model"]["merges"] != merges  # SentencePiece's own order


def test_a_class_that_numbers_pieces_in_its_own_way_is_announced(made: Made, tmp_path: Path) -> None:
    folder = copied(made("t5"), tmp_path, tokenizer_class="XLMRobertaTokenizer")
    assert "XLMRobertaTokenizer numbers the pieces of `spiece.model` in its own way" in PretrainedTokenizer.load(folder).notes[0]
    assert PretrainedTokenizer.load(made("t5")).notes == []


@pytest.mark.parametrize("family, read_as", [("gpt1", "GPT-1"), ("gpt2", "GPT-2")])
def test_a_class_that_is_not_known_is_announced(made: Made, family: str, read_as: str, tmp_path: Path) -> None:
    folder = copied(made(family), tmp_path, tokenizer_class="CLIPTokenizer")
    assert f"CLIPTokenizer is not known here: its files are read as those of {read_as}" in PretrainedTokenizer.load(folder).notes[0]
    assert PretrainedTokenizer.load(made(family)).notes == []


# ---- where transformers' class is not followed -----------------------------------------------------------------------


def test_a_cased_vocabulary_is_not_lowered_unasked(made: Made, tmp_path: Path) -> None:
    """BERT's class lowers unless `do_lower_case` says otherwise; a vocabulary with capitals would then be half unused."""
    published.bert(tmp_path, lowercase=False, do_lower_case=...)
    assert PretrainedTokenizer.load(tmp_path).tokenize("It was")[0] == "It"
    assert opened(tmp_path).tokenize("It was")[0] == "it"


def test_t5s_sentinels_are_special_also_where_none_are_listed(made: Made, tmp_path: Path) -> None:
    folder = copied(made("t5"), tmp_path, additional_special_tokens=None)
    ours, theirs = PretrainedTokenizer.load(folder), opened(folder)
    assert ours.convert_tokens_to_ids("<extra_id_0>") == theirs.convert_tokens_to_ids("<extra_id_0>")
    assert ours.tokenize("a <extra_id_0>b") == ["▁a", "<extra_id_0>", "▁b"]
    assert theirs.tokenize("a <extra_id_0>b") == ["▁a", "▁", "<extra_id_0>", "b"]  # a piece among others there


def test_an_empty_second_text_is_a_second_text(made: Made) -> None:
    """In a batch it is one in transformers too; alone, classes of the library take it for none."""
    ours, theirs = PretrainedTokenizer.load(made("bert")), opened(made("bert"))
    assert ours.encode("it", "") == ours(["it"], [""])["input_ids"][0] == theirs(["it"], [""])["input_ids"][0]
    assert theirs.encode("it", "") == theirs.encode("it")


@pytest.mark.parametrize("family", ["biogpt", "marian"])
def test_of_an_odd_rest_the_second_of_two_long_texts_gets_more(made: Made, family: str) -> None:
    ours, theirs = PretrainedTokenizer.load(made(family)), opened(made(family))
    frame = len(theirs.encode("", ""))
    asked: dict[str, Any] = {"truncation": "longest_first", "max_length": frame + 5, "add_special_tokens": True}
    texts = ("it was the age of wisdom", "it was the age of wisdom")
    ids = theirs.encode(texts[0], add_special_tokens=False)
    first, second = ours.encode(*texts, **asked), theirs.encode(*texts, **asked)
    assert (first.count(ids[2]), second.count(ids[2])) == (1, 1) and len(first) == len(second) == frame + 5
    assert first != second


def test_marian_counts_the_end_and_spelt_tokens_otherwise(made: Made) -> None:
    """Its class is not of the library: the end has the first text's type, and a token that the text spells is special."""
    ours, theirs = PretrainedTokenizer.load(made("marian")), opened(made("marian"))
    asked: dict[str, Any] = {"return_token_type_ids": True, "return_special_tokens_mask": True}
    a, b = ours("it was", "it", **asked), theirs("it was", "it", **asked)
    assert a["input_ids"] == b["input_ids"]
    assert sum(a["token_type_ids"]) == sum(b["token_type_ids"]) and a["token_type_ids"] != b["token_type_ids"]
    assert ours("a</s>", **asked)["special_tokens_mask"][-2:] == [0, 1]
    assert theirs("a</s>", **asked)["special_tokens_mask"][-2:] == [1, 1]


# ---- BioGPT ----------------------------------------------------------------------------------------------------------


def lacking(folder: Path, target: Path, *gone: str) -> Path:
    """The directory with these pieces out of its vocabulary."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    vocab = json.loads((folder / "vocab.json").read_text())
    left = [piece for piece in sorted(vocab, key=vocab.__getitem__) if piece not in gone]
    published.write(target, "vocab.json", {piece: number for number, piece in enumerate(left)})
    return target


def test_biogpts_merges_may_pass_through_pieces_without_an_id(made: Made, tmp_path: Path) -> None:
    merges = [line.split()[:2] for line in (made("biogpt") / "merges.txt").read_text().splitlines()]
    whole = {a + b for a, b in merges}
    parts = {piece for pair in merges for piece in pair}
    passing = next(a + b for a, b in merges if a + b in parts and len(a + b) == 2)
    ending = next(a + b for a, b in merges if a + b not in parts and a in parts & whole)
    folder = lacking(made("biogpt"), tmp_path, passing, ending)
    ours, theirs = PretrainedTokenizer.load(folder), opened(folder)
    size = theirs.vocab_size
    assert "1 pieces that merges pass through and 1 that they end in have no id in vocab.json" in ours.notes[0]
    assert f"from {size:,} on" in ours.notes[0] and ours.core.vocab_size == size + 1
    agreeing = differing = 0
    for text in published.lines():
        a, b = ours.encode(text), theirs.encode(text)
        if theirs.unk_token_id in b or ending.removesuffix("</w>") in text:
            differing += a != b
        else:
            agreeing += 1
            assert a == b, text
    assert agreeing > 100
    unknown = ours.encode(passing + "ա", add_special_tokens=False)[:1]
    assert unknown == [size] and theirs.encode(passing + "ա", add_special_tokens=False)[:1] == [theirs.unk_token_id]


def test_biogpts_merges_must_be_pairs(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made("biogpt"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "merges.txt").write_text("t h 12\nt h e 9\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt:2: `t h e 9` is no merge"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("family", ["biogpt", "marian"])
def test_what_is_streamed_is_what_is_decoded(made: Made, family: str) -> None:
    """Their decoders look back further than one token: quotes are counted, ends are trimmed."""
    tokenizer = Tokenizer.load(made(family))
    texts = [published.MEDICAL, "It's \"a\" 'b c' (d) [e]. the boys' x", "a  b </s> c ", KOREAN]
    for ids in [*map(tokenizer.encode, texts), *([n % tokenizer.vocab_size for n in range(k, 900, k)] for k in (7, 31, 64))]:
        for skip in (True, False):
            decoder = StreamDecoder(tokenizer, skip)
            pieces = [*map(decoder.push, ids), decoder.flush()]
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
            assert sum(map(bool, pieces)) > 3


# ---- Marian ----------------------------------------------------------------------------------------------------------


def test_translations_have_the_ids_of_their_own_side(made: Made, tmp_path: Path) -> None:
    ours, theirs = PretrainedTokenizer.load(made("marian")), opened(made("marian"))
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "target_tokenizer.json").is_file()
    for tokenizer in (ours, PretrainedTokenizer.load(tmp_path)):
        assert tokenizer.notes == []
        for text in [*ENDS, ">>de<< it", "it was the best"]:
            assert tokenizer(text_target=text)["input_ids"] == theirs(text_target=text)["input_ids"]
            ids = theirs(text_target=text)["input_ids"]
            assert tokenizer.decode(ids) == theirs.decode(ids)
        both = tokenizer(["it was", "the best of times"], text_target=ENDS[:2], padding=True, return_tensors="pt")
        expected = theirs(["it was", "the best of times"], text_target=ENDS[:2], padding=True, return_tensors="pt")
        assert list(both) == list(expected) and all(torch.equal(both[key], expected[key]) for key in expected)
        cut = tokenizer("it was", text_target=ENDS[1], truncation=True, max_length=4)
        assert cut["labels"] == theirs("it was", text_target=ENDS[1], truncation=True, max_length=4)["labels"]
    assert ours(text_target="Das Buch")["input_ids"] != ours("Das Buch")["input_ids"]


def test_other_tokenizers_encode_both_alike(made: Made) -> None:
    ours, theirs = PretrainedTokenizer.load(made("t5")), opened(made("t5"))
    assert ours.target is None
    assert dict(ours("it was", text_target="the best")) == dict(theirs("it was", text_target="the best"))
    assert dict(ours(text_target=["a", "b c"])) == dict(theirs(text_target=["a", "b c"]))
    with pytest.raises(UsageError, match="no text to encode"):
        ours()


def test_pieces_of_the_other_side_are_decoded_and_never_chosen(made: Made) -> None:
    ours, theirs = PretrainedTokenizer.load(made("marian")), opened(made("marian"))
    vocab = json.loads((made("marian") / "vocab.json").read_text())
    source, target = theirs.spm_source, theirs.spm_target
    only_target = [p for p in vocab if target.piece_to_id(p) != 0 and source.piece_to_id(p) == 0 and len(p) > 1]
    assert len(only_target) > 10
    for piece in only_target:
        assert ours.decode([vocab[piece]]) == theirs.decode([vocab[piece]])
        assert ours.convert_ids_to_tokens(vocab[piece]) == piece and ours.convert_tokens_to_ids(piece) == vocab[piece]
        assert vocab[piece] not in ours.encode(piece.replace("▁", " ")), piece


def test_a_run_of_unknown_characters_is_one_unknown(made: Made) -> None:
    """transformers looks the whole run up among the pieces of both sides. One character is found here too, several not."""
    ours, theirs = PretrainedTokenizer.load(made("marian")), opened(made("marian"))
    unknown = [piece for piece in theirs.get_vocab() if theirs.spm_source.piece_to_id(piece) == 0 and len(piece) == 1]
    assert len(unknown) > 5
    a, b = unknown[:2]
    for text in (a, f"it{a}was", f"{a} {b}", f"it {a}{b} was", f"{a}{b}{a}", f"{a}\ue000", f"\ue000{a}it"):
        assert ours.encode(text) == theirs.encode(text), text
    assert theirs.unk_token_id in ours.encode(a + b) and theirs.unk_token_id not in ours.encode(a)


def test_a_run_that_is_a_piece_of_the_other_side_is_unknown_here(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made("marian"), tmp_path, dirs_exist_ok=True)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    published.write(tmp_path, "vocab.json", {**vocab, "шт": len(vocab)})
    ours, theirs = PretrainedTokenizer.load(tmp_path), opened(tmp_path)
    assert theirs.encode("шт")[1] == len(vocab) and ours.encode("шт")[1] == ours.unk_token_id
    assert ours.decode([len(vocab)]) == "шт"


def test_a_piece_of_the_source_without_an_id_is_announced(made: Made, tmp_path: Path) -> None:
    theirs = opened(made("marian"))
    gone = next(p for p in theirs.get_vocab() if theirs.spm_source.piece_to_id(p) and theirs.spm_target.piece_to_id(p) == 0 and len(p) > 4)
    ours = PretrainedTokenizer.load(lacking(made("marian"), tmp_path, gone))
    assert ours.notes == [
        f"1 pieces of source.spm, such as {gone!r}, have no id in vocab.json: their text is cut into other pieces, where "
        "transformers gives `<unk>`"
    ]
    text = gone.replace("▁", " ")
    assert ours.unk_token_id not in ours.encode(text) and theirs.unk_token_id in opened(tmp_path).encode(text)


def test_hundreds_of_languages_and_of_foreign_characters(made: Made, tmp_path: Path) -> None:
    """More than one pattern holds: they are shared out among several."""
    shutil.copytree(made("marian"), tmp_path, dirs_exist_ok=True)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    more = [*(f">>l{i:03d}_Hans<<" for i in range(400)), *map(chr, range(0x4E00, 0x4E00 + 6000, 3))]
    published.write(tmp_path, "vocab.json", {**vocab, **{piece: len(vocab) + i for i, piece in enumerate(more)}})
    ours, theirs = PretrainedTokenizer.load(tmp_path), opened(tmp_path)
    assert max(len(rule["pattern"]["Regex"]) for rule in ours.core.spec["normalizer"]["normalizers"] if "Regex" in rule.get("pattern", {})) <= 2000
    for text in (">>l000_Hans<< it", ">>l399_Hans<<it was", ">>l400_Hans<< it", "it " + chr(0x4E00) + " was", chr(0x4E00 + 5997), "it>>l000_Hans<<"):
        assert ours.encode(text) == theirs.encode(text), text
    ours.save_pretrained(tmp_path / "saved")
    assert PretrainedTokenizer.load(tmp_path / "saved").encode(">>l399_Hans<<it 一") == theirs.encode(">>l399_Hans<<it 一")


def test_what_marian_cannot_be_read_from_says_so(made: Made, tmp_path: Path) -> None:
    folder = copied(made("marian"), tmp_path / "a", separate_vocabs=True)
    with pytest.raises(TokenizerError, match="vocabulary of its own for each side"):
        Tokenizer.load(folder)
    folder = copied(made("marian"), tmp_path / "b")
    shutil.copyfile(made("llama") / "tokenizer.model", folder / "source.spm")
    with pytest.raises(TokenizerError, match=r"type 2 \(bpe\)"):
        Tokenizer.load(folder)
    published.write(folder, "vocab.json", {"</s>": 0, "<unk>": 1, "a": 3})
    with pytest.raises(TokenizerError, match="without a gap"):
        Tokenizer.load(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(TokenizerError, match="holds no tokenizer") as caught:
        Tokenizer.load(folder)  # both .spm files alone say nothing of ids
    assert "source.spm with vocab.json" in caught.value.hint


def test_marks_of_marian_are_no_text(made: Made) -> None:
    ours, theirs = PretrainedTokenizer.load(made("marian")), opened(made("marian"))
    for mark in (import_marian.KEPT, *map(chr, range(0xFDD3, 0xFDDB))):
        for text in (mark, f"{mark}It", f"it {mark}>de<<", f"a{mark}{mark}b"):
            assert ours.encode(text) == theirs.encode(text), ascii(text)

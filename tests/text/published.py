"""Directories of tokenizers as the families are published: the files of each, around small vocabularies made here."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.text.helpers import KOREAN, texts
from threefold.text import moses

Config = dict[str, Any]
MEDICAL = """Patients (n = 1,204) weren't given IL-2-dependent TNF-α; the hazard ratio was 0.53 (95% CI 0.41-0.68, p < 0.05).
Dr. Smith's group, e.g. at 37°C, saw no effect of "low-dose" aspirin vs. placebo in No. 5 of the centres.
BRCA1/2 & HER2+ tumours [stage II] were treated with 5-fluorouracil; 'off-label' use is not advised."""
TARGET = ["Es war die beste Zeit, es war die schlechteste Zeit.", "Das Buch ist grün.", "Die Straße war über den Fluss.",
          *KOREAN.split("\n")]


def lines() -> list[str]:
    return [*(line for text in texts() for line in text.split("\n")), *MEDICAL.split("\n")]


def write(folder: Path, name: str, content: str | bytes | dict[str, Any] | list[Any]) -> None:
    data = content if isinstance(content, str | bytes) else json.dumps(content, ensure_ascii=False, indent=2)
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def config(folder: Path, kind: str, described: Config, changes: Config) -> None:
    """tokenizer_config.json, in which a change to `...` takes a key out, and the config.json of a model of this type."""
    content = {key: value for key, value in {**described, **changes}.items() if value is not ...}
    write(folder, "tokenizer_config.json", content)
    write(folder, "config.json", {"model_type": kind})


def sentencepiece_model(over: Iterable[str], **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(over), model_writer=model, num_threads=1, hard_vocab_limit=False, minloglevel=4, **options
    )
    return model.getvalue()


def bert(folder: Path, lowercase: bool = True, named: str = "Bert", **changes: Any) -> None:
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner.train_from_iterator(lines(), trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    vocab = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    write(folder, "vocab.txt", "".join(f"{piece}\n" for piece, _ in vocab))
    described = {"do_lower_case": lowercase, "model_max_length": 512, "tokenizer_class": f"{named}Tokenizer"}
    config(folder, named.lower(), described, changes)


def _bpe(learner: Tokenizer, special: list[str], **options: Any) -> tuple[dict[str, int], list[list[str]]]:
    learner.train_from_iterator(
        lines(), trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, **options))
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], model["merges"]


def _byte_level(special: list[str]) -> tuple[dict[str, int], list[list[str]]]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _bpe(learner, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _merges(merges: list[list[str]], header: str = "#version: 0.2\n", number: bool = False) -> str:
    return header + "".join(f"{a} {b}{f' {9000 - i}' if number else ''}\n" for i, (a, b) in enumerate(merges))


def gpt2(folder: Path, **changes: Any) -> None:
    vocab, merges = _byte_level(["<|endoftext|>"])
    write(folder, "vocab.json", vocab)
    write(folder, "merges.txt", _merges(merges))
    config(folder, "gpt2", {"model_max_length": 1024}, changes)


def roberta(folder: Path, **changes: Any) -> None:
    vocab, merges = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    write(folder, "vocab.json", vocab)
    write(folder, "merges.txt", _merges(merges))
    config(folder, "roberta", {"model_max_length": 512, "tokenizer_class": "RobertaTokenizer"}, changes)


def gpt1(folder: Path, **changes: Any) -> None:
    learner = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocab, merges = _bpe(learner, ["<unk>"], end_of_word_suffix="</w>")
    write(folder, "vocab.json", vocab)
    write(folder, "merges.txt", _merges(merges))
    config(folder, "openai-gpt", {"model_max_length": 512}, changes)


def biogpt(folder: Path, **changes: Any) -> None:
    learner = Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": moses.splitting(), "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "BPE", "unk_token": "<unk>", "end_of_word_suffix": "</w>", "vocab": {}, "merges": []}}))
    vocab, merges = _bpe(learner, ["<s>", "<pad>", "</s>", "<unk>"], end_of_word_suffix="</w>")
    write(folder, "vocab.json", vocab)
    write(folder, "merges.txt", _merges(merges, header="", number=True))
    config(folder, "biogpt", {"model_max_length": 1024}, changes)


def sentinels(count: int) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(count)]


def t5(folder: Path, **changes: Any) -> None:
    write(folder, "spiece.model", sentencepiece_model(
        lines(), model_type="unigram", vocab_size=700, pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    described = {"extra_ids": 100, "additional_special_tokens": sentinels(100), "eos_token": "</s>", "pad_token": "<pad>",
                 "unk_token": "<unk>", "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    config(folder, "t5", described, changes)


def llama(folder: Path, **changes: Any) -> None:
    write(folder, "tokenizer.model", sentencepiece_model(
        lines(), model_type="bpe", vocab_size=900, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True))
    described = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                 "model_max_length": 2048, "legacy": True, "tokenizer_class": "LlamaTokenizer"}
    config(folder, "llama", described, changes)


def marian(folder: Path, **changes: Any) -> None:
    source = sentencepiece_model(lines(), model_type="unigram", vocab_size=500)
    target = sentencepiece_model(TARGET * 3, model_type="unigram", vocab_size=150)
    write(folder, "source.spm", source)
    write(folder, "target.spm", target)
    processors = [sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (source, target)]
    pieces = {p.id_to_piece(i) for p in processors for i in range(p.get_piece_size())} - {"<s>", "</s>", "<unk>"}
    ordered = ["</s>", "<unk>", *sorted(pieces), ">>de<<", ">>ko<<", "<pad>"]
    write(folder, "vocab.json", {piece: number for number, piece in enumerate(ordered)})
    config(folder, "marian", {"source_lang": "eng", "target_lang": "mul", "tokenizer_class": "MarianTokenizer"}, changes)

"""Tokenizers in the formats of others -> one tokenizer.json, and which of its tokens play which part.

Decisions:
- Every format becomes a tokenizer.json with the same ids as the program it was made for; nothing else is kept of it.
- Which program that was, a directory says by the class it names or by the type of its model (conventions.py). Where
  it does not, the vocabulary shows it: `</w>` ends a word of GPT-1, and with Moses' `&apos;` or `@-@` one of BioGPT.
- A vocab.txt does not say whether it is cased; it is if one of its ordinary pieces has a capital letter.
- Files of tiktoken carry no pattern; it is chosen by the number of ranks that each published encoding has.
- BioGPT's merges pass through pieces that its vocabulary may lack. Those that lead on to a known piece get ids behind
  all others, and a note; those that lead nowhere are left out, and the known parts stay.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from threefold.errors import TokenizerError
from threefold.text import conventions, moses
from threefold.text.guard import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, Spec, parse_json, read_bytes
from threefold.text.import_marian import read_marian
from threefold.text.sentencepiece_model import read_sentencepiece
from threefold.text.tokenizer_json import (
    Roles,
    added,
    as_signs,
    bpe_model,
    byte_level,
    named_roles,
    spec_of,
    template,
    wordpiece_spec,
)

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("encoder_bpe_40000.json", "vocab_40000.bpe"))
WORDPIECE = ("Bert", "Electra", "PreTrained", "TokenizersBackend", "DistilBert", "MobileBert", "Funnel", "LayoutLM", "Lxmert", "ConvBert",
             "SqueezeBert", "DPR", "Splinter", "RetriBert", "MPNet")  # how classes begin that read vocab.txt as BERT does
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model")
TRANSLATION, SIDES = ("source.spm", "vocab.json"), ("source", "target")  # Marian's

Found = tuple[Spec, Roles, list[str]]


def find(folder: Path) -> list[Path]:
    """The files that make up the tokenizer of a directory without tokenizer.json. Raises `TokenizerError`."""
    for several in (TRANSLATION, *PAIRS):
        if all((folder / name).is_file() for name in several):
            return [folder / name for name in several]
    for name in (*SENTENCEPIECE, "vocab.txt"):
        if (folder / name).is_file():
            return [folder / name]
    for pattern in ("*.model", "*.tiktoken"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found
    raise TokenizerError(
        f"`{folder}` holds no tokenizer",
        hint="expected tokenizer.json, or a SentencePiece .model, vocab.json with merges.txt, source.spm with vocab.json, "
        "encoder.json with vocab.bpe, vocab.txt or a .tiktoken file",
    )


def read_foreign(files: list[Path], config: Mapping[str, Any]) -> Found:
    """(tokenizer.json, part -> token, notes) of the files that `find` gave, or of one file a user named; `config` is the
    tokenizer_config.json of the directory, written out, and empty for a file alone."""
    path = files[0]
    if len(files) == 1 and path.suffix in (".json", ".bpe", ".txt"):
        for pair in PAIRS:
            if path.name in pair:
                files = [path.with_name(name) for name in pair]
                path = files[0]
    if path.stem in SIDES and path.suffix == ".spm" and path.with_name("vocab.json").is_file():
        spec, roles, notes = read_marian(path, "source" if path.stem == "source" else "target", config)
    elif len(files) == 2:
        spec, roles, notes = _pair(files[0], files[1], config)
    elif path.suffix == ".txt":
        spec, roles = _wordpiece(path, config)
        kind = str(config.get("tokenizer_class", ""))
        foreign = "Japanese" in kind or (kind != "" and not kind.startswith(WORDPIECE))
        notes = [f"transformers' {kind} is not known here: its file is read as that of BERT, and its own ids may be others"] if foreign else []
    elif path.suffix == ".tiktoken":
        spec, roles, notes = (*_tiktoken(path), [])
    else:
        spec, roles, notes = read_sentencepiece(path, config)
    return conventions.with_tokens(spec, config, path.parent) if config else spec, roles, notes


# ------------------------------------------------------------------------------------------ vocab + merges, vocab.txt


def _pair(vocab_path: Path, merges_path: Path, config: Mapping[str, Any]) -> Found:
    vocab = parse_json(read_bytes(vocab_path), vocab_path)
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(i, int) for i in vocab.values()):
        raise TokenizerError(
            f"`{vocab_path}` should give each piece an id", hint="expected an object such as encoder.json of GPT-2"
        )
    kind = str(config.get("tokenizer_class", ""))
    in_words = any(piece.endswith("</w>") for piece in vocab)
    if kind == conventions.BIOGPT or (in_words and not kind and {"&apos;</w>", "@-@</w>"} & vocab.keys()):
        return _biogpt(vocab, list(_merges(merges_path)))
    merges = list(_merges(merges_path, vocab_path.name, vocab))
    known = ("", "PreTrainedTokenizerFast", conventions.GPT1 if in_words else conventions.GPT2, conventions.ROBERTA)
    notes = [
        f"transformers' {kind} is not known here: its files are read as those of {'GPT-1' if in_words else 'GPT-2'}, and its own "
        "ids may be others"
    ] if kind not in known else []
    if in_words:
        return (*_gpt1(vocab, merges), notes)
    names = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>")
    special = [added(token, vocab[token]) for token in names if token in vocab]
    roles = named_roles([token["content"] for token in special])
    in_front = bool(config.get("add_prefix_space", False))
    pre, decoder = byte_level(GPT2_PATTERN, in_front)
    begin = config.get("bos_token") if config.get("add_bos_token") else None
    begin = begin.get("content") if isinstance(begin, dict) else begin
    frame = template((begin, vocab[begin]) if isinstance(begin, str) and begin in vocab else None, None, second=1)
    if {"<s>", "</s>"} <= vocab.keys() and (kind == conventions.ROBERTA or (not kind and "<mask>" in vocab)):
        roles |= {"cls": "<s>", "sep": "</s>"}
        frame = {
            "type": "RobertaProcessing",
            "sep": ["</s>", vocab["</s>"]],
            "cls": ["<s>", vocab["<s>"]],
            "trim_offsets": bool(config.get("trim_offsets", True)),
            "add_prefix_space": in_front,
        }
    model = bpe_model(vocab, merges)
    return spec_of(model, special, pre_tokenizer=pre, decoder=decoder, post_processor=frame), roles, notes


def _merges(path: Path, beside: str = "", vocab: Mapping[str, int] | None = None) -> Iterator[list[str]]:
    """The merges of a file, each of two pieces. With `vocab`, all pieces must be in it; without, a count may follow."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.startswith("#version") or not line.strip():
            continue
        pair = line.rstrip("\r").split(" ")
        if vocab is None and len(pair) == 3 and pair[2].isdigit():
            pair = pair[:2]
        if len(pair) != 2 or (vocab is not None and any(p not in vocab for p in ("".join(pair), *pair))):
            raise TokenizerError(
                f"{path}:{number}: `{line[:60]}` is no merge of two pieces" + (f" of `{beside}`" if beside else ""),
                hint="do the two files belong together?",
            )
        yield pair


def _gpt1(vocab: Mapping[str, int], merges: list[list[str]]) -> tuple[Spec, Roles]:
    model = bpe_model(vocab, merges, unk_token="<unk>" if "<unk>" in vocab else None, end_of_word_suffix="</w>")
    normal = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    special = [added("<unk>", vocab["<unk>"])] if "<unk>" in vocab else []
    return spec_of(
        model,
        special,
        normalizer=normal,
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template(None, None, second=1),
        decoder={"type": "BPEDecoder", "suffix": "</w>"},
    ), named_roles([token["content"] for token in special])


def _biogpt(vocab: Mapping[str, int], merges: list[list[str]]) -> Found:
    full, kept, free = dict(vocab), [], itertools.count(max(vocab.values()) + 1)
    for pair in reversed(merges):  # what a merge makes is used by later ones
        if "".join(pair) in full:
            kept.append(pair)
            full |= {piece: next(free) for piece in pair if piece not in full}
    passing, left_out = len(full) - len(vocab), len(merges) - len(kept)
    notes = [
        f"{passing:,} pieces that merges pass through and {left_out:,} that they end in have no id in vocab.json: a word "
        f"that ends in one of them is `<unk>` in transformers, and here an id from {len(vocab):,} on, or its parts"
    ] if passing or left_out else []
    special = [added(token, vocab[token]) for token in ("<s>", "<pad>", "</s>", "<unk>") if token in vocab]
    words = {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "}
    return spec_of(
        bpe_model(full, kept[::-1], unk_token="<unk>" if "<unk>" in vocab else None, end_of_word_suffix="</w>"),
        special,
        normalizer=moses.splitting(),
        pre_tokenizer={"type": "WhitespaceSplit"},
        post_processor=template(("</s>", vocab["</s>"]) if "</s>" in vocab else None, None, second=1),
        decoder={"type": "Sequence", "decoders": [words, {"type": "Fuse"}, *moses.joining()]},
    ), named_roles([token["content"] for token in special]), notes


def _wordpiece(path: Path, config: Mapping[str, Any]) -> tuple[Spec, Roles]:
    pieces = _text(path).removesuffix("\n").split("\n")
    vocab = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
    special: list[str] = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
    if "[UNK]" not in vocab or len(vocab) < len(pieces):
        raise TokenizerError(
            f"`{path}` is no WordPiece vocabulary: "
            + ("it has no `[UNK]`" if "[UNK]" not in vocab else "a piece stands twice"),
            hint="expected vocab.txt of BERT, one piece a line",
        )
    cased = any(piece.lower() != piece for piece in vocab if not piece.startswith("["))
    return wordpiece_spec(
        vocab,
        special,
        lowercase=bool(config.get("do_lower_case", not cased)),
        strip_accents=config.get("strip_accents"),
        chinese=bool(config.get("tokenize_chinese_chars", True)),
        cleanup=True,
    ), named_roles(special)


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"`{path}` is not UTF-8: {error.reason} at byte {error.start:,}", hint="the file is damaged: fetch it again"
        ) from error


# ------------------------------------------------------------------------------------------ tiktoken

_TIKTOKEN = {  # ranks -> pattern, special tokens
    50256: (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    50280: (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    100256: (
        CL100K_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    199998: (O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def _tiktoken(path: Path) -> tuple[Spec, Roles]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            encoded, written = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(written)
        except ValueError as error:
            raise TokenizerError(
                f"{path}:{number}: not a piece in base64 and a rank", hint="the file is damaged: fetch it again"
            ) from error
    if (
        len(ranks) not in _TIKTOKEN
        or len(set(ranks.values())) < len(ranks)
        or any(bytes([byte]) not in ranks for byte in range(256))
    ):
        raise TokenizerError(
            f"`{path}` holds {len(ranks):,} pieces, which no known encoding has",
            hint=f"known: {', '.join(f'{count:,}' for count in _TIKTOKEN)} (r50k, p50k, cl100k, o200k)",
        )
    pattern, special = _TIKTOKEN[len(ranks)]
    vocab = {as_signs(piece): rank for piece, rank in ranks.items()}
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            parts = _split_below(piece, rank, ranks)
            if len(parts) == 2:  # others are reached whole, by `ignore_merges`
                merges.append([as_signs(part) for part in parts])
    pre, decoder = byte_level(pattern)
    spec = spec_of(
        bpe_model({**vocab, **special}, merges, ignore_merges=True),
        [added(token, number) for token, number in special.items()],
        pre_tokenizer=pre,
        decoder=decoder,
    )
    return spec, named_roles(list(special))


def _split_below(piece: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The pieces that merges of lower rank leave of `piece`."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        found = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best, place = min(found, default=(rank, 0))
        if best >= rank:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]

"""Tokenizers in the formats of others -> one tokenizer.json, and which of its tokens play which part.

Decisions:
- Every format becomes a tokenizer.json with the same ids as the program it was made for; nothing else is kept of it.
- A vocab.txt does not say whether it is cased; it is if one of its ordinary pieces has a capital letter.
- Files of tiktoken carry no pattern; it is chosen by the number of ranks that each published encoding has.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threefold.errors import TokenizerError
from threefold.text.guard import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, Spec, parse_json, read_bytes
from threefold.text.sentencepiece_model import read_sentencepiece
from threefold.text.tokenizer_json import (
    Roles,
    added,
    as_signs,
    bpe_model,
    byte_level,
    named_roles,
    spec_of,
    wordpiece_spec,
)

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("encoder_bpe_40000.json", "vocab_40000.bpe"))
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model")


def find(folder: Path) -> list[Path]:
    """The files that make up the tokenizer of a directory without tokenizer.json. Raises `TokenizerError`."""
    for pair in PAIRS:
        if all((folder / name).is_file() for name in pair):
            return [folder / name for name in pair]
    for name in (*SENTENCEPIECE, "vocab.txt"):
        if (folder / name).is_file():
            return [folder / name]
    for pattern in ("*.model", "*.tiktoken"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found
    raise TokenizerError(
        f"`{folder}` holds no tokenizer",
        hint="expected tokenizer.json, or a SentencePiece .model, vocab.json with merges.txt, "
        "encoder.json with vocab.bpe, vocab.txt or a .tiktoken file",
    )


def read_foreign(files: list[Path], config: Mapping[str, Any]) -> tuple[Spec, Roles]:
    """(tokenizer.json, part -> token) of the files that `find` gave, or of one file a user named."""
    path = files[0]
    if len(files) == 1 and path.suffix in (".json", ".bpe", ".txt"):
        for pair in PAIRS:
            if path.name in pair:
                files = [path.with_name(name) for name in pair]
                path = files[0]
    if len(files) == 2:
        return _pair(*files)
    if path.suffix == ".txt":
        return _wordpiece(path, config)
    if path.suffix == ".tiktoken":
        return _tiktoken(path)
    return read_sentencepiece(path)


# ------------------------------------------------------------------------------------------ vocab + merges, vocab.txt


def _pair(vocab_path: Path, merges_path: Path) -> tuple[Spec, Roles]:
    vocab = parse_json(read_bytes(vocab_path), vocab_path)
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(i, int) for i in vocab.values()):
        raise TokenizerError(
            f"`{vocab_path}` should give each piece an id", hint="expected an object such as encoder.json of GPT-2"
        )
    merges = []
    for number, line in enumerate(_text(merges_path).split("\n"), 1):
        if line.startswith("#version") or not line.strip():
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or "".join(pair) not in vocab or pair[0] not in vocab or pair[1] not in vocab:
            raise TokenizerError(
                f"{merges_path}:{number}: `{line[:60]}` is no merge of two pieces of `{vocab_path.name}`",
                hint="do the two files belong together?",
            )
        merges.append(pair)
    if any(piece.endswith("</w>") for piece in vocab):
        return _gpt1(vocab, merges)
    pre, decoder = byte_level(GPT2_PATTERN)
    special = [
        added(token, vocab[token])
        for token in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>")
        if token in vocab
    ]
    spec = spec_of(
        bpe_model(vocab, merges),
        special,
        pre_tokenizer=pre,
        decoder=decoder,
        post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    )
    return spec, named_roles([token["content"] for token in special])


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
        decoder={"type": "BPEDecoder", "suffix": "</w>"},
    ), named_roles([token["content"] for token in special])


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

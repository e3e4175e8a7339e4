"""Tokenizers in the formats of others -> one tokenizer.json, and which of its tokens play which part.

Decisions:
- Every format becomes a tokenizer.json with the same ids as the program it was made for; nothing else is kept of it.
- SentencePiece files are read as what they are, protocol buffers, by a reader of their few fields: no compiled library takes
  part in opening a foreign file.
- What SentencePiece does to white space is written out as rules on the text. Pieces are then matched over the whole text,
  which equals SentencePiece also where pieces span spaces.
- Byte pieces get a score below every path of characters, so that the text `<0x41>` is six characters and not a byte.
- A vocab.txt does not say whether it is cased; it is if one of its ordinary pieces has a capital letter.
- Files of tiktoken carry no pattern; it is chosen by the number of ranks that each published encoding has.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from threefold.errors import TokenizerError
from threefold.text.guard import CL100K_PATTERN, GPT2_PATTERN, MAX_VOCAB, O200K_PATTERN, Spec, parse_json, read_bytes

Roles = dict[str, str]
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("encoder_bpe_40000.json", "vocab_40000.bpe"))
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model")
SPACE = "▁"


def byte_signs() -> list[str]:
    """For each byte the printable character that GPT-2's byte-level vocabularies write for it."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


BYTE_SIGNS = byte_signs()


def as_signs(data: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them."""
    return "".join([BYTE_SIGNS[byte] for byte in data])


def find(folder: Path) -> list[Path]:
    """The files of a directory without tokenizer.json that make up its tokenizer; raises `TokenizerError` if there are none."""
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
    raise TokenizerError(f"`{folder}` holds no tokenizer", hint="expected tokenizer.json, or a SentencePiece .model, vocab.json with merges.txt, "
                         "encoder.json with vocab.bpe, vocab.txt or a .tiktoken file")


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
    return _sentencepiece(path)


def added(content: str, number: int, *, special: bool = True) -> Spec:
    """An entry of `added_tokens`."""
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def spec_of(model: Spec, added_tokens: list[Spec], *, normalizer: Spec | None = None, pre_tokenizer: Spec | None = None,
            post_processor: Spec | None = None, decoder: Spec | None = None) -> Spec:
    """A tokenizer.json from its parts."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": sorted(added_tokens, key=lambda token: int(token["id"])),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model}


def template(first: tuple[str, int] | None, last: tuple[str, int] | None, *, pair: bool = False) -> Spec:
    """A post-processor that frames a text as `first text last`; with `pair` two texts as BERT does."""
    def token(part: tuple[str, int] | None, kind: int) -> list[Spec]:
        return [{"SpecialToken": {"id": part[0], "type_id": kind}}] if part else []

    def sequence(name: str, kind: int) -> list[Spec]:
        return [{"Sequence": {"id": name, "type_id": kind}}]

    single = [*token(first, 0), *sequence("A", 0), *token(last, 0)]
    second = 1 if pair else 0
    double = [*single, *(() if pair else token(first, 0)), *sequence("B", second), *token(last, second)]
    return {"type": "TemplateProcessing", "single": single, "pair": double,
            "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in filter(None, (first, last))}}


def byte_level(pattern: str) -> tuple[Spec, Spec]:
    """(pre-tokenizer, decoder) of a byte-level vocabulary whose words are cut by `pattern`."""
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern == GPT2_PATTERN}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if pattern == GPT2_PATTERN:
        return words, decoder
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, words]}, decoder


def bpe_model(vocab: Mapping[str, int], merges: list[list[str]], **options: Any) -> Spec:
    """A BPE model; options are the library's own."""
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **options, "vocab": dict(vocab), "merges": merges}


# ------------------------------------------------------------------------------------------ vocab + merges, vocab.txt

def _pair(vocab_path: Path, merges_path: Path) -> tuple[Spec, Roles]:
    vocab = parse_json(read_bytes(vocab_path), vocab_path)
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(i, int) for i in vocab.values()):
        raise TokenizerError(f"`{vocab_path}` should give each piece an id", hint="expected an object such as encoder.json of GPT-2")
    merges = []
    for number, line in enumerate(_text(merges_path).split("\n"), 1):
        if line.startswith("#version") or not line.strip():
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or "".join(pair) not in vocab or pair[0] not in vocab or pair[1] not in vocab:
            raise TokenizerError(f"{merges_path}:{number}: `{line[:60]}` is no merge of two pieces of `{vocab_path.name}`",
                                 hint="do the two files belong together?")
        merges.append(pair)
    if any(piece.endswith("</w>") for piece in vocab):
        return _gpt1(vocab, merges)
    pre, decoder = byte_level(GPT2_PATTERN)
    special = [added(token, vocab[token]) for token in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>") if token in vocab]
    spec = spec_of(bpe_model(vocab, merges), special, pre_tokenizer=pre, decoder=decoder,
                   post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True})
    return spec, named_roles([token["content"] for token in special])


def _gpt1(vocab: Mapping[str, int], merges: list[list[str]]) -> tuple[Spec, Roles]:
    model = bpe_model(vocab, merges, unk_token="<unk>" if "<unk>" in vocab else None, end_of_word_suffix="</w>")
    normal = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    special = [added("<unk>", vocab["<unk>"])] if "<unk>" in vocab else []
    return spec_of(model, special, normalizer=normal, pre_tokenizer={"type": "BertPreTokenizer"},
                   decoder={"type": "BPEDecoder", "suffix": "</w>"}), named_roles([token["content"] for token in special])


def _wordpiece(path: Path, config: Mapping[str, Any]) -> tuple[Spec, Roles]:
    pieces = _text(path).removesuffix("\n").split("\n")
    vocab = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
    special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
    if "[UNK]" not in vocab or len(vocab) < len(pieces):
        raise TokenizerError(f"`{path}` is no WordPiece vocabulary: " + ("it has no `[UNK]`" if "[UNK]" not in vocab else "a piece stands twice"),
                             hint="expected vocab.txt of BERT, one piece a line")
    cased = any(piece.lower() != piece for piece in vocab if not piece.startswith("["))
    return wordpiece_spec(vocab, special, lowercase=bool(config.get("do_lower_case", not cased)), strip_accents=config.get("strip_accents"),
                          chinese=bool(config.get("tokenize_chinese_chars", True))), named_roles(special)


def wordpiece_spec(vocab: Mapping[str, int], special: list[str], *, lowercase: bool, strip_accents: bool | None, chinese: bool = True) -> Spec:
    """A WordPiece tokenizer with BERT's rules on text (arXiv:1810.04805)."""
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": dict(vocab)}
    normal = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": chinese, "strip_accents": strip_accents, "lowercase": lowercase}
    frame = {"[CLS]", "[SEP]"} <= vocab.keys()
    return spec_of(model, [added(token, vocab[token]) for token in special], normalizer=normal, pre_tokenizer={"type": "BertPreTokenizer"},
                   post_processor=template(("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"]), pair=True) if frame else None,
                   decoder={"type": "WordPiece", "prefix": "##", "cleanup": False})


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start:,}", hint="the file is damaged: fetch it again") from error


def named_roles(tokens: list[str]) -> Roles:
    """The parts that tokens play by their names alone, for files that come without a tokenizer_config.json."""
    names = {"bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"), "eos": ("</s>", "<eos>", "<|end_of_text|>"), "cls": ("[CLS]",),
             "sep": ("[SEP]",), "pad": ("<pad>", "[PAD]", "<|pad|>"), "unk": ("<unk>", "[UNK]", "<|unk|>"), "mask": ("<mask>", "[MASK]")}
    roles = {part: token for part, known in names.items() for token in known if token in tokens}
    if "<|endoftext|>" in tokens and not roles.keys() & {"bos", "eos", "cls"}:
        roles |= {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    return roles


# ------------------------------------------------------------------------------------------ tiktoken

_TIKTOKEN = {  # ranks -> pattern, special tokens
    50256: (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    50280: (GPT2_PATTERN, {"<|endoftext|>": 50256}),
    100256: (CL100K_PATTERN, {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
                              "<|endofprompt|>": 100276}),
    199998: (O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def _tiktoken(path: Path) -> tuple[Spec, Roles]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(f"{path}:{number}: not a piece in base64 and a rank", hint="the file is damaged: fetch it again") from error
    if len(ranks) not in _TIKTOKEN or len(set(ranks.values())) < len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"`{path}` holds {len(ranks):,} pieces, which no known encoding has",
                             hint=f"known: {', '.join(f'{count:,}' for count in _TIKTOKEN)} (r50k, p50k, cl100k, o200k)")
    pattern, special = _TIKTOKEN[len(ranks)]
    vocab = {as_signs(piece): rank for piece, rank in ranks.items()}
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            parts = _split_below(piece, rank, ranks)
            if len(parts) == 2:  # others are reached whole, by `ignore_merges`
                merges.append([as_signs(part) for part in parts])
    pre, decoder = byte_level(pattern)
    spec = spec_of(bpe_model({**vocab, **special}, merges, ignore_merges=True), [added(token, number) for token, number in special.items()],
                   pre_tokenizer=pre, decoder=decoder)
    return spec, named_roles(list(special))


def _split_below(piece: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The pieces that merges of lower rank leave of `piece`."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while True:
        found = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        best, place = min(found, default=(rank, 0))
        if best >= rank:
            return parts
        parts[place:place + 2] = [parts[place] + parts[place + 1]]


# ------------------------------------------------------------------------------------------ SentencePiece

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)


def _sentencepiece(path: Path) -> tuple[Spec, Roles]:
    data = read_bytes(path)
    try:
        model = _Message(data)
        pieces = [(part.string(1), part.float(2), part.integer(3, _NORMAL)) for part in model.messages(1)]
        trainer = next(model.messages(2), _Message(b""))
        normal = next(model.messages(3), _Message(b""))
        kind = trainer.integer(3, 1)
        rules = _space_rules(normal)
    except (IndexError, ValueError, struct.error) as error:
        raise TokenizerError(f"`{path}` is not a SentencePiece model: {error}", hint="the file is cut off or of another kind") from error
    if not 0 < len(pieces) <= MAX_VOCAB or kind not in (1, 2) or len({piece for piece, _, _ in pieces}) < len(pieces):
        raise TokenizerError(f"`{path}` is a SentencePiece model with {len(pieces):,} pieces of type {kind}; unigram (1) and bpe (2) are read",
                             hint="is the file complete?")
    if trainer.integer(24, 0):
        raise TokenizerError(f"`{path}` treats white space as a suffix, which no tokenizer.json can say", hint="train a tokenizer on its text instead")
    unknown = next((i for i, (_, _, sort) in enumerate(pieces) if sort == _UNKNOWN), None)
    with_bytes = any(sort == _BYTE for _, _, sort in pieces)
    special = [added(piece, i, special=sort != _USER) for i, (piece, _, sort) in enumerate(pieces) if sort in (_UNKNOWN, _CONTROL, _USER)]
    roles = {part: pieces[number][0] for part, number in (("unk", trainer.integer(40, 0)), ("bos", trainer.integer(41, 1)),
                                                          ("eos", trainer.integer(42, 2)), ("pad", trainer.integer(43, -1)))
             if 0 <= number < len(pieces) and pieces[number][2] in (_CONTROL, _UNKNOWN)}
    if kind == 1:
        lowest = min((score for _, score, sort in pieces if sort == _NORMAL), default=0.0)
        scores = [[piece, lowest - 200 if sort in (_BYTE, _UNUSED) else score] for piece, score, sort in pieces]
        body: Spec = {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": with_bytes}
    else:
        vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        body = bpe_model(vocab, list(_merges(pieces, vocab)), unk_token=pieces[unknown][0] if unknown is not None else None,
                         fuse_unk=True, byte_fallback=with_bytes)
    begin = (roles["bos"], next(i for i, piece in enumerate(pieces) if piece[0] == roles["bos"])) if "bos" in roles and kind == 2 else None
    end = (roles["eos"], next(i for i, piece in enumerate(pieces) if piece[0] == roles["eos"])) if "eos" in roles and kind == 1 else None
    steps: list[Spec] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if normal.integer(3, 1):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return spec_of(body, special, normalizer={"type": "Sequence", "normalizers": rules} if rules else None,
                   post_processor=template(begin, end) if begin or end else None, decoder={"type": "Sequence", "decoders": steps}), roles


def _space_rules(normal: _Message) -> list[Spec]:
    """SentencePiece's normaliser as rules: character map, extra white space, the space in front, spaces as `▁`."""
    rules: list[Spec] = []
    if charsmap := normal.bytes(2):
        rules.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
        # The library applies the map to one grapheme at a time and leaves some letters apart that SentencePiece joins.
        rules.append({"type": "NFC"})
    if normal.integer(4, 1):
        rules += [{"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if normal.integer(3, 1):
        rules.append({"type": "Prepend", "prepend": SPACE})
    if normal.integer(5, 1):
        rules.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return rules


def _merges(pieces: list[tuple[str, float, int]], vocab: Mapping[str, int]) -> Iterator[list[str]]:
    """The merges of a SentencePiece BPE: a pair may join if the whole is a piece, the highest score first."""
    ranked = sorted((i for i, (piece, _, sort) in enumerate(pieces) if sort == _NORMAL and len(piece) > 1), key=lambda i: (-pieces[i][1], i))
    for i in ranked:
        piece = pieces[i][0]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab]
        yield from ([a, b] for a, b in sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))


class _Message:
    """The fields of a protocol buffer message, read by number; the last of several values counts."""

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        place = 0
        while place < len(data):
            tag, place = _varint(data, place)
            if tag & 7 == 0:
                value: int | bytes
                value, place = _varint(data, place)
            else:
                size = {1: 8, 5: 4}.get(tag & 7)
                if tag & 7 == 2:
                    size, place = _varint(data, place)
                if size is None or place + size > len(data):
                    raise ValueError(f"byte {place:,} begins no field of a protocol buffer")
                value, place = data[place:place + size], place + size
            self._fields.setdefault(tag >> 3, []).append(value)

    def messages(self, number: int) -> Iterator[_Message]:
        """The messages in a field."""
        for value in self._fields.get(number, []):
            if not isinstance(value, bytes):
                raise ValueError(f"field {number} is no message")
            yield _Message(value)

    def bytes(self, number: int) -> bytes:
        """The bytes in a field, or none."""
        value = self._fields.get(number, [b""])[-1]
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} holds no bytes")
        return value

    def string(self, number: int) -> str:
        """The text in a field."""
        return self.bytes(number).decode("utf-8")

    def integer(self, number: int, otherwise: int) -> int:
        """The signed 32-bit number in a field."""
        value = self._fields.get(number, [otherwise])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {number} holds no number")
        return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1) if value >= 0 else value

    def float(self, number: int) -> float:
        """The 32-bit float in a field, or 0."""
        value = self._fields.get(number, [b"\0\0\0\0"])[-1]
        return float(struct.unpack("<f", value)[0]) if isinstance(value, bytes) else 0.0


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError(f"byte {place:,} begins no number")

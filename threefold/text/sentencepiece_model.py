"""SentencePiece's .model files -> tokenizer.json.

Decisions:
- The file is read as what it is, a protocol buffer, by a reader of its few fields: no compiled library takes part
  in opening a foreign file.
- A file alone gives SentencePiece's ids. A directory that names T5's or Llama's class gives transformers' ids, whose
  rules on white space, sentinels and the order of merges are the class's own.
- What SentencePiece does to white space is written out as rules on the text. Pieces are then matched over the whole
  text, which equals SentencePiece also where pieces span spaces.
- Byte pieces and unused ones get a score below every path of characters, so that the text `<0x41>` is six
  characters and not a byte.
- Where two ways to cut a text have the same score, the library may choose the other: the same pieces in another
  order.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.errors import TokenizerError
from threefold.text import conventions
from threefold.text.guard import MAX_PIECE, MAX_VOCAB, Spec, read_bytes
from threefold.text.tokenizer_json import SPACE, Roles, added, bpe_model, spec_of, template

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
_OWN_NUMBERS = ("Albert", "BigBird", "Camembert", "DebertaV2", "FNet", "MBart", "MBart50", "Nllb", "Pegasus", "RemBert",
                "SeamlessM4T", "XGLM", "XLMRoberta", "XLNet")  # classes that number pieces in their own way


@dataclass(frozen=True)
class Model:
    """What a .model file says: pieces as (spelling, score, sort), the parts that some play, and its rules on text."""

    pieces: list[tuple[str, float, int]]
    unigram: bool
    roles: Roles
    charsmap: bytes
    space_in_front: bool
    trims: bool  # takes away extra white space
    escapes: bool  # writes spaces as `▁`

    @property
    def unknown(self) -> int | None:
        """The id of the piece for what is unknown."""
        return next((i for i, (_, _, sort) in enumerate(self.pieces) if sort == UNKNOWN), None)

    @property
    def with_bytes(self) -> bool:
        """Whether unknown characters fall back to bytes."""
        return any(sort == BYTE for _, _, sort in self.pieces)

    @property
    def lowest(self) -> float:
        """The lowest score of an ordinary piece."""
        return min((score for _, score, sort in self.pieces if sort == NORMAL), default=0.0)


def read_model(path: Path) -> Model:
    """A .model file, read. Raises `TokenizerError`."""
    data = read_bytes(path)
    try:
        model = _Message(data)
        pieces = [(part.string(1), part.float(2), part.integer(3, NORMAL)) for part in model.messages(1)]
        trainer = next(model.messages(2), _Message(b""))
        normal = next(model.messages(3), _Message(b""))
        kind, suffix = trainer.integer(3, 1), trainer.integer(24, 0)
        numbers = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
        parts = {part: trainer.integer(*field) for part, field in numbers.items()}
        charsmap = normal.bytes(2)
        space_in_front, trims, escapes = (bool(normal.integer(field, 1)) for field in (3, 4, 5))
    except (IndexError, ValueError, struct.error) as error:
        raise TokenizerError(
            f"`{path}` is not a SentencePiece model: {error}", hint="the file is cut off or of another kind"
        ) from error
    if not 0 < len(pieces) <= MAX_VOCAB or kind not in (1, 2) or len({piece for piece, _, _ in pieces}) < len(pieces):
        raise TokenizerError(
            f"`{path}` is a SentencePiece model with {len(pieces):,} pieces of type {kind}; "
            "unigram (1) and bpe (2) are read",
            hint="is the file complete?",
        )
    if (longest := max(len(piece) for piece, _, _ in pieces)) > MAX_PIECE:  # merges are looked for at every cut of a piece
        raise TokenizerError(f"`{path}`: a piece of {longest:,} characters; at most {MAX_PIECE:,} are read", hint="is the file complete?")
    if suffix:
        raise TokenizerError(
            f"`{path}` treats white space as a suffix, which no tokenizer.json can say",
            hint="train a tokenizer on its text instead",
        )
    roles = {
        part: pieces[number][0]
        for part, number in parts.items()
        if 0 <= number < len(pieces) and pieces[number][2] in (CONTROL, UNKNOWN)
    }
    return Model(pieces, kind == 1, roles, charsmap, space_in_front, trims, escapes)


def read_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[Spec, Roles, list[str]]:
    """(tokenizer.json, part -> token, notes) of a SentencePiece model in a directory with this configuration, if in one.

    Raises `TokenizerError`.
    """
    model, kind = read_model(path), str(config.get("tokenizer_class", ""))
    if kind == conventions.T5 and model.unigram:
        return _t5(model, config), model.roles, []
    if kind == conventions.LLAMA and not model.unigram:
        return _llama(model, config), model.roles, []
    notes = []
    if kind.removesuffix("Tokenizer") in _OWN_NUMBERS:
        notes = [f"transformers' {kind} numbers the pieces of `{path.name}` in its own way; the ids here are SentencePiece's"]
    return _own(model), model.roles, notes


def _own(model: Model) -> Spec:
    """SentencePiece's own ids."""
    pieces = model.pieces
    if model.unigram:
        low = model.lowest - 200
        scores = [[piece, low if sort in (BYTE, UNUSED) else score] for piece, score, sort in pieces]
        body: Spec = {"type": "Unigram", "unk_id": model.unknown, "vocab": scores, "byte_fallback": model.with_bytes}
    else:
        vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        body = bpe_model(
            vocab,
            list(_merges(pieces, vocab)),
            unk_token=pieces[model.unknown][0] if model.unknown is not None else None,
            fuse_unk=True,
            byte_fallback=model.with_bytes,
        )
    numbers = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    part = "eos" if model.unigram else "bos"
    edge = (model.roles[part], numbers[model.roles[part]]) if part in model.roles else None
    rules = [*charsmap_rules(model), *space_rules(model)]
    return spec_of(
        body,
        _added(model),
        normalizer={"type": "Sequence", "normalizers": rules} if rules else None,
        post_processor=(template(None, edge) if model.unigram else template(edge, None)) if edge else None,
        decoder=_decoder(model.space_in_front),
    )


def _t5(model: Model, config: Mapping[str, Any]) -> Spec:
    """T5's class: words are cut at white space, and sentinels stand behind the pieces, the first one last."""
    scores: list[list[Any]] = [[piece, score] for piece, score, _ in model.pieces]
    sentinels = conventions.sentinels(config)[::-1]
    words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    end = (model.roles.get("eos", "</s>"), next((i for i, entry in enumerate(scores) if entry[0] == "</s>"), 1))
    return spec_of(
        {"type": "Unigram", "unk_id": 2, "vocab": [*scores, *([token, 0.0] for token in sentinels)], "byte_fallback": False},
        [*_added(model), *(added(token, len(scores) + i) for i, token in enumerate(sentinels))],
        normalizer=next(charsmap_rules(model), None),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, words]},
        post_processor=template(None, end),
        decoder=words,
    )


def _llama(model: Model, config: Mapping[str, Any]) -> Spec:
    """Llama's class: a space in front of the text (of every part of it in the `legacy` way), merges in the order of ids."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    ranked = [(piece, -float(i), sort) for i, (piece, _, sort) in enumerate(model.pieces)]
    in_front = config.get("add_prefix_space") in (None, True)
    scheme = "never" if not in_front else "always" if config.get("legacy") else "first"
    edges = [
        (token, vocab[token]) if config.get(f"add_{part}_token") and (token := model.roles.get(part)) else None
        for part in ("bos", "eos")
    ]
    return spec_of(
        bpe_model(vocab, list(_merges(ranked, vocab, every=True)), fuse_unk=True, byte_fallback=True),
        _added(model),
        pre_tokenizer={"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        post_processor=template(edges[0], edges[1], second=1),
        decoder=_decoder(in_front),
    )


def _added(model: Model) -> list[Spec]:
    return [
        added(piece, i, special=sort != USER)
        for i, (piece, _, sort) in enumerate(model.pieces)
        if sort in (UNKNOWN, CONTROL, USER)
    ]


def _decoder(space_in_front: bool) -> Spec:
    steps: list[Spec] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if space_in_front:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def charsmap_rules(model: Model) -> Iterator[Spec]:
    """SentencePiece's map of characters, if there is one."""
    if model.charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()}
        # The library applies the map to one grapheme at a time and leaves some letters apart that SentencePiece joins.
        yield {"type": "NFC"}


def space_rules(model: Model) -> Iterator[Spec]:
    """What SentencePiece does to white space: extra spaces, the space in front, spaces as `▁`."""
    if model.trims:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if model.space_in_front:
        yield {"type": "Prepend", "prepend": SPACE}
    if model.escapes:
        yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _merges(pieces: list[tuple[str, float, int]], vocab: Mapping[str, int], every: bool = False) -> Iterator[list[str]]:
    """The merges of a SentencePiece BPE: a pair may join if the whole is a piece, the highest score first; with `every`
    also where it is no ordinary piece, and the shortest left part first."""
    ranked = sorted(
        (i for i, (piece, _, sort) in enumerate(pieces) if (every or sort == NORMAL) and len(piece) > 1),
        key=lambda i: (-pieces[i][1], i),
    )
    for i in ranked:
        piece = pieces[i][0]
        splits = [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        ordered = splits if every else sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        yield from ([a, b] for a, b in ordered)


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
                value, place = data[place : place + size], place + size
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
